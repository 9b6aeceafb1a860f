"""The rules of the house: folders import one way, the public API is what it is, files say what they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

import surgeon

ROOT = Path(surgeon.__file__).parent

# Each folder may import those before it. Imports inside functions and under TYPE_CHECKING count.
FOLDERS = """
errors files graph ops capture coupling criteria selection mend cut proof masks recovery training
fusion onnx timing latency report api cli
""".split()

# The oracle must not share what it checks: ids, groups, choice, slices and mended numbers. What is exported, measured and
# predicted is any module: plans, groups and choices come in from api as callables and plain data.
_COUPLING_TO_PROOF = "coupling criteria selection mend cut proof".split()
FORBIDDEN = {
    "proof": "coupling criteria selection mend ops.ids ops.context ops.invariants ops.families cut.slice cut.cut".split(),
    "onnx": _COUPLING_TO_PROOF,
    "timing": _COUPLING_TO_PROOF,
    "latency": _COUPLING_TO_PROOF,
}

LONGEST, MOST_ARGUMENTS, MOST_FILES = 300, 12, 14
# Public functions whose arguments are what they are for.
WITH_OPTIONS = "shrink_command finetune iterate shrink".split()


def imports(path: Path) -> Iterator[str]:
    """Names of surgeon's own modules that a file imports, wherever in the file, as `folder.module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "surgeon":
            parts = node.module.split(".")[1:]
            if parts:
                yield from (".".join((*parts, alias.name)) for alias in node.names)
            else:
                yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("surgeon.") for a in node.names if a.name.split(".")[0] == "surgeon"
            )


def folder_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def test_folders_import_one_way() -> None:
    for path in ROOT.rglob("*.py"):
        folder = folder_of(path)
        if folder == "__init__":
            continue
        assert folder in FOLDERS, f"{folder} has no place in the order"
        for used in {name.split(".")[0] for name in imports(path)} - {folder, "__version__"}:
            assert FOLDERS.index(used) < FOLDERS.index(folder), (
                f"{path.relative_to(ROOT)} imports {used}, which comes after it"
            )


def test_the_proof_is_independent() -> None:
    for folder, forbidden in FORBIDDEN.items():
        for path in (ROOT / folder).rglob("*.py"):
            for used in imports(path):
                assert not any(used == f or used.startswith(f"{f}.") for f in forbidden), (
                    f"{path.name} uses {used}"
                )


def test_the_bare_folder_shows_the_stages() -> None:
    shown = [p for p in ROOT.iterdir() if p.name != "__pycache__"]
    assert len(shown) <= 23, sorted(p.name for p in shown)
    for folder in (p for p in ROOT.rglob("*") if p.is_dir() and p.name != "__pycache__"):
        files = [p.name for p in folder.glob("*.py")]
        assert len(files) <= MOST_FILES, f"{folder.name}: {len(files)} files"


def name_of(path: Path) -> str:
    """`folder.module` of a file; of a package its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_modules_import_each_other() -> None:
    """Not in a circle of any length, wherever the imports stand."""
    files = {name_of(path): path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"}

    def module(name: str) -> str:
        """The module that a name is of: the name itself, or what it stands in."""
        return name if name in files else name.rpartition(".")[0]

    graph = nx.DiGraph(
        (name, module(used))
        for name, path in files.items()
        for used in imports(path)
        if module(used) in files and module(used) != name
    )
    assert [part for part in nx.strongly_connected_components(graph) if len(part) > 1] == []


def test_modules_are_short() -> None:
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        lines = len(path.read_text().splitlines())
        assert lines <= LONGEST, f"{name} has {lines} lines: split it"


def test_broad_handlers_say_why() -> None:
    broad = re.compile(r"except (Base)?Exception\b|suppress\((Base)?Exception\)|except:")
    for path in ROOT.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            said = line.partition("#")[2].replace("noqa: BLE001", "").strip(" #")
            assert not broad.search(line) or len(said) > 20, f"{path.name}:{number}: what may be raised here?"


def test_functions_take_few_arguments() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in WITH_OPTIONS:
                taken = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
                assert taken <= MOST_ARGUMENTS, f"{path.name}: {node.name} takes {taken} arguments"


def test_public_names() -> None:
    assert set(surgeon.__all__) == {
        "Calls", "Compaction", "Plan", "Proof", "Recovery", "Surgery", "Vocabulary", "bench", "broadcast_plan", "compact",
        "doctor", "export", "finalize", "finetune", "fuse", "inspect", "iterate", "load", "quantize", "recover",
        "regularizer", "save", "shrink", "sparsify", "sparsity", "verify", "vocabulary",
    }  # fmt: skip
    for name in surgeon.__all__:
        assert (getattr(surgeon, name).__doc__ or "").strip(), name


def test_every_module_says_what_it_is() -> None:
    for path in ROOT.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_names_of_test_files_are_unique() -> None:
    """Pytest imports them by their bare names."""
    names = [path.name for path in Path(__file__).parents[1].rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
