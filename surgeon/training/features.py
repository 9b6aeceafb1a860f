"""Features: a student imitates what modules of its teacher compute, on the channels that it still has; no
adapters.

The ids of the recorded run say which channels of any module's output stay: those of a residual block or an
activation as well as those of a convolution.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from surgeon.cut.inspected import Inspected
from surgeon.cut.plan import Plan, check_fit
from surgeon.errors import InputError
from surgeon.graph.queries import nodes_inside
from surgeon.graph.tensors import tensor_leaves
from surgeon.ops.ids import DimIds

Kept = dict[int, Tensor]


class Features:
    """The outputs of some modules, of teacher and student, on the channels that both have.

    Args:
        surgery: of the teacher.
        plan: the one that made the student of the teacher's architecture.
        modules: paths of modules that return one tensor, such as ["layer1", "layer2.0.bn2"]; those of
            `blocks` by default.

    Raises:
        InputError: a module did not run, or returns no single tensor of the recorded run.
    """

    def __init__(self, surgery: Inspected, plan: Plan, modules: Sequence[str] | None = None) -> None:
        if modules is None:
            modules = blocks(surgery)
        if isinstance(modules, str) or not modules:
            raise InputError(
                "modules must be a list of names",
                fix='pass names of model.named_modules(), such as ["layer1"]',
            )
        self.kept: dict[str, Kept] = kept_channels(surgery, plan, modules)
        self._seen: tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]] = {}, {}

    @contextlib.contextmanager
    def watching(self, student: nn.Module, teacher: nn.Module) -> Iterator[None]:
        """Inside, runs of the teacher are seen, and those of the student that take gradients."""
        with contextlib.ExitStack() as stack:
            for model, seen, learns in zip((student, teacher), self._seen, (True, False), strict=True):
                for path in self.kept:
                    seen[path] = []
                    handle = model.get_submodule(path).register_forward_hook(
                        partial(_see, seen[path], learns)
                    )
                    stack.callback(handle.remove)
            yield

    def loss(self) -> Tensor:
        """Sum over modules of mean((student - teacher)^2) / mean(teacher^2), of the runs since it was last
        asked for.

        Raises:
            InputError: a module ran differently often in both, or its outputs do not fit.
        """
        parts = []
        for path, kept in self.kept.items():
            ours, theirs = (seen[path] for seen in self._seen)
            if len(ours) != len(theirs) or not ours:
                raise InputError(
                    f"module '{path}' ran {len(ours)} times in the student and {len(theirs)} times in the teacher"
                )
            for student, full in zip(ours, theirs, strict=True):
                teacher = full.detach()
                for dim, index in kept.items():
                    teacher = teacher.index_select(dim, index.to(teacher.device))
                if student.shape != teacher.shape:
                    raise InputError(
                        f"features of '{path}' have shape {tuple(student.shape)} in the student, {tuple(teacher.shape)} in the "
                        "teacher at the kept channels",
                        fix="use the surgery and the plan that made this student",
                    )
                student, teacher = (t if t.dtype == torch.float64 else t.float() for t in (student, teacher))
                parts.append((student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12))
            ours.clear()
            theirs.clear()
        return torch.stack(parts).sum()


def blocks(surgery: Inspected) -> list[str]:
    """The outermost modules of a class that occurs more than once and that give one value: residual blocks,
    transformer layers.

    Of a model that has none (all in one list of layers): the layers with weights.

    Raises:
        InputError: no two modules are of one class.
    """
    modules = [module for module in surgery.model.modules() if type(module) not in _CONTAINERS]
    holders = [module for module in modules if list(module.children())]
    layers = [module for module in modules if list(module.parameters(recurse=False))]
    for some in (holders, layers):
        kinds = {kind for kind, count in Counter(map(type, some)).items() if count > 1}
        found = list(_outermost(surgery, surgery.model, "", kinds))
        if found:
            return found
    raise InputError(
        f"{type(surgery.model).__name__} has no two modules of one class that give one tensor each",
        fix="name the modules whose outputs are to be compared: modules=[...]",
    )


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _outermost(
    surgery: Inspected, module: nn.Module, path: str, kinds: set[type[nn.Module]]
) -> Iterator[str]:
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        given = _given(surgery, below) if type(child) in kinds else []
        if len(given) == 1 and isinstance(surgery.propagation.axes[given[0]], dict):
            yield below
        else:
            yield from _outermost(surgery, child, below, kinds)


def _given(surgery: Inspected, path: str) -> list[fx.Node]:
    """The values of a module that are read outside of it."""
    inside = set(nodes_inside(surgery.graph, path))
    return [node for node in inside if any(user not in inside for user in node.users)]


def kept_channels(surgery: Inspected, plan: Plan, modules: Sequence[str]) -> dict[str, Kept]:
    """For each module {dim: indices} of its output that stay under a plan; dims that keep everything are left
    out.

    Raises:
        InputError: a module did not run, or what it gives is no single value of the recorded run.
    """
    choice = choice_of(surgery, plan)
    return {path: _kept_of(surgery, choice, path) for path in modules}


def _kept_of(surgery: Inspected, choice: DimIds, path: str) -> Kept:
    given = _given(surgery, path)
    if not given:
        raise InputError(
            f"no module '{path}' ran", fix="pass names of model.named_modules() that compute something"
        )
    found = [_kept(surgery, node, choice, path) for node in given]
    first = {dim: index.tolist() for dim, index in found[0].items()}
    if any({dim: index.tolist() for dim, index in other.items()} != first for other in found[1:]):
        raise InputError(f"module '{path}' gives several values", fix="name a module that returns one tensor")
    return found[0]


def choice_of(surgery: Inspected, plan: Plan) -> DimIds:
    """Which atoms leave under a plan.

    Raises:
        PlanError: the plan was made for another architecture.
    """
    check_fit(plan, surgery.model)
    return surgery.shapes.chosen(plan.kept)


def _kept(surgery: Inspected, node: fx.Node, choice: DimIds, path: str) -> Kept:
    found = {}
    axes = surgery.propagation.axes[node]
    if not isinstance(axes, dict):
        raise InputError(f"module '{path}' gives several values", fix="name a module that returns one tensor")
    for dim, dim_ids in axes.items():
        leaves = np.moveaxis(surgery.shapes.leaves(dim_ids, choice), dim, 0).reshape(dim_ids.shape[dim], -1)
        if (leaves != leaves[:, :1]).any():
            raise InputError(
                f"the output of module '{path}' loses other channels in one place than in another",
                fix="name a module before its channels are laid out in rows, such as the projection in front of it",
            )
        if leaves.any():
            found[dim] = torch.from_numpy(np.flatnonzero(~leaves[:, 0]))
    return found


def _see(seen: list[Tensor], learns: bool, module: nn.Module, _args: Any, output: Any) -> None:
    if learns and not torch.is_grad_enabled():
        return
    tensors = [tensor for _, tensor in tensor_leaves(output)]
    if len(tensors) != 1:
        raise InputError(
            f"a {type(module).__name__} gives {len(tensors)} tensors in a {type(output).__name__}",
            fix="name modules that return one tensor",
        )
    seen.append(tensors[0])
