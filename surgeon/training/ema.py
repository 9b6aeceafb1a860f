"""Average: an exponential moving average of a model's weights and buffers; often better than the last weights
(Polyak averaging)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from surgeon.errors import InputError


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
