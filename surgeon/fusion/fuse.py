"""fuse(model in eval mode) -> a deep copy whose layers have taken in the ops next to them; it computes the
same.

Folds are found on the recorded graph, not in the order of modules(), and made in rounds until there are none:

    conv-bn, linear-bn              a batch norm after a convolution, transposed convolution or linear layer
    conv-scale, linear-shift, ...   a factor or summand that is constant per channel (layer scale, frozen
    norms) after one bn-conv, bn-linear, scale-...   the same before one, where no zero padding comes between
    linear-linear, conv-conv        two layers without an activation between them, where one needs fewer MACs
    parallel                        convolutions of one input that are summed, with its batch norm or itself
    (RepVGG) dropout                         modules that do nothing in eval mode

Each is exact: it is computed in float64 and rounded once to the dtype of the weight. Whatever does not match
is left alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.capture.capture import capture
from surgeon.capture.model_state import output_of, quiet_run
from surgeon.cut.carried import PLANS, plan_texts
from surgeon.cut.plan import Plan
from surgeon.errors import CaptureError, FuseError
from surgeon.fusion import constants, products
from surgeon.fusion.fold import Fold, Foldable, counted, set_module
from surgeon.fusion.forward import DROPOUTS
from surgeon.graph.copying.model_copy import copied
from surgeon.graph.given import MODEL, check_given
from surgeon.graph.graph import Graph
from surgeon.graph.process import plain_torch
from surgeon.graph.tensors import tensor_leaves

_RULES = (
    constants.after,
    products.branches,
    products.chains,
    constants.before,
)  # in this order: the first one takes an op
_ROUNDING = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
}  # of the largest output, through all layers; for lower precision:
_LOW_ROUNDING = 0.1
_ON_MODEL = "_surgeon_folds"
_CUT_BY = "_surgeon_cut_by"


@dataclasses.dataclass(frozen=True)
class Folded:
    """What was folded, in the order in which it was done.

    Attributes:
        kind: see the module.
        layer: path of the layer that took it in; "" for a dropout.
        gone: what left: a path, or an op and the path of the module that ran it.
    """

    kind: str
    layer: str
    gone: str


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """All folds of a fused model; `str` gives the counts."""

    folds: tuple[Folded, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Folds of each kind, the most frequent first."""
        return dict(Counter(fold.kind for fold in self.folds).most_common())

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items()) or "nothing to fold"


