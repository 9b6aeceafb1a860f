"""What the explanations say: ties with the ops between them, reasons, advice, and how much is frozen."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.coupling.explain import ADVICE, advice
from surgeon.errors import InputError
from surgeon.graph.messages import where


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm, self.pick = nn.BatchNorm2d(8), nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y + self.norm(self.b(y).relu())
        return self.c(y) * self.pick(x)[:, 2:3]


def surgery() -> surgeon.Surgery:
    torch.manual_seed(0)
    return surgeon.inspect(Residual(), torch.randn(2, 3, 6, 6))


def test_ties_name_the_ops_between_two_slots() -> None:
    (slot,) = surgery().explain("a.weight[0]").slots
    assert slot.width == 8 and slot.frozen == () and slot.groups == ("a.weight[0]",)
    ops = {tie.slot: [where(op) for op in tie.ops] for tie in slot.ties}
    assert set(ops) == {("a.bias", 0), ("b.weight", 0), ("b.weight", 1), ("b.bias", 0), ("c.weight", 1)} | {
        (f"norm.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")
    }
    assert [text.split(" in ")[0] for text in ops["b.weight", 1]] == ["aten.convolution"]
    assert any("add.Tensor" in text and "y = y + self.norm" in text for text in ops["norm.weight", 0])
    assert "test_explain.py" in str(slot) and "with c.weight[1]" in str(slot)


def test_the_graph_of_ties_connects_and_its_edges_are_facts() -> None:
    found = surgery()
    (slot,) = found.explain("b.weight[0]").slots
    ids = {slot: ids[0] for slot, ids in found.propagation.slots.items() if ids.size}
    assert nx.has_path(slot.graph, ids["b.weight", 0], ids["c.weight", 1])
    assert ids["pick.weight", 0] not in slot.graph
    for left, right in slot.graph.edges:
        assert found.solution.root[left] == found.solution.root[right]
    for tie in slot.ties:  # ops of a way follow one another in the graph
        path = nx.shortest_path(slot.graph, ids["b.weight", 0], ids[tie.slot])
        assert [slot.graph.edges[e]["node"] for e in itertools.pairwise(path)]


def test_frozen_slots_say_why_and_what_to_do() -> None:
    found = surgery()
    explained = {s.slot: s for s in found.explain("").slots}
    (out,) = explained["c.weight", 0].frozen
    assert out.count == 4 and "output" in out.reason and "outputs that you read" in out.advice
    text = str(found.explain("c"))
    assert "frozen: 4 of 4" in text and "to unfreeze" in text
    assert ("b.weight", 2) not in {s.slot for s in found.explain("b").slots}  # kernel dims are no channels


def test_the_share_of_frozen_channels_leaves_the_outputs_out() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(x)) * self.a(x)[:, 3].unsqueeze(1)

    share = surgeon.inspect(Looked(), torch.randn(2, 4)).frozen_share
    assert (share.channels, share.frozen) == (16, {"one entry of it is picked by number": 6})
    assert share.share == 6 / 16 and share.reason == "one entry of it is picked by number"


def given(tree: ast.AST) -> Iterator[str]:
    """The reasons in a file: what is passed last to freeze(...), or is called a reason."""
    for node in ast.walk(tree):
        name = getattr(getattr(node, "func", None), "attr", "")
        if isinstance(node, ast.Call) and name in ("freeze", "freeze_all") and node.args:
            yield from plain(node.args[-1])
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason":
            yield from plain(node.value)


def plain(node: ast.AST) -> Iterator[str]:
    """A text, or an f-string with its gaps as they stand in the code."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield ast.unparse(node)[2:-1]


def test_every_reason_that_the_package_gives_has_advice() -> None:
    from pathlib import Path

    root = Path(surgeon.__file__).parent
    sources = [*root.glob("ops/**/*.py"), *root.glob("coupling/*.py")]
    reasons = [reason for path in sources for reason in given(ast.parse(path.read_text()))]
    assert len(reasons) > 20
    assert [reason for reason in reasons if not advice(reason)] == []
    page = (root.parent / "docs" / "frozen.md").read_text()
    assert [key for key, text in ADVICE if f"| {key} | {text} |" not in page] == []


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="nothing called 'layer9'"):
        surgery().explain("layer9")
