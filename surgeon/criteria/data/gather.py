"""gather(needs, ...) -> Evidence: one pass over batches of data, in eval mode, for criteria that look at more
than weights.

Everything is streamed into float64 sums, so memory does not grow with the number of batches. The model comes
back as it was.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.capture.batches import check_iterable, does_not_run, no_batch, normal, one_number, samples_of
from surgeon.capture.model_state import output_of, quiet_run
from surgeon.capture.sizes.tracing import looking_inside_functional
from surgeon.coupling.groups import Group
from surgeon.coupling.propagate import Propagation
from surgeon.coupling.solution import Solution
from surgeon.criteria.data.consumers import Atoms, Consumer, find_consumers, find_planes
from surgeon.criteria.data.evidence import Evidence, Gradients, Statistics
from surgeon.criteria.data.runs import Runs
from surgeon.criteria.data.stand_ins import output_energy, output_probe
from surgeon.criteria.data.watch import OneOp, See, Watch
from surgeon.errors import InputError, SurgeonError
from surgeon.graph.graph import Graph
from surgeon.ops.ids import DimIds

Loss = Callable[[Any, Any], Tensor]

NEEDS = {
    "gradients": "of the parameters: sums of g and g^2",
    "gates": "of the parameters: w * g summed over all dims but one, and its square",
    "moments": "of what consumers read: mean, mean of squares, mean of sizes; norms of their weights",
    "covariance": "of what consumers read: X^T X, and W W^T of their weights",
    "samples": "mean of each channel in each sample",
    "ranks": "ranks of the feature maps",
    "activation_gradients": "of what consumers read",
    "curvature": "of what consumers give, by what they read: see `curvature`",
}
_BACKWARD = frozenset(("gradients", "gates", "activation_gradients", "curvature"))
_LIMIT = 200_000  # samples; an endless iterator has more
WIDEST = 4096  # entries of which a covariance is kept: 128 MiB


@torch.inference_mode(mode=False)
def gather(
    needs: Set[str],
    *,
    model: nn.Module,
    graph: Graph,
    propagation: Propagation,
    solution: Solution,
    groups: Sequence[Group],
    data: Iterable[Any],
    loss: Loss | None = None,
    widest: int = WIDEST,
) -> Evidence:
    """One pass over the data.

    Args:
        needs: names from NEEDS.
        data: batches: whatever the model takes (a tensor, a tuple or list of positional arguments, a dict of
            keywords), of any batch size; with a loss, pairs (inputs, targets). Read once, from start to end.
        loss: called as loss(output, targets). Without one, what needs gradients uses `output_energy`, which
            needs no labels.
        widest: covariances are kept of this many channels at most.

    Raises:
        InputError: no batches; a batch that is no batch, does not run, takes another path through the code or
            has a loss that is not finite; a consumer too wide; all with the number of the batch, counted from
            1.
    """
    check_iterable(data, "data")
    if any(graph.tensors[name].is_meta for name in graph.owned):
        raise InputError(
            "no evidence can be gathered: the weights have no values (meta device)",
            fix="load the weights, or use a criterion that needs no data",
        )
    parameters = (
        {n: graph.tensors[n] for n in sorted(graph.owned) if _learns(graph.tensors[n])}
        if needs & _BACKWARD
        else {}
    )
    gradients = {
        n: Gradients(
            p,
            "gradients" in needs,
            [d for d in range(p.dim()) if (n, d) in propagation.slots and "gates" in needs],
        )
        for n, p in parameters.items()
    }
    runs = Runs(model, graph, propagation, solution, lambda *run: _consumers(needs, groups, *run))
    statistics = [Statistics(consumer, needs, widest) for consumer in runs.consumers]
    batches = samples = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(_untouched(model, parameters.values()))
        for batch in stack.enter_context(_progress(data)):
            batches += 1
            label = f"batch {batches} of the data"
            args, kwargs, targets = _inputs(batch, label, paired=loss is not None)
            samples += samples_of((args, kwargs))
            if samples > _LIMIT:
                raise InputError(
                    f"data holds more than {_LIMIT} samples",
                    why="an endless iterator has no end, and some hundred samples do",
                    fix="pass a part of it, such as itertools.islice(loader, 20)",
                )
            run, consumers = runs.of(args, kwargs, label) if statistics else (graph, ())
            with (
                quiet_run(model, seed=0, isolated=False),  # the sums below are kept
                torch.set_grad_enabled(bool(needs & _BACKWARD)),
            ):
                output = _run(model, run, list(zip(statistics, consumers, strict=True)), args, kwargs, label)
                if needs & _BACKWARD:
                    signs = torch.Generator().manual_seed(batches)  # each batch has signs of its own
                    stand_in = (
                        partial(output_probe, generator=signs) if "curvature" in needs else output_energy
                    )
                    value = _loss_of(output, targets, loss, stand_in, graph, label)
                    _backward(value, gradients, statistics, label)
            for item in statistics:
                item.check(label)
    if not batches:
        raise no_batch("data")
    return Evidence(batches, gradients, statistics)


def _learns(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


def _consumers(
    needs: Set[str], groups: Sequence[Group], graph: Graph, propagation: Propagation, atoms: Atoms
) -> list[Consumer]:
    """The consumers of a run that read channels of the groups."""
    if not groups or not needs - {"gradients", "gates"}:
        return []
    alive = np.concatenate([group.sets.ravel() for group in groups])

    def living(ids: DimIds) -> list[DimIds]:
        return [np.where(np.isin(a, alive), a, -1) for a in atoms(ids)]

    found = find_consumers(graph, propagation, living)
    if "ranks" in needs:
        found = [c for c in found if c.planes]
        seen = Evidence(0, {}, [Statistics(c, (), 0) for c in found])
        for group in groups:
            if not seen.of(group):
                planes = find_planes(graph, propagation, living, group.sets)
                found += [planes] if planes else []
    return found


def _inputs(batch: Any, label: str, paired: bool) -> tuple[Any, Any, Any]:
    targets = None
    if paired:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(
                f"{label} is no pair (inputs, targets)",
                why="a loss was given",
                fix="let data yield pairs, or leave loss out",
            )
        batch, targets = batch
    args, kwargs = normal(batch, label)
    return args, kwargs, targets


def _run(
    model: nn.Module,
    graph: Graph,
    seeing: Sequence[tuple[Statistics, Consumer]],
    args: Any,
    kwargs: Any,
    label: str,
) -> Any:
    """The model's output; the statistics see what their consumers read."""
    see: dict[Any, list[See]] = {}
    for item, consumer in seeing:
        see.setdefault(consumer.node, []).append(partial(item.see, consumer, samples_of((args, kwargs))))
    mode = Watch(model, graph, see, label) if seeing else None
    try:
        with contextlib.ExitStack() as stack:
            if mode is not None:
                for entered in (mode.stack, looking_inside_functional(), mode, OneOp(mode)):
                    stack.enter_context(entered)
            output = output_of(model, args, kwargs)
        if mode is not None:
            mode.finish()
    except SurgeonError:
        raise
    except Exception as error:  # the model's own code: all of it is reported
        fix = "let data yield what the model takes; if it yields pairs (inputs, targets), pass loss=... too"
        raise does_not_run(error, label, (args, kwargs), fix) from error
    return output


