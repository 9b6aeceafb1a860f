"""Distilling: gradient steps on the calibration batches, towards what the original gives on them; no labels.

Least squares solves for one layer at a time, and every channel that is left has to be what it was. Steps on
all weights at once let the layers agree on other channels. The loss of a batch is the squared distance of the
small model's outputs from the original's, relative to theirs, plus the mean of the same of the residual
stream, after each sum that a layer's result goes into (of each layer's result, where nothing is added up), on
the channels that are left. The recorded runs are in eval mode: batch norms keep their statistics, nothing is
dropped. (Hinton et al., 2015; Romero et al., FitNets, 2015.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from surgeon.errors import InputError
from surgeon.graph.queries import read_tensors
from surgeon.recovery.kept_entries import KeptEntries
from surgeon.recovery.layers import find_layers
from surgeon.recovery.layerwise import Pass
from surgeon.recovery.runs.paired_run import twin
from surgeon.recovery.runs.recording import Pair, Progress, Recording, distance, nothing_to_compare, outputs

_EPOCHS, _STEPS = 10, 600  # at least
_RATE = 0.01
_STREAM = 90.0  # weight of the residual stream
_WARMUP = 0.05  # of the steps
_LEAST = 1e-3  # root mean square that a tensor is taken to have at least
_TINY = 1e-30
_MUON = 0.2  # root mean square of a step of rate 1


class Distilling:
    """Trains the weights that the run reads.

    Args:
        epochs: passes over the batches, a step for each batch; None: 10, or as many as make 600 steps. The
            weights after the best of them, by the held-out batches, stay.
        rate: share of its root mean square by which a step changes a tensor, at first; None: 0.01. It falls
            to zero along a cosine.
    """

    def __init__(
        self,
        recording: Recording,
        kept_entries: KeptEntries,
        *,
        epochs: int | None,
        rate: float | None,
        seed: int,
    ) -> None:
        self.recording, self.kept_entries, self.seed = recording, kept_entries, seed
        self.learned = [number for number, held in enumerate(recording.held) if not held]
        self.epochs = max(_EPOCHS, math.ceil(_STEPS / len(self.learned))) if epochs is None else epochs
        self.first = recording.pair(0)
        layers, _ = find_layers(recording.small, recording.big)
        self.stream = [layer for layer in layers if layer.sum is not None] or list(layers)
        small = recording.small
        read = (name for name in sorted(read_tensors(small) & small.owned))
        learns = {
            n: t for n in read if isinstance(t := small.tensors[n], nn.Parameter) and t.is_floating_point()
        }
        products = {layer.weight.name for layer in layers if layer.ungrouped}
        self.leaves = {n: _wide(t.detach()).clone() for n, t in learns.items()}
        for name in products:
            self.leaves[name] = self.leaves[name].flatten(1)
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self.optimizers = _optimizers(self.leaves, products, _RATE if rate is None else rate)

    def run(self, track: Progress) -> Pass:
        """Take the steps, and give the small model the best weights.

        Raises:
            InputError: no gradient can be computed, or a batch has nothing to compare.
        """
        best, weights, peak = self._descended(track)
        with torch.no_grad():
            for name, value in weights.items():
                self.recording.small.tensors[name].copy_(value)
        return Pass([], best, peak)

    @torch.enable_grad()
    def _descended(self, track: Progress) -> tuple[float, dict[str, Tensor], int]:
        """The least distance on held-out batches, the weights then, and the most bytes that a step held."""
        factor = _cosine(self.epochs * len(self.learned))
        schedules = [LambdaLR(optimizer, factor) for optimizer in self.optimizers]
        generator = torch.Generator().manual_seed(self.seed)
        best, kept, peak = self._distance(), self._copied(), 0
        for _ in track(range(self.epochs), "distill"):
            for place in torch.randperm(len(self.learned), generator=generator).tolist():
                held = _Held()
                try:
                    with torch.autograd.graph.saved_tensors_hooks(held.keep, lambda tensor: tensor):
                        loss = self.loss(self.recording.pair(self.learned[place]))
                    for optimizer in self.optimizers:
                        optimizer.zero_grad()
                    loss.backward()
                except RuntimeError as error:
                    raise InputError(
                        f"the step 'distill' found no gradients: {str(error).splitlines()[0]}",
                        fix="leave 'distill' out of steps; if memory is short, pass smaller batches",
                    ) from error
                peak = max(peak, held.bytes)
                if not math.isfinite(float(loss.detach())):
                    return best, kept, peak
                for optimizer, schedule in zip(self.optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
            now = self._distance()
            if now < best:
                best, kept = now, self._copied()
        return best, kept, peak

    def loss(self, pair: Pair) -> Tensor:
        """Of one batch, with the weights as they are by now; what has other rows in a run that takes
        decisions is left out.

        Raises:
            InputError: everything is.
        """
        pair.small.weights = self._weights()
        theirs, ours = [], []
        for layer in self.stream:
            theirs.append(twin(layer.target, self.first.big, pair.big))
            ours.append(twin(layer.node if layer.sum is None else layer.sum, self.first.small, pair.small))
        with torch.no_grad():
            for node in theirs:
                pair.big.pin(node)
            pair.big.finish()
            wanted = [
                self.kept_entries(layer.target, pair.big.value(node))
                for layer, node in zip(self.stream, theirs, strict=True)
            ]
        for node in ours:
            pair.small.pin(node)
        given = [(_wide(want), _wide(got)) for want, got in outputs(pair)]
        terms = [_relative(*(torch.cat(side) for side in zip(*given, strict=True)))] if given else []
        streams = [(want, pair.small.value(node)) for want, node in zip(wanted, ours, strict=True)]
        inner = [_relative(want, got) for want, got in streams if want.shape == got.shape]
        if inner:
            terms.append(_STREAM * torch.stack(inner).mean())
        if not terms:
            raise nothing_to_compare(pair.small.label)
        return torch.stack(terms).sum()

    @torch.no_grad()
    def _distance(self) -> float:
        pairs = [self.recording.pair(number) for number, held in enumerate(self.recording.held) if held]
        for pair in pairs:
            pair.small.weights = self._weights()
        return distance(pairs)

    def _weights(self) -> dict[str, Tensor]:
        tensors = self.recording.small.tensors
        return {
            name: leaf.view(tensors[name].shape).to(tensors[name].dtype) for name, leaf in self.leaves.items()
        }

    def _copied(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._weights().items()}


class _Held:
    """Bytes of what a run keeps for its gradients."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())


def _relative(wanted: Tensor, given: Tensor) -> Tensor:
    """Squared distance, relative."""
    return (_wide(given) - _wide(wanted)).square().sum() / _wide(wanted).square().sum().clamp(min=_TINY)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: neither small steps nor sums of squares fit in less."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _optimizers(leaves: dict[str, Tensor], products: set[str], rate: float) -> list[Optimizer]:
    """Muon for the matrices of products (Jordan et al., 2024), Adam for all else; every rate is relative to
    the tensor's size.
    """
    groups: dict[bool, list[dict[str, object]]] = {False: [], True: []}
    for name, leaf in leaves.items():
        size = max(float(leaf.detach().square().mean().sqrt()), _LEAST)
        groups[name in products].append(
            {"params": [leaf], "lr": rate * size / (_MUON if name in products else 1)}
        )
    found: list[Optimizer] = [torch.optim.Adam(groups[False])] if groups[False] else []
    if groups[True]:
        found.append(torch.optim.Muon(groups[True], weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return found


def _cosine(steps: int) -> Callable[[int], float]:
    """From one to zero, after a short linear rise."""
    return lambda step: min(1.0, (step + 1) / (_WARMUP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
