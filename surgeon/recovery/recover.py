"""recover(small, plan, model, batches): win accuracy back without labels, from a few hundred samples."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.capture.batches import normal, samples_of
from surgeon.capture.capture import capture
from surgeon.cut.plan import PLAN, Plan, check_roles
from surgeon.errors import InputError
from surgeon.graph.copying.model_copy import copied
from surgeon.graph.given import MODEL, check_given
from surgeon.graph.process import plain_torch
from surgeon.graph.tensors import named_tensors
from surgeon.recovery.distill import Distilling
from surgeon.recovery.kept_entries import KeptEntries
from surgeon.recovery.layers import find_layers
from surgeon.recovery.layerwise import RIDGES, WIDEST, Fit, Fitting, Pass
from surgeon.recovery.neuron_merging import fold
from surgeon.recovery.norms import reestimate
from surgeon.recovery.options import DEFAULT, STRONGER, batches_of, check_made_by, check_options, split
from surgeon.recovery.row_sampling import RowSample
from surgeon.recovery.runs.recording import Progress, Recording


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: the distance of the outputs from the original's on held-out samples, before it and with it.

    Attributes:
        taken: whether it was kept: only what lowers the distance is.
        ridge: of all layers, where one for all did better than each layer's own choice; None where it did
            not.
        fits: what became of each layer.
        peak: bytes of the activations that were held at once, at most.
    """

    name: str
    before: float
    after: float
    fits: tuple[Fit, ...] = ()
    peak: int = 0
    ridge: float | None = None

    @property
    def taken(self) -> bool:
        """Whether the step brought the outputs nearer on held-out samples, so that it was kept."""
        return self.after < self.before


@dataclasses.dataclass(frozen=True)
class Recovery:
    """The recovered model, and what each step did; printable.

    Attributes:
        model: a copy of the small model with other weights.
        before, after: relative distance of its outputs from the original's on held-out samples (root mean
            square), in all.
        learned, held: samples that were learned from, and that judged.
        remarks: what was found wanting.
    """

    model: nn.Module
    steps: tuple[Step, ...]
    before: float
    after: float
    learned: int
    held: int
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.held:
            return "\n".join(["Recovery", *(f"  {remark}" for remark in self.remarks)])
        judged = f"on {self.held} samples that were held out of {self.learned + self.held}"
        lines = [
            f"Recovery: outputs {self.before:.2%} -> {self.after:.2%} away from the original's, {judged}"
        ]
        for step in self.steps:
            what = f"{step.before:.2%} -> {step.after:.2%}" + ("" if step.taken else ": not taken")
            fitted = sum(fit.taken for fit in step.fits)
            layers = f", {fitted} of {len(step.fits)} layers" if step.fits else ""
            ridge = f", all with ridge {step.ridge:g}" if step.ridge is not None else ""
            peak = f", {step.peak / 2**20:.0f} MiB of activations" if step.peak else ""
            lines.append(f"  {step.name}: {what}{layers}{ridge}{peak}")
        return "\n".join([*lines, *(f"  {remark}" for remark in self.remarks)])


