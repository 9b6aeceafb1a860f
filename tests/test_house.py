"""The rules of the house: layers import one way, the public API is what it is, files say what they are."""

from __future__ import annotations

import ast
from pathlib import Path

import surgeon

ROOT = Path(surgeon.__file__).parent

# each module may import those before it; a package stands for all of its modules
LAYERS = """
errors graph _running sources modes _quiet _decisions _views inputs _sizes _follows recorder capture batches labels rules _alike
propagate solve lanes groups cost request bands held knapsack calibration criteria choose forwards edits rewrite carry plan
compose distributed masks wanted compare suggest mend blueprint configs absence moves normalise semantics reference trace verify
recovery folding fuse onnx_file agree widen check_file export losses quantize bench_table profiled runners bench kernels latency
stopwatch doctor report explain sensitivity surgery pipeline iterate training models store cli_files cli
""".split()


def imports(path: Path) -> set[str]:
    """Names of surgeon's own modules that a file imports, those only for type checking left out."""
    tree = ast.parse(path.read_text())
    typing = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "surgeon" and id(node) not in typing:
            parts = node.module.split(".")
            found |= (
                {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if (ROOT / f"{alias.name}.py").exists()}
            )
            if len(parts) == 1:
                found |= {alias.name for alias in node.names if (ROOT / alias.name).is_dir()}
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def test_layers_import_one_way() -> None:
    for path in ROOT.rglob("*.py"):
        name = name_of(path)
        if name == "__init__":
            continue
        assert name in LAYERS, f"{name} has no place in the order"
        for used in imports(path) - {name}:
            assert LAYERS.index(used) < LAYERS.index(name), f"{name} imports {used}, which comes after it"


def test_the_proof_is_independent() -> None:
    """Neither the oracle nor what it is made of knows of ids, groups or slicing."""
    for name in ("verify", "trace", "reference", "semantics", "normalise", "moves", "absence", "masks"):
        used = imports(ROOT / f"{name}.py")
        assert not used & {
            "labels",
            "propagate",
            "solve",
            "groups",
            "cost",
            "choose",
            "rewrite",
            "mend",
            "suggest",
            "wanted",
            "compare",
        }, name


def test_public_names() -> None:
    assert set(surgeon.__all__) == {
        "Plan", "Proof", "Recovery", "Surgery", "bench", "broadcast_plan", "doctor", "export", "finetune", "fuse", "inspect",
        "iterate", "load", "quantize", "recover", "regularizer",
        "save", "shrink", "verify",
    }  # fmt: skip
    for name in surgeon.__all__:
        assert (getattr(surgeon, name).__doc__ or "").strip(), name


def test_every_module_says_what_it_is() -> None:
    for path in ROOT.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