@plain_torch()
def fuse(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A deep copy of `model` in which every exact fold is made; see `folds` for the list of them.

    Folded modules become `nn.Identity`. An op that stands in the code of a forward is left out of it: that
    module becomes an instance of a subclass of its class that differs in `forward` alone. Constants that only
    such an op read stay where they are, unread. Left alone: layers that run more than once, are read by
    anything else, share a tensor, carry hooks or parametrizations, are subclasses, or are in training mode;
    norms without running statistics; code that torch.fx cannot trace.

    Args:
        model: a module in eval mode; it is not touched.
        example_inputs: as for `capture`; which folds exist may depend on them if the model's control flow
            does.

    Returns:
        A module of the same class for inference, in eval mode, with the same input and output shapes.

    Raises:
        FuseError: the model is in training mode, a folded weight does not fit its dtype, or the copy does not
            do what it should.
        CaptureError: the model does not run on the example inputs.
    """
    check_given("surgeon.fuse(model, example_inputs)", model=(model, MODEL))
    _check_eval(model)
    fused = _copied(model)
    graph = first = capture(fused, example_inputs)
    inputs = dict(graph.kwargs) or graph.args
    done: list[Folded] = []
    while found := _round(Foldable.of(fused, graph)):
        for fold in found:
            fold.make()
            done.append(Folded(fold.kind, fold.layer, fold.gone))
        graph = _check_gone(graph, fused, found, inputs)
    done += _without_dropout(fused)
    if done:
        _check_same(model, fused, first)
    fused.__dict__[_ON_MODEL] = FoldReport(tuple(done))
    return fused


def folds(fused: nn.Module) -> FoldReport | None:
    """What `fuse` folded in the model that it gave, or in a copy of it; None for any other model."""
    found: FoldReport | None = fused.__dict__.get(_ON_MODEL)
    return found


def plans_of(model: nn.Module) -> tuple[Plan, ...]:
    """The plans that cut a model, or the model that it was fused from; () if it was not cut."""
    texts = plan_texts(model) or model.__dict__.get(_CUT_BY, ())
    return tuple(Plan.from_json(text, type(model).__name__) for text in texts)


def fusable_pairs(model: nn.Module, example_inputs: Any = None) -> list[tuple[str, str]]:
    """The (layer path, batch-norm path) of each pair in which the norm directly follows its layer, in the
    order of the run.

    Args:
        model, example_inputs: as for `fuse`.

    Raises:
        FuseError: the model is in training mode.
        CaptureError: the model does not run on the example inputs.
    """
    _check_eval(model)
    site = Foldable.of(model, capture(model, example_inputs))
    return [(fold.layer, fold.gone) for fold in constants.after(site) if fold.kind.endswith("-bn")]


def _check_eval(model: Any) -> None:
    if isinstance(model, nn.Module) and model.training:
        raise FuseError(
            "a model in training mode cannot be fused",
            where=type(model).__name__,
            why="in training a batch norm uses the statistics of each batch, which no fixed weight can hold",
            fix="call model.eval() first",
        )
    if isinstance(model, nn.Module) and any(p.is_meta for p in model.parameters()):
        raise FuseError(
            "a model on the meta device cannot be fused", where=type(model).__name__, why="its weights have no values",
            fix="load the weights first",
        )  # fmt: skip


def _copied(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):  # capture refuses it
        return model
    fused = copied(model)
    fused.__dict__[_CUT_BY] = plan_texts(model)
    fused.__dict__.pop(PLANS, None)  # they make the unfused model
    return fused


def _round(site: Foldable) -> list[Fold]:
    """Folds that share no op; what they leave may be folded in the next round."""
    found: list[Fold] = []
    used: set[Any] = set()
    for rule in _RULES:
        for fold in rule(site):
            if not used & fold.changes:
                used |= fold.changes
                found.append(fold)
    return found


def _without_dropout(fused: nn.Module) -> list[Folded]:
    """Dropouts do nothing in eval mode; they may not wake up either."""
    paths = [
        path
        for path, module in fused.named_modules()
        if path and type(module) in DROPOUTS and not module.training
    ]
    for path in paths:
        set_module(fused, path, nn.Identity().eval())
    return [Folded("dropout", "", path) for path in paths]


def _check_gone(graph: Graph, fused: nn.Module, found: list[Fold], inputs: Any) -> Graph:
    """The graph of the changed copy, which lacks just the ops that were folded.

    Raises:
        FuseError: it reaches a folded module other than by its path (a plain list of modules), or reads its
            attributes.
    """
    due = sum((fold.removes for fold in found), Counter[str]())
    try:
        after = capture(fused, inputs)
    except CaptureError as error:
        why = f"forward uses a folded module as more than a function: {error.what}"
    else:
        gone = counted(graph)
        gone.subtract(counted(after))
        if all(gone[family] == due[family] for family in {*gone, *due}):
            return after
        pairs = ", ".join(f"{count} of kind {kind}" for kind, count in due.items())
        left = ", ".join(f"{gone[kind]} {kind}" for kind in due)
        why = f"{pairs} were folded but {left} left the graph: forward holds some of them outside the module tree"
    raise FuseError(
        "this model cannot be fused exactly",
        where=type(fused).__name__,
        why=why,
        fix="register the layers as submodules and call them by name, or go on without fuse(...)",
    )


def _check_same(model: nn.Module, fused: nn.Module, graph: Graph) -> None:
    """Compare the floating-point outputs on the example inputs; where decisions hang on last bits they cannot
    be compared.

    Raises:
        FuseError: they differ by more than rounding explains.
    """
    if any("decision" in node.meta for node in graph.fx.nodes):
        return
    outputs = []
    for module in (model, fused):
        with quiet_run(module, seed=0):
            outputs.append(list(tensor_leaves(output_of(module, graph.args, graph.kwargs))))
    for (path, expected), (_, found) in zip(*outputs, strict=True):
        if not expected.is_floating_point():
            continue
        limit = _ROUNDING.get(expected.dtype, _LOW_ROUNDING)
        gap = _gap(expected.detach().double(), found.detach().double())
        if not gap <= limit:
            raise FuseError(
                f"the fused model computes something else: output differs by {gap:.1e} (at most {limit:.0e} is allowed)",
                where=f"output '{path}'",
                why="forward does what a run does not show, or the weights are too large for their dtype",
                fix="call model.double() and fuse that, or go on without fuse(...)",
            )


def _gap(expected: Tensor, found: Tensor) -> float:
    """Largest difference as a share of the largest value, of finite values; the others have to be in the same
    places.
    """
    if expected.shape != found.shape or not torch.equal(expected.isfinite(), found.isfinite()):
        return float("inf")
    expected, found = expected[expected.isfinite()], found[found.isfinite()]
    if not expected.numel():
        return 0.0
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))