def _loss_of(
    output: Any, targets: Any, loss: Loss | None, stand_in: Callable[..., Tensor], graph: Graph, label: str
) -> Tensor:
    compute = (
        partial(stand_in, output, graph.named or None) if loss is None else partial(loss, output, targets)
    )
    value = one_number(compute, label)
    if not math.isfinite(value.item()):
        raise InputError(
            f"the loss of {label} is {value.item()}",
            why="the inputs, the targets or the weights are out of range",
            fix="leave this batch out, or repair the loss",
        )
    return value


def _backward(
    value: Tensor, gradients: Mapping[str, Gradients], statistics: Sequence[Statistics], label: str
) -> None:
    """Add this batch's gradients to the sums; `.grad` is not touched."""
    held = [item for item in statistics if item.edges]
    learning = [g for g in gradients.values() if g.wanted]
    wanted: list[Any] = [g.tensor for g in learning] + [edge for item in held for edge in item.edges]
    try:
        found = torch.autograd.grad(value, wanted, allow_unused=True)
    except RuntimeError as error:
        raise InputError(
            f"no gradient can be computed on {label}: {error}",
            why="an op of the model has no backward, or changes in place what another one needs",
            fix="use a criterion without gradients",
        ) from error
    if any(
        g is not None and not bool(torch.isfinite(g.sum())) and not bool(torch.isfinite(g).all())
        for g in found
    ):
        raise InputError(
            f"a gradient of {label} is NaN or infinite",
            fix="leave this batch out, or look for a division by zero",
        )
    for sums, gradient in zip(learning, found, strict=False):
        sums.add(gradient)
    rest = iter(found[len(learning) :])
    for item in held:
        item.add_gradients([next(rest) for _ in item.edges])


@contextlib.contextmanager
def _untouched(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Parameters that take gradients, and buffers that forward may write to, put back afterwards."""
    flags = [(p, p.requires_grad) for p in parameters]
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def _progress(data: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """The data, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        total = len(data) if isinstance(data, Sized) else None
        yield bar.track(data, total=total, description="calibrating")
