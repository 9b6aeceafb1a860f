"""Plan: which indices of which slots stay, and which sizes in the model's code change; plain data that can be
replayed.

A plan belongs to an architecture (`Plan.hash` covers the names and shapes of its tensors), not to weights: it
applies to a fresh copy, to other weights of the same model, or to the weights before training.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from surgeon.cut.carried import PLANS, plan_texts
from surgeon.cut.optimizer_state import carry, check_optimizer
from surgeon.cut.plan_schema import LARGEST_TEXT, fields_of, text_of
from surgeon.cut.plan_text import described
from surgeon.cut.pretrained import follow_with_plan
from surgeon.cut.slice import shrink_module
from surgeon.errors import FileError, InputError, PlanError, ProofWarning, warn
from surgeon.files import read_file, write_atomically
from surgeon.graph.given import MODEL, PATH, Kind, check_given
from surgeon.graph.process import plain_torch
from surgeon.graph.tensors import architecture, named_tensors
from surgeon.mend.edits import Edit


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What stays.

    Attributes:
        kept: {tensor name: {dim: kept indices, ascending}}; tensors and dims that keep everything are left
            out.
        hash: the architecture that the plan fits.
        macs, params: predicted for the small model, and `*_before` of the original; MACs for the example
            inputs.
        size: bytes of parameters and stored buffers of the small model.
        memory: bytes of its activations that are alive at once, at most, for the example inputs.
        edits: changed sizes in the model's code.
        request: what was asked for, for the reader; under "rescaled" what else changes in the model's code
            because it counts the terms of a sum (1/sqrt(head_dim)).
    """

    kept: Mapping[str, Mapping[int, list[int]]]
    hash: str
    macs: int
    params: int
    macs_before: int
    params_before: int
    size: int = 0
    memory: int = 0
    edits: tuple[Edit, ...] = ()
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @plain_torch()  # the small model can be trained, whatever the caller is in
    def apply(self, model: nn.Module, *, optimizer: Optimizer | None = None) -> nn.Module:
        """A new, smaller module of the same class; `model` is not touched.

        Args:
            model: of the architecture that the plan was made for, with any weights.
            optimizer: of the model, to go on with the small one: it is changed in place, after all else
                worked. Its param groups stay, with the small model's parameters; momenta and whatever else
                has a parameter's shape are sliced like it.

        Raises:
            PlanError: the plan does not fit the model.
            MendError: the model's code holds a size that cannot be changed, or a part of the original would
                still be used (by a hook's closure, say).
            InputError: the optimizer holds parameters that the model does not, or state that cannot be
                sliced.
        """
        check_given("plan.apply(model)", model=(model, MODEL))
        check_fit(self, model)
        if optimizer is not None:
            check_given("plan.apply(model, optimizer=optimizer)", optimizer=(optimizer, _OPTIMIZER))
            check_optimizer(optimizer, model)
        small = shrink_module(model, self.kept, self.edits)
        self.warn()
        carrying(small, model, self)
        if optimizer is not None:
            carry(optimizer, model, small, self.kept)
        return small

    def warn(self) -> None:
        """Say which numbers of the model's code, beside sizes, change with the plan."""
        if self.request.get("rescaled"):
            warn(
                "numbers in the model's code follow the new widths, which changes what it computes: "
                + "; ".join(map(str, self.request["rescaled"])),
                ProofWarning,
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, atomically.

        Raises:
            FileError: the path cannot be written.
        """
        check_given("plan.save(path)", path=(path, PATH))
        write_atomically(Path(path), self.to_json().encode())

    def to_json(self) -> str:
        """What `save` writes."""
        return text_of({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @staticmethod
    def of(model: nn.Module) -> list[Plan]:
        """The plans that cut a model, the first one first; none of a model that surgeon did not make.

        A checkpoint that holds them (`plan.to_json()`) can be restored: apply them in turn to the original, and load
        the weights.
        """
        check_given("Plan.of(model)", model=(model, MODEL))
        return [Plan.from_json(text) for text in plan_texts(model)]

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises:
            PlanError: the file is missing, truncated, edited or not a plan.
        """
        check_given("Plan.load(path)", path=(path, PATH))
        try:
            text = read_file(path, LARGEST_TEXT)
        except FileError as error:
            raise PlanError(
                "cannot read the plan",
                where=str(path),
                why=error.why,
                fix="pass a file written by plan.save(...)",
            ) from error
        return Plan.from_json(text, where=str(path))

    @staticmethod
    def from_json(text: str | bytes, where: str = "") -> Plan:
        """The plan of a text that `to_json` gave; `where` is for messages.

        Raises:
            PlanError: the text is truncated, edited or not a plan.
        """
        check_given("Plan.from_json(text)", text=(text, _TEXT))
        return Plan(**fields_of(text, where))

    def __repr__(self) -> str:
        return f"<{described(self)[0]}>"

    def __str__(self) -> str:
        return "\n".join(described(self))


def carrying(small: nn.Module, model: nn.Module, plan: Plan) -> nn.Module:
    """The small model with the plans that led to it from an original, for `surgeon.save`: the model's own, and this one."""
    small.__dict__[PLANS] = (*plan_texts(model), plan.to_json())
    follow_with_plan(small)
    return small


PLAN = Kind(
    "a plan", lambda value: isinstance(value, Plan), "pass what surgery.plan(...) or Plan.load(path) gave"
)
_OPTIMIZER = Kind(
    "an optimizer", lambda value: isinstance(value, Optimizer), "pass the torch optimizer of the model"
)
_TEXT = Kind("a text", lambda value: isinstance(value, str | bytes), "pass what plan.to_json() gave")


def check_roles(plan: Plan, model: nn.Module, small: nn.Module) -> None:
    """Refuse original and small model in the places of each other.

    Raises:
        InputError: the plan was made for what stands as the small model.
    """
    if plan.kept and architecture(model) != plan.hash == architecture(small):
        raise InputError(
            "the original stands where the small model belongs",
            where=f"{type(small).__name__} with {sum(p.numel() for p in small.parameters()):,} parameters",
            why="the plan was made for it",
            fix="pass the two models in the other order",
        )


def check_fit(plan: Plan, model: nn.Module) -> None:
    """Refuse a model that the plan was not made for.

    Raises:
        PlanError: the architecture differs; the first tensor that does is named where it can be.
    """
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model)}
    why = "" if architecture(model) == plan.hash else "the names or shapes of its tensors differ"
    for name, dims in plan.kept.items():
        shape = shapes.get(name)
        if shape is None or any(
            d >= len(shape) or (kept and max(kept) >= shape[d]) for d, kept in dims.items()
        ):
            why = f"tensor '{name}' is {'missing' if shape is None else f'of shape {shape}'}"
            break
    if why:
        raise PlanError(
            "the plan was made for another architecture",
            where=type(model).__name__,
            why=why,
            fix="apply the plan to a copy of the model that it was made for, before it was shrunk",
        )
