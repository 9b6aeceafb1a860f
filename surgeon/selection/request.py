"""Request: what the user asked for, checked: a ratio, or one or more budgets, and the options of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from surgeon.errors import InputError
from surgeon.selection.amounts import check_share, parse
from surgeon.selection.options import (
    BUDGETS,
    HEADS,
    OPTIONS,
    RUNTIMES,
    SCOPES,
    TARGETS,
    Budget,
    PlanOptions,
    Ratio,
    check_names,
)

_LARGEST = 1 << 31  # more than any tensor has channels
_MOST_THREADS = 1024
_UNSAID = ("criterion", "data", "loss", "ignore", "ignore_inputs", "runtime", "threads", "seed")


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for. Several budgets all hold.

    Attributes:
        ratio: share of channels to remove from every group, in [0, 1); or {name pattern: ratio}, of which the
            last that matches a group counts, and groups that none matches stay.
        options: all of them, with their defaults.
    """

    ratio: Ratio | None
    options: PlanOptions

    @staticmethod
    def of(ratio: Ratio | None = None, **options: Unpack[PlanOptions]) -> Request:
        """The request of these arguments; the other options have their defaults.

        Raises:
            InputError: an argument is out of range, unknown, or contradicts another.
        """
        check_names(options)
        defaults: Any = {name: option.default for name, option in OPTIONS.items()}
        request = Request(ratio, {**defaults, **options})
        request._check()
        return request

    def but(self, **options: Unpack[PlanOptions]) -> Request:
        """The same with other options."""
        merged: Any = {**self.options, **options}
        return Request.of(self.ratio, **merged)

    @property
    def budgets(self) -> dict[str, Budget]:
        given: Mapping[str, Any] = self.options
        return {name: given[name] for name in BUDGETS if given[name] is not None}

    @property
    def scope(self) -> str:
        return self.options["scope"] or ("knapsack" if self.budgets else "uniform")

    @property
    def said(self) -> dict[str, Any]:
        """What a plan says of it: plain data."""
        named = {
            k: v for k, v in self.options.items() if k not in _UNSAID and v is not None and v is not False
        }
        if self.ratio is not None:
            named["ratio"] = dict(self.ratio) if isinstance(self.ratio, Mapping) else self.ratio
        return {**named, "scope": self.scope, "criterion": _name(self.options["criterion"])}

    def block(self, device: str) -> int:
        """What kept widths are multiples of, for weights on this type of device.

        "auto" is 16 on CPUs with AVX-512 and 8 on others (the blocks of ONNX Runtime's and oneDNN's
        convolutions), 8 on GPUs (tensor cores), and 16 where nothing is known (the meta device).
        """
        asked = self.options["round_to"]
        if not isinstance(asked, str):
            return asked
        target = device if asked == "auto" else asked
        if target == "cpu":
            return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
        return TARGETS.get(target, 16)

    def limit(self, kind: str, full: float) -> float:
        """The budget of this kind in its own unit; `full` is what the original costs."""
        amount, shared = parse(kind, self.budgets[kind])
        return amount * full if shared else amount

    def _check(self) -> None:
        self._check_amounts()
        self._check_words()
        for name in ("min_channels", "threads"):
            if not _whole(self.options[name]):
                raise InputError(f"{name} must be a positive whole number, got {_short(self.options[name])}")
        if self.options["threads"] > _MOST_THREADS:
            raise InputError(f"threads is {self.options['threads']}", fix=f"pass at most {_MOST_THREADS}")

    def _check_amounts(self) -> None:
        refuse_as_ratio(self.ratio)
        if (self.ratio is None) == (not self.budgets):
            raise InputError(
                f"got a ratio and {' and '.join(self.budgets)} together"
                if self.budgets
                else "got neither a ratio nor a budget",
                fix=f"pass ratio=..., or one or more of {', '.join(BUDGETS)}",
            )
        for name, value in (("ratio", self.ratio), ("max_ratio", self.options["max_ratio"])):
            for pattern, share in value.items() if isinstance(value, Mapping) else [("", value)]:
                if share is not None:
                    what = f"{name} of '{pattern}'" if pattern else name
                    check_share(what, share, closed=name == "max_ratio")
        for name, budget in self.budgets.items():
            parse(name, budget)

    def _check_words(self) -> None:
        if self.scope == "knapsack" and not self.budgets:
            raise InputError(
                "scope 'knapsack' weighs what leaves against a budget, and there is none",
                fix="pass macs=0.5, say",
            )
        for name, word, known in (
            ("scope", self.scope, SCOPES),
            ("heads", self.options["heads"], tuple(HEADS)),
            ("runtime", self.options["runtime"], RUNTIMES),
        ):
            if word not in known:
                raise InputError(f"unknown {name} {word!r}", fix=f"use one of {', '.join(known)}")
        asked = self.options["round_to"]
        if isinstance(asked, str) and asked != "auto" and asked not in TARGETS:
            raise InputError(f"unknown round_to {asked!r}", fix=f"use a number, auto, {', '.join(TARGETS)}")
        if not isinstance(asked, str) and not _whole(asked):
            raise InputError(
                f"round_to must be a positive whole number, auto or a target, got {_short(asked)}"
            )


def refuse_as_ratio(value: Any) -> None:
    """Refuse what is no ratio, and say which argument it looks like.

    Raises:
        InputError: it holds tensors, or names parts of the model by anything but their names.
    """
    held = (
        list(value.values())
        if isinstance(value, Mapping)
        else value
        if isinstance(value, list | tuple)
        else [value]
    )
    if isinstance(value, list | tuple) or any(isinstance(item, torch.Tensor | np.ndarray) for item in held):
        raise InputError(
            f"the ratio is a {type(value).__name__}, which looks like example inputs",
            why="the argument behind the model is the share of channels that leave",
            fix="pass a number such as 0.5 there, and inputs by name: example_inputs=...",
        )
    if isinstance(value, nn.Module):
        raise InputError("the ratio is a module", fix="the model comes first: surgeon.shrink(model, 0.5)")
    for key in value if isinstance(value, Mapping) else ():
        if not isinstance(key, str):
            raise InputError(
                f"ratio names a {type(key).__name__}",
                fix="use names as in model.named_modules(), with * for any part, such as {'layer4.*': 0.5}",
            )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST


def _short(value: Any) -> str:
    """A value for messages; Python refuses to write numbers of thousands of digits."""
    return (
        f"one of {value.bit_length()} bits"
        if isinstance(value, int) and abs(value) > _LARGEST
        else repr(value)
    )


def _name(criterion: Any) -> str:
    if isinstance(criterion, str):
        return criterion
    return getattr(criterion, "__name__", type(criterion).__name__)
