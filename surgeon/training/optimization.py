"""What a step of training does beside its gradients: rates over the steps, clipping, an average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from surgeon.errors import InputError

Schedule = Callable[[int], float]


def cosine(steps: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """From 1 down to `final` along half a cosine (Loshchilov and Hutter, SGDR, 2017), after a linear warm-up.

    Args:
        steps: in all, warm-up included. Step 0 is the first one; from step `steps` on the factor is `final`.
        warmup: steps on the way up: (step + 1) / (warmup + 1).
        final: factor at the end, in [0, 1].

    Raises:
        InputError: steps, warmup or final is out of range.
    """
    _check_steps(steps, warmup)
    if not 0 <= final <= 1:
        raise InputError(f"final must be in [0, 1], got {final!r}")
    return _warmed(warmup, lambda t: final + (1 - final) * (1 + math.cos(math.pi * t)) / 2, steps)


def step(steps: int, warmup: int = 0, at: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> Schedule:
    """Times `factor` at each share `at` of the way after the warm-up.

    Raises:
        InputError: steps, warmup, at or factor is out of range.
    """
    _check_steps(steps, warmup)
    if not all(0 < share < 1 for share in at) or not 0 < factor <= 1:
        raise InputError(f"shares {tuple(at)} must be in (0, 1) and factor {factor!r} in (0, 1]")
    return _warmed(warmup, lambda t: factor ** sum(t >= share for share in at), steps)


def constant(steps: int, warmup: int = 0) -> Schedule:
    """1 all along, after a linear warm-up.

    Raises:
        InputError: steps or warmup is out of range.
    """
    _check_steps(steps, warmup)
    return _warmed(warmup, lambda t: 1.0, steps)


SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = {
    "cosine": cosine,
    "step": step,
    "constant": constant,
}


def _warmed(warmup: int, rule: Callable[[float], float], steps: int) -> Schedule:
    """`rule` of the share of the way in [0, 1] that lies behind, after the warm-up."""

    def factor(number: int) -> float:
        if number < warmup:
            return (number + 1) / (warmup + 1)
        return rule(min(1.0, (number - warmup) / (steps - warmup)))

    return factor


def _check_steps(steps: int, warmup: int) -> None:
    if steps < 1 or not 0 <= warmup < steps:
        raise InputError(
            f"{warmup} of {steps} steps cannot be warm-up",
            fix="warm up for fewer steps than there are in all",
        )


Clip: TypeAlias = tuple[str, float] | Callable[[list[nn.Parameter]], object]


def clip_norm(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale all gradients together, so that their joint L2 norm is at most `limit`."""
    nn.utils.clip_grad_norm_(parameters, limit)


def clip_value(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clamp every entry of every gradient to [-limit, limit]."""
    nn.utils.clip_grad_value_(parameters, limit)


@torch.no_grad()
def clip_adaptive(parameters: Iterable[nn.Parameter], limit: float = 0.01, least: float = 1e-3) -> None:
    """Scale the gradient g of each unit with weights w, so that |g| <= limit * max(|w|, least), in L2 norms.

    A unit is one index of dim 0 of a weight, and a whole vector (bias, scale). (Brock et al.,
    High-Performance Large-Scale Image Recognition Without Normalization, 2021, who leave the classifier's
    weights out: so pass the others.)
    """
    for parameter in parameters:
        if parameter.grad is not None:
            limits = _unit_norms(parameter).clamp_min(least) * limit
            norms = _unit_norms(parameter.grad)
            parameter.grad.mul_(
                torch.where(norms > limits, limits / norms.clamp_min(1e-30), torch.ones_like(norms))
            )


CLIPS: Mapping[str, Callable[[list[nn.Parameter], float], None]] = {
    "norm": clip_norm, "value": clip_value, "adaptive": clip_adaptive,
}  # fmt: skip


def clipper(clip: Clip | None) -> Callable[[list[nn.Parameter]], object] | None:
    """What to call with the parameters.

    Raises:
        InputError: the kind is unknown, or the limit is no positive number.
    """
    if clip is None or callable(clip):
        return clip
    if not isinstance(clip, tuple) or len(clip) != 2 or clip[0] not in CLIPS:
        known = ", ".join(f"({name!r}, limit)" for name in CLIPS)
        raise InputError(
            f"unknown clip={clip!r}", fix=f"use one of {known}, or a callable (parameters) -> None"
        )
    kind, limit = clip
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise InputError(f"the limit of clip={clip!r} is no positive number")
    return lambda parameters: CLIPS[kind](parameters, limit)


def _unit_norms(tensor: Tensor) -> Tensor:
    """Norms over all dims but the first, or of a whole vector, in a shape that broadcasts."""
    dims = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=dims is not None)
    return norms


class Average:
    """After step t: average = d * average + (1 - d) * value with d = min(decay, (1 + t) / (10 + t)), t = 1,
    2, ...

    The first steps count more, so that the start fades. Tensors that are not floating-point take the last
    value.

    Raises:
        InputError: decay is outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"the decay of a moving average must be in [0, 1), got {decay!r}")
        self.decay, self.steps = decay, 0
        self.values = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's values, after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.values[name].lerp_(tensor, 1 - decay)
            else:
                self.values[name].copy_(tensor)

    @contextlib.contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average inside the block, and its own values again after it."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.values)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """The averages and the number of updates."""
        return {"steps": self.steps, "values": self.values}

    def load_state_dict(self, state: dict[str, int | dict[str, Tensor]]) -> None:
        """Restore what `state_dict` gave."""
        steps, values = state["steps"], state["values"]
        assert isinstance(steps, int) and isinstance(values, dict)
        self.steps = steps
        for name, tensor in values.items():
            self.values[name].copy_(tensor)
