"""The op table: every name exists, stands in few files, and what the proof computes with uses no ids."""

from __future__ import annotations

import ast
import collections
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import surgeon
from surgeon.graph.arguments import Arguments
from surgeon.graph.graph import Spec
from surgeon.ops.families.attention import LETTERS
from surgeon.ops.letters import parse
from surgeon.ops.product import bind
from surgeon.ops.table import Family, absent_of, bound, known, op, product, rule_of

ROOT = Path(surgeon.__file__).parent
FILES = {
    ".".join(("surgeon", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p
    for p in (ROOT / "ops").rglob("*.py")
}


def test_every_name_exists() -> None:
    for name in known():
        library, _, own = name.rpartition("::")
        packets = getattr(torch.ops, library or "aten")
        assert name == "getitem" or hasattr(packets, own), name


def test_an_op_is_declared_once() -> None:
    with pytest.raises(ValueError, match="relu is declared twice"):
        op("relu", Family.ELEMENTWISE)


def test_every_op_has_a_rule_and_a_meaning() -> None:
    graph = fx.Graph()
    for name in known():
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None:
            node = graph.call_function(getattr(packet, packet.overloads()[0]))
            assert callable(rule_of(node)) and callable(absent_of(node))


# -- how many files name an op -------------------------------------------------------------------------------

# Words that are no ops where they stand.
WORDS = {
    "batch_norm": "a step of recovery; the function in a model's code",
    "index": "an argument of select",
    "log": "a part of the names of softmax ops; a function that writes to a log",
    "mean": "how scores are combined",
    "mode": "training or eval",
    "norm": "an op that folds take; a way to clip gradients",
    "sum": "how scores and numbers of processes are combined",
    "uniform": "one ratio for all layers",
}


def names_in(path: Path, every: set[str]) -> set[str]:
    """Ops that a file names: strings of nothing but such names."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    docs |= {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs]
    lists = [set(text.replace("aten::", "").split()) for text in strings if isinstance(text, str)]
    return {name for names in lists if names <= every for name in names}


def test_few_files_name_an_op() -> None:
    files = collections.defaultdict(set)
    for path in ROOT.rglob("*.py"):
        for name in names_in(path, set(known())):
            files[name].add(path.relative_to(ROOT).as_posix())
    assert {name: sorted(files[name]) for name in files if len(files[name]) > 3 and name not in WORDS} == {}
    declared = {name: [file for file in files[name] if file.startswith("ops/")] for name in known()}
    assert {name: where for name, where in declared.items() if len(where) != 1 and name not in WORDS} == {}


# -- what the proof computes with ----------------------------------------------------------------------------


class Functions:
    """The functions of a module, and the names that each reads."""

    def __init__(self, path: Path) -> None:
        self.imported: dict[str, str] = {}
        self.read: dict[str, set[str]] = {}
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("surgeon.ops"):
                self.imported |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
                own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
                own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
                said = {id(part) for n in ast.walk(node) for part in _annotation(n)}
                self.read[node.name] = {n.id for n in names if id(n) not in said} - own


def _annotation(node: ast.AST) -> Iterator[ast.AST]:
    for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
        yield from ast.walk(part) if part is not None else ()


def reached(module: str, name: str, files: dict[str, Functions], seen: set[tuple[str, str]]) -> None:
    """All functions of the package that a function may call, as (module, name)."""
    if (module, name) in seen or module not in files:
        return
    seen.add((module, name))
    if name in files[module].imported:  # a package hands on what stands in its modules
        where, _, own = files[module].imported[name].rpartition(".")
        reached(where, own, files, seen)
    for other in files[module].read.get(name, ()):
        if other in files[module].read:
            reached(module, other, files, seen)
        elif other in files[module].imported:
            where, _, own = files[module].imported[other].rpartition(".")
            reached(where, own, files, seen)


def meanings() -> set[Any]:
    graph = fx.Graph()
    found = set()
    for name in known():
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None:
            found.add(absent_of(graph.call_function(getattr(packet, packet.overloads()[0]))))
    return {item.func if isinstance(item, functools.partial) else item for item in found}


def test_what_the_proof_computes_with_uses_no_ids() -> None:
    files = {module: Functions(path) for module, path in FILES.items()}
    assert len(meanings()) > 25
    ids = ("surgeon.ops.ids", "surgeon.ops.invariants", "surgeon.ops.context")
    for meaning in meanings():
        seen: set[tuple[str, str]] = set()
        reached(meaning.__module__, meaning.__name__, files, seen)
        assert len(seen) > 0
        for module, name in seen:
            assert not module.startswith(ids), f"{meaning.__name__} uses {name} of {module}"


def test_the_test_of_the_proof_finds_ids() -> None:
    files = {module: Functions(path) for module, path in FILES.items()}
    seen: set[tuple[str, str]] = set()
    reached("surgeon.ops.families.moves.reshape", "shuffle", files, seen)
    assert any(module.startswith("surgeon.ops.ids") for module, _ in seen)


# -- letters -------------------------------------------------------------------------------------------------


def shaped(text: str, target: Any, out: tuple[int, ...], *args: Any) -> Any:
    return bind(text, Arguments(target, args, {}), tuple, out)


def test_sizes_of_letters_follow_from_shapes() -> None:
    text = "input:n(gc)<PK>, weight:(go)cK, bias:+(go) -> n(go)P"
    found = shaped(
        text, torch.ops.aten.convolution.default, (2, 4, 4),
        (2, 6, 8), (4, 3, 5), None, [1], [0], [1], False, [0], 2,
    )  # fmt: skip
    assert found.sizes == {"n": 2, "g": 2, "c": 3, "o": 2, "P0": 4, "K0": 5}
    assert found.macs == 2 * 4 * 4 * 3 * 5
    assert found.added == ()  # the bias was not given


def test_two_products_in_a_row() -> None:
    target = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    found = shaped(LETTERS, target, (2, 4, 5, 6), (2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 6))
    assert found.macs == 2 * 4 * 5 * 7 * (3 + 6)
    assert [sorted(step.summed) for step in found.steps] == [["d"], ["k"]]
    assert [found.own(operand) for operand in found.operands] == [[1, 2], [], [3]]


def test_other_dims_than_declared_are_no_product() -> None:
    assert shaped("self:nk, mat2:kj -> nj", torch.ops.aten.mm.default, (2, 4), (2, 3), (3, 4)) is not None
    assert shaped("self:nk, mat2:kj -> nj", torch.ops.aten.mm.default, (2, 4), (2, 3), (5, 3, 4)) is None


@pytest.mark.parametrize("text", ["self:n[k, mat2:kj -> nj", "self:nk, mat2:kj", "self:nK2 -> n"])
def test_what_is_no_list_of_letters_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a list of dims|has no result"):
        parse(text)


def test_macs_are_those_that_torch_counts() -> None:
    """`torch.utils.flop_counter` counts two of each MAC."""
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    cases = [
        (aten.mm.default, ((2, 3), (3, 4)), ()),
        (aten.addmm.default, ((4,), (2, 3), (3, 4)), ()),
        (aten.bmm.default, ((5, 2, 3), (5, 3, 4)), ()),
        (aten.baddbmm.default, ((4,), (5, 2, 3), (5, 3, 4)), ()),
        (aten.convolution.default, ((2, 6, 8, 8), (4, 3, 3, 3)), (None, [2, 2], [1, 1], [1, 1], False, [0, 0], 2)),
        (aten.convolution.default, ((2, 6, 8, 8), (6, 2, 3, 3)), (None, [2, 2], [1, 1], [1, 1], True, [0, 0], 3)),
    ]  # fmt: skip
    for target, shapes, rest in cases:
        tensors = [torch.randn(shape) for shape in shapes]
        with FlopCounterMode(display=False) as counter:
            out = target(*tensors, *rest)
        assert 2 * _product(target, tensors, rest, out).macs == counter.get_total_flops(), target


def _product(target: Any, tensors: Any, rest: Any, out: torch.Tensor) -> Any:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(tensors))]
    for node, tensor in zip(nodes, tensors, strict=True):
        node.meta["spec"] = Spec(tuple(tensor.shape), tensor.dtype)
    node = graph.call_function(target, (*nodes, *rest))
    node.meta["spec"] = Spec(tuple(out.shape), out.dtype)
    found = product(node)
    assert found is not None and bound(node) is not None
    return found


def test_products_by_expert_have_macs() -> None:
    target = torch.ops.aten._grouped_mm.default
    tensors = [torch.zeros(10, 8), torch.zeros(3, 8, 16), torch.zeros(3, dtype=torch.int32)]
    assert _product(target, tensors, (), torch.zeros(10, 16)).macs == 10 * 8 * 16


def test_the_same_letters_have_the_same_traits() -> None:
    """Ops that differ in their namespace or layout alone are declared in one line."""
    for (name, entry), (_, other) in itertools.product(known().items(), repeat=2):
        if entry.alike and entry.alike == other.alike:
            assert (entry.family, set(entry.traits)) == (other.family, set(other.traits)), name
