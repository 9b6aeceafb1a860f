"""record_runs(model, example inputs) -> `Runs`: all runs of a model that are to be tied, mended and proved together.

Of each call: a run in eval mode and one in training mode; and where the code asks about global modes, one that is
told otherwise. Runs that add nothing to those before them are left out. What was not seen is said.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree
from torch import nn

from surgeon.capture.capture import capture
from surgeon.capture.inputs import calls_of
from surgeon.capture.paths.decisions import without_entries
from surgeon.capture.paths.repeated_run import repeats
from surgeon.capture.paths.same_run import adds_nothing, gives_the_same
from surgeon.capture.rebuilt_state import rebuilt
from surgeon.errors import CaptureError, InputError
from surgeon.graph.check_model import check_model
from surgeon.graph.graph import Graph
from surgeon.graph.messages import source_line
from surgeon.graph.module_tree import named_registered
from surgeon.graph.nests import map_tensors
from surgeon.graph.queries import read_tensors


@dataclasses.dataclass(frozen=True)
class Runs:
    """What was recorded.

    Attributes:
        graphs: the runs; the first one is the first call in eval mode.
        unseen: paths through the code that could not be recorded, a sentence each.
        remarks: what else is worth saying.
    """

    graphs: tuple[Graph, ...]
    unseen: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def record_runs(
    model: nn.Module, example_inputs: Any = None, *, outputs: Sequence[str] | None = None
) -> Runs:
    """Record what is to be seen of a model.

    Args:
        example_inputs: a tensor, a tuple (positional) or a dict (keywords); or several calls, see `calls_of`.
        outputs: names of the outputs that count, see `capture`.

    Raises:
        InputError, CaptureError: see `capture`.
    """
    check_model(model)
    calls = calls_of(model, example_inputs)
    try:
        graphs = [capture(model, given, outputs=outputs) for given in calls]
    except CaptureError as error:
        better = _of_wrapper(model, error)
        if better is None:
            raise
        raise better from error
    if len(calls) > 1:
        graphs = [dataclasses.replace(graph, number=number) for number, graph in enumerate(graphs, 1)]
    runs = further_runs(model, graphs)
    if type(example_inputs) is list and len(example_inputs) > 1 == len(calls):
        said = "a list as example_inputs was taken for the positional arguments of one call; surgeon.Calls holds several"
        runs = dataclasses.replace(runs, remarks=(said, *runs.remarks))
    return runs


def _of_wrapper(model: nn.Module, error: CaptureError) -> CaptureError | None:
    """The error with better advice, if the model is an interface: it has a `train` of its own and holds one module."""
    parts = {name: part for name, part in model._modules.items() if part is not None}
    if type(model).train is nn.Module.train or len(parts) != 1:
        return None
    ((name, part),) = parts.items()
    fix = f"pass its part {name} ({type(part).__name__}), which is the model itself"
    why = f"{type(model).__name__} has a train() of its own, as interfaces around a model have"
    return CaptureError(error.what, where=error.where, why=error.why or why, fix=fix)


def further_runs(model: nn.Module, calls: Sequence[Graph]) -> Runs:
    """What else is to be seen of a model of which these calls were recorded in eval mode."""
    graphs, unseen = list(calls), list[str]()
    for run in calls:
        unseen += without_entries(run)
        unseen += _further(model, run, graphs)
    state = rebuilt(model, graphs)
    graphs = [dataclasses.replace(graph, rebuilt=state) for graph in graphs]
    return Runs(tuple(graphs), tuple(dict.fromkeys(unseen)), (*_told(graphs), *_unused(model, graphs)))


def _further(model: nn.Module, run: Graph, graphs: list[Graph]) -> Iterator[str]:
    """Add the other runs of a call that show something new; what could not be seen."""
    seen = [run]
    try:
        same = not run.by_mode or repeats(model, run, training=True)
        training = None if same else _in_training(model, run)
    except CaptureError as error:
        yield f"in training mode the model does not run on these inputs, so that only eval mode was seen ({error.what})"
    else:
        if training is not None and not adds_nothing(training, graphs):
            graphs.append(training)
            seen.append(training)
    for base in seen:
        yield from _told_otherwise(model, base, graphs)


def _in_training(model: nn.Module, run: Graph) -> Graph:
    """A run in training mode; on twice the batch where batch norms refuse a batch of one.

    Raises:
        CaptureError: the model does not run so; it may need targets.
    """
    try:
        return _again(model, run, (run.args, run.kwargs), training=True)
    except CaptureError as error:
        twice = map_tensors((run.args, run.kwargs), lambda t: torch.cat([t, t]) if t.dim() else t)
        try:
            return _again(model, run, twice, training=True)
        except CaptureError:
            raise error from None


def _again(model: nn.Module, run: Graph, given: Any, **how: Any) -> Graph:
    args, kwargs = given
    inputs = kwargs if kwargs else args
    try:
        graph = capture(model, inputs, outputs=run.named or None, **how)
    except InputError:  # it gives other outputs so: all count
        graph = capture(model, inputs, **how)
    return dataclasses.replace(graph, number=run.number)


def _told_otherwise(model: nn.Module, base: Graph, graphs: list[Graph]) -> Iterator[str]:
    """Runs in which the code is told the other answer about global modes that it asks about."""
    asked = {d.what: d for d in base.decisions if d.kind == "mode"}
    for name in [*asked]:
        answers = {name: asked[name].went != "True"}
        if repeats(model, base, training=base.training, answers=answers):
            del asked[name]
    if asked and base.results is None:
        base = _again(model, base, (base.args, base.kwargs), training=base.training, real=True)
    other = {name: decision.went != "True" for name, decision in asked.items()}
    if len(other) > 1 and _is_known(_with_answers(model, base, other), base, graphs):
        return
    for name, decision in asked.items():
        run = _with_answers(model, base, {name: other[name]})
        if isinstance(run, CaptureError):
            yield (
                f"the code asks {name}() at {source_line(decision.source)}: it was {decision.went}{base.label}; the other"
                f" path does not run here ({run.what})"
            )
        elif not _is_known(run, base, graphs):
            graphs.append(run)


def _with_answers(model: nn.Module, base: Graph, answers: Mapping[str, bool]) -> Graph | CaptureError:
    try:
        return _again(
            model, base, (base.args, base.kwargs), training=base.training, answers=answers, real=True
        )
    except CaptureError as error:
        return error


def _is_known(run: Graph | CaptureError, base: Graph, graphs: Sequence[Graph]) -> bool:
    """Whether a run shows nothing that the others do not, or computes the same in another way."""
    return isinstance(run, Graph) and (gives_the_same(run, base) or adds_nothing(run, graphs))


def _told(graphs: Sequence[Graph]) -> Iterator[str]:
    """Which modes were recorded both ways, because the code runs something else."""
    lines = {d.what: source_line(d.source) for graph in graphs for d in graph.decisions if d.kind == "mode"}
    for name, answer in dict.fromkeys(itertools.chain.from_iterable(graph.answers for graph in graphs)):
        yield f"the code asks {name}() at {lines[name]}: runs for False and True were recorded ({not answer} holds here)"


def _unused(model: nn.Module, graphs: Sequence[Graph]) -> Iterator[str]:
    seen = set().union(*map(read_tensors, graphs))
    unused = [name for name, _ in named_registered(model, "_parameters") if name not in seen]
    if unused:
        yield f"{len(unused)} parameters are not used by any run and keep their size, {unused[0]} for one"