@plain_torch()
def recover(
    small: nn.Module,
    plan: Plan,
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    steps: Sequence[str] | None = None,
    held_out: float = 0.15,
    ridges: Sequence[float] | None = None,
    widest: int = WIDEST,
    epochs: int | None = None,
    rate: float | None = None,
    seed: int = 0,
) -> Recovery:
    """Set the small model's weights so that its layers give what the original's give; no labels.

    Both models run side by side, layer by layer, over all batches. Each layer's input comes from the small
    model as it is by then, its target from the original, at the sum with the residual stream where there is
    one; so errors do not pile up.

    Args:
        small: what the plan made of the model; it is not touched.
        model: the original.
        batches: of inputs as the model takes them, without targets; some hundred to some thousand samples in
            all. Two or more batches of one shape are best: the last ones are held out. None: what left is
            folded into the channels that are most like it, by their filters alone (Kim et al., Neuron
            Merging, 2020); nothing judges then.
        example_inputs: without batches, for the run that is recorded; found from the model if left out, as in
            `inspect`.
        steps: ("refit", "batch_norm") if left out; in this order, of
            "refit": the affine map of least squares for every convolution and linear layer (normal equations
            in float64 over sampled rows that weigh as the outputs feel them; He et al., Channel Pruning,
            2017; Luo et al., ThiNet, 2017), ridged towards the weights as cut;
            "means": only the constants (An et al., FLAP, 2024);
            "variance": constant and scale of every output, so that mean and variance are the original's
            (Jordan et al., REPAIR, 2023);
            "batch_norm": mean and variance of every batch norm's input anew, each with those before it set;
            "distill": gradient steps on all weights at once, towards the original's outputs and residual
            stream. Batches of about 32 samples are best: each is a step.
        held_out: share of the samples that is not learned from, in whole batches. It judges: each layer's new
            weights, each ridge, and each whole step; what does not lower the distance to the original is not
            taken.
        ridges: candidates of each layer, relative to the mean square of its inputs. None: three weak ones;
            then stronger ones for all layers at once, in passes of their own, as long as the outputs gain.
        widest: convolutions with more unknowns per output (input channels x taps) get one map of channels for
            all taps; other layers with more, and those with more channels, are left as cut.
        epochs: of "distill": passes over the batches, of which the best counts. None: 10, or as many as make
            600 steps.
        rate: of "distill": the share of its root mean square by which a step changes a tensor, at first.
            None: 0.01.
        seed: of the sampled rows, and of the order of the batches.

    Returns:
        A `Recovery`, with the new model in `.model`.

    Raises:
        InputError: no batches, too many, or some that do not run, take another path or give NaN (the first
            layer is named); batches and example inputs at once; steps without batches, options of a step that
            is not among them; the small model is not what the plan makes of the model; the model gives no
            numbers to compare; "distill" finds no gradients.
        PlanError: the plan does not fit the model.
    """
    check_given(
        "surgeon.recover(small, plan, model, batches)",
        small=(small, MODEL),
        plan=(plan, PLAN),
        model=(model, MODEL),
    )
    check_roles(plan, model, small)
    options = {"steps": steps, "ridges": ridges, "epochs": epochs, "rate": rate}
    given = [name for name, value in options.items() if value is not None]
    if batches is None and given:
        raise InputError(
            f"{given[0]} needs samples", why="without any, what left is folded", fix="pass batches of inputs"
        )
    steps = DEFAULT if steps is None else steps
    check_options(steps, held_out, ridges, epochs, rate)
    if batches is not None and example_inputs is not None:
        raise InputError(
            "got batches and example_inputs",
            fix="leave example_inputs out: the first batch is what is recorded",
        )
    check_made_by(plan, small, model)
    recovered = copied(small)
    if batches is None:
        return _folded(recovered, plan, model, example_inputs)
    read = [normal(batch, f"batch {number}") for number, batch in enumerate(batches_of(batches), 1)]
    remarks = (
        [f"a single batch: its samples were split, {held_out:.0%} of them judge"] if len(read) == 1 else []
    )
    parts, held = split(read, held_out)
    recording = Recording(model, recovered, parts, held)
    kept_entries = KeptEntries(recording.big, plan)
    now = first = recording.distance()
    done = []
    with _progress() as track:
        sample = (
            RowSample(recording, kept_entries, track, seed)
            if set(steps) - {"batch_norm", "distill"}
            else None
        )
        for name in steps:
            before, ridge = _state(recovered), None
            if name == "batch_norm":
                found = reestimate(recording, track)
            elif name == "distill":
                found = Distilling(recording, kept_entries, epochs=epochs, rate=rate, seed=seed).run(track)
            else:
                assert sample is not None
                fitting = partial(Fitting, recording, kept_entries, sample, name, widest)
                if name == "refit" and ridges is None:
                    found, ridge = _refitted(fitting, recovered, track)
                else:
                    found = fitting(ridges or RIDGES).run(track)
            step = Step(name, now, found.distance, tuple(found.fits), found.peak, ridge)
            done.append(step)
            if step.taken:
                now = step.after
            else:
                _restore(recovered, before)
    remarks += [sample.remark] if sample is not None and sample.remark else []
    thin = sorted({fit.name for step in done for fit in step.fits if 0 < fit.rows < fit.unknowns})
    if thin:
        remarks.append(
            f"{len(thin)} layers have fewer rows than unknowns ({thin[0]} for one): their statistics are rank-deficient, and "
            "what the data do not show stays as it was cut; pass more batches"
        )
    counts = [samples_of(batch) for batch in parts]
    judged = sum(itertools.compress(counts, held))
    return Recovery(recovered, tuple(done), first, now, sum(counts) - judged, judged, tuple(remarks))


def _refitted(
    fitting: Callable[[Sequence[float]], Fitting], recovered: nn.Module, track: Progress
) -> tuple[Pass, float | None]:
    """A pass in which each layer chooses its ridge; or, where the outputs say that it is better, one with the
    same for all.

    A layer's rows do not show by how few samples its weights were found: those of one sample have much in
    common, what they share is a small part of a layer's error, and it is what pooled outputs see.
    """
    before = _state(recovered)
    best, chosen = fitting(RIDGES).run(track), None
    for ridge in STRONGER:
        kept = _state(recovered)
        _restore(recovered, before)
        found = fitting((ridge,)).run(track)
        if found.distance >= best.distance:
            _restore(recovered, kept)
            break
        best, chosen = found, ridge
    return best, chosen


def _folded(recovered: nn.Module, plan: Plan, model: nn.Module, example_inputs: Any) -> Recovery:
    big = capture(model, example_inputs)
    small = capture(recovered, dict(big.kwargs) or big.args)
    layers, _ = find_layers(small, big)
    fits = tuple(Fit(name) for name in fold(layers, KeptEntries(big, plan), big, small.tensors))
    remark = f"no batches: what left was folded into {len(fits)} layers, and nothing judged it"
    return Recovery(recovered, (Step("fold", math.nan, math.nan, fits),), math.nan, math.nan, 0, 0, (remark,))


def _state(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(tensor, tensor.detach().clone()) for _, tensor in named_tensors(model)]


@torch.no_grad()
def _restore(model: nn.Module, state: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in state:
        tensor.copy_(value)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Shows what is walked through, on a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    with progress.Progress(console=console, transient=True, disable=not console.is_terminal) as bar:

        def show(items: Iterable[Any], what: str) -> Iterable[Any]:
            return bar.track(list(items), description=what)

        yield show
