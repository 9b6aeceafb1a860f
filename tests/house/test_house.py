"""The rules of the house: folders import one way, the public API is what it is, files say what they are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import surgeon

ROOT = Path(surgeon.__file__).parent

# Each folder may import those before it. Imports inside functions and under TYPE_CHECKING count.
FOLDERS = """
errors files graph ops capture coupling criteria selection mend cut proof recovery training fusion onnx timing latency report api
cli
""".split()

# The oracle must not share what it checks: ids, groups, choice, slices and mended numbers.
FORBIDDEN = {
    "proof": "coupling criteria selection mend ops.ids ops.context ops.invariants ops.families cut.slice".split(),
}


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
        for used in {name.split(".")[0] for name in imports(path)} - {folder}:
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
    assert len(shown) <= 22, sorted(p.name for p in shown)
    for folder in (p for p in ROOT.rglob("*") if p.is_dir() and p.name != "__pycache__"):
        files = [p.name for p in folder.glob("*.py")]
        assert len(files) <= 17, f"{folder.name}: {len(files)} files"


def test_public_names() -> None:
    assert set(surgeon.__all__) == {
        "Calls", "Plan", "Proof", "Recovery", "Surgery", "bench", "broadcast_plan", "doctor", "export", "finetune", "fuse",
        "inspect", "iterate", "load", "quantize", "recover", "regularizer",
        "save", "shrink", "verify",
    }  # fmt: skip
    for name in surgeon.__all__:
        assert (getattr(surgeon, name).__doc__ or "").strip(), name


def test_every_module_says_what_it_is() -> None:
    for path in ROOT.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
