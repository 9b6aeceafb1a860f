"""Capture: what runs is recorded, the graph is pure and computes the same, the model leaves as it came."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from surgeon.capture.capture import capture
from surgeon.graph.graph import Graph
from surgeon.graph.tensors import tensor_leaves


class Run(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.run = run
        self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4))
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def interpret(graph: Graph, *inputs: Tensor) -> list[Tensor]:
    """Run the recorded graph alone."""
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            values[node] = next(given).clone()
        elif node.op == "get_attr":
            values[node] = graph.tensors[str(node.target)].detach().clone()
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            before = {id(v): v.clone() for v in values.values() if isinstance(v, Tensor)}
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]  # an OpOverload
            assert all(torch.equal(before[id(v)], v) for v in values.values() if id(v) in before), (
                f"{node} wrote to its input"
            )
    return [values[node] for _, node in graph.outputs]


def twice_in_place(s: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1).relu_()
    return y


def write_slice(s: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] = s.weight[:, :2]
    return y


def write_transposed_view(s: Any, x: Tensor) -> Tensor:
    y = x.clone()
    view = y.t()
    view[0].mul_(5)
    return y + view.t()


def write_then_read_other_view(s: Any, x: Tensor) -> Tensor:
    y = x * 1
    rows, flat = y[0], y.view(-1)
    y[1:].zero_()
    rows.add_(3)
    return flat * 2


def write_through_split(s: Any, x: Tensor) -> Tensor:
    y = x.clone()
    left, right = y.split(2, dim=1)
    right.copy_(left)
    return y


def write_diagonal(s: Any, x: Tensor) -> Tensor:
    y = x[:, :3].clone()
    y.diagonal().fill_(7.0)
    return y


def unbind_and_write(s: Any, x: Tensor) -> Tensor:
    y = x.clone()
    for i, row in enumerate(y.unbind(0)):
        row.sub_(i)
    return y


def numpy_in_the_middle(s: Any, x: Tensor) -> Tensor:
    return x * float(x.detach().numpy().sum()) + torch.from_numpy(x.numpy() * 0 + 1)


def control_flow(s: Any, x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 0 else x - 1


@dataclasses.dataclass
class Custom:
    first: Tensor
    rest: list[Tensor]


@pytest.mark.parametrize(
    "run",
    [
        twice_in_place,
        write_slice,
        write_transposed_view,
        write_then_read_other_view,
        write_through_split,
        write_diagonal,
        unbind_and_write,
        numpy_in_the_middle,
        control_flow,
        lambda s, x: {"a": x @ s.weight.t(), "b": [x, (x + 1,)]},
        lambda s, x: Custom(x * 2, [x, x + s.weight]),
    ],
)
def test_the_graph_computes_what_the_model_does(run: Callable[[Any, Tensor], Any]) -> None:
    model, x = Run(run), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    graph = capture(model, x.clone())
    want = [(path, t) for path, t in tensor_leaves(model(x.clone()))]
    assert [path for path, _ in graph.outputs] == [path for path, _ in want]
    for got, (_, tensor) in zip(interpret(graph, x), want, strict=True):
        torch.testing.assert_close(got, tensor, rtol=0, atol=0)


def test_buffers_that_forward_writes_are_put_back() -> None:
    def count(s: Any, x: Tensor) -> Tensor:
        s.counter += 1
        return x * s.counter

    model = Run(count)
    capture(model, torch.ones(2))
    assert model.counter == 0


def test_hooks_and_caches_that_forward_makes_are_taken_away() -> None:
    """A model may install its hooks at the first call (as transformers models do) and remember that it
    has.
    """

    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen, self.ready = nn.Linear(4, 4), [], False

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:
                self.layer.register_forward_hook(lambda m, args, out: self.seen.append(out))
                self.ready = True
            self.seen.clear()
            self.layer(x)
            return torch.stack(self.seen)

    model, x = Lazy(), torch.randn(2, 4)
    shapes = [capture(model, x).outputs[0][1].meta["spec"].shape for _ in range(2)]
    assert shapes == [(1, 2, 4)] * 2
    assert not model.ready and not model.layer._forward_hooks and model.seen == []


def test_modules_and_lines_are_recorded() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Run(lambda s, x: x.exp()))
    graph = capture(model, torch.randn(2, 4))
    by_op = {str(c.op): c for c in graph.calls}
    assert by_op["aten.addmm.default"].module == "0"
    assert by_op["aten.exp.default"].module == "1"
    assert by_op["aten.exp.default"].source[0] == __file__


def test_several_inputs_and_keywords() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor, scale: float = 2.0) -> Tensor:
            return a @ b * scale

    a, b = torch.randn(2, 3), torch.randn(3, 4)
    graph = capture(Two(), {"a": a, "b": b, "scale": 3.0})
    torch.testing.assert_close(interpret(graph, a, b)[0], a @ b * 3.0)


def test_forms_with_out_are_recorded_as_those_that_return() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        out = torch.empty(3, 8)
        torch.add(x, 1, out=out[:, 4:])
        torch.mul(x, 2, out=out[:, :4])
        return out

    x = torch.randn(3, 4)
    torch.testing.assert_close(interpret(capture(Run(forward), x), x)[0], torch.cat([x * 2, x + 1], 1))


def test_hooks_run_and_stay() -> None:
    model, seen = nn.Linear(2, 2), []
    handle = model.register_forward_hook(lambda m, a, out: seen.append(1))
    capture(model, torch.ones(1, 2))
    assert seen == [1]
    assert len(model._forward_hooks) == 1
    handle.remove()


def test_inference_mode_records_the_same() -> None:
    """There torch hands whole linear layers and norms to dispatch modes; a plan has to fit wherever it was
    made.
    """
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    outside = capture(model, x)
    with torch.inference_mode():
        inside = capture(model, torch.randn(2, 5, 8))
        assert torch.is_inference_mode_enabled()
    assert [(n.op, n.target) for n in inside.fx.nodes] == [(n.op, n.target) for n in outside.fx.nodes]
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
