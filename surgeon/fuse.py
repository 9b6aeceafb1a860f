"""fuse(model in eval mode) -> a deep copy whose batch norms are folded into the layers before them; it computes the same.

Pairs are found on the recorded graph, not in the order of modules(): the output of an ordinary convolution or linear layer that
runs once is read by one batch norm that runs once, and by nothing else. In eval mode a batch norm is affine per channel,
y -> (y - mean) * s + beta with s = gamma / sqrt(var + eps), so with the y = W x + b before it (Jacob et al. 2018, section 3.2):

    W' = W * s            (per output channel)
    b' = (b - mean) * s + beta

The fold is computed in float64 and rounded once to the dtype of the weight. Whatever does not match exactly is left alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.capture import capture
from surgeon.errors import CaptureError, FuseError
from surgeon.graph import Graph

_aten = torch.ops.aten
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORM_OPS = (_aten.native_batch_norm.default, _aten.cudnn_batch_norm.default)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fuse(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A deep copy of `model` in which every fusable pair is one layer, with `nn.Identity` where the batch norm was.

    Folds Conv1d/2d/3d, ConvTranspose1d/2d/3d (any groups) and Linear, each with the batch norm over its output channels.
    Left alone: layers or norms that run more than once, are read by anything else, share a tensor, carry hooks or
    parametrizations, are subclasses, are in training mode, or (norms) have no running statistics.

    Args:
        model: a module in eval mode; it is not touched.
        example_inputs: as for `capture`; which pairs exist may depend on them if the model's control flow does.

    Returns:
        A module of the same class, in eval mode, with the same input and output shapes. A layer without a bias gets one.

    Raises:
        FuseError: the model is in training mode, or a folded weight does not fit its dtype, or the copy still runs a folded norm.
        CaptureError: the model does not run on the example inputs.
    """
    graph, pairs = _find(model, example_inputs)
    try:
        fused = copy.deepcopy(model)
        fused.__dict__.pop("_surgeon_plans", None)  # they make the unfused model
    except (RuntimeError, TypeError) as error:
        raise FuseError(
            "the model cannot be copied", where=type(model).__name__, why=str(error), fix="let copy.deepcopy(model) work"
        ) from error
    for layer_path, norm_path in pairs:
        norm: Any = fused.get_submodule(norm_path)
        _fold(fused.get_submodule(layer_path), norm, f"'{layer_path}' + '{norm_path}'")
        parent, _, name = norm_path.rpartition(".")
        fused.get_submodule(parent)._modules[name] = nn.Identity().eval()
    if pairs:
        _check_gone(graph, fused, pairs)
    return fused


def fusable_pairs(model: nn.Module, example_inputs: Any = None) -> list[tuple[str, str]]:
    """The (layer path, batch-norm path) of each pair that `fuse` folds, in the order in which the model runs them.

    Args:
        model, example_inputs: as for `fuse`.

    Raises:
        FuseError: the model is in training mode.
        CaptureError: the model does not run on the example inputs.
    """
    return _find(model, example_inputs)[1]


def _find(model: nn.Module, example_inputs: Any) -> tuple[Graph, list[tuple[str, str]]]:
    if isinstance(model, nn.Module) and model.training:
        raise FuseError(
            "a model in training mode cannot be fused",
            where=type(model).__name__,
            why="in training a batch norm uses the statistics of each batch, which no fixed weight can hold",
            fix="call model.eval() first",
        )
    graph = capture(model, example_inputs)
    owners = _Owners(model, graph)
    pairs = []
    for node in graph.fx.nodes:
        if node.target not in _NORM_OPS or not isinstance(node.args[0], fx.Node):
            continue
        layer = node.args[0]
        if set(layer.users) == {node} and owners.layer(layer) and owners.norm(node):
            pairs.append((layer.meta["module"], node.meta["module"]))
    return graph, pairs


@dataclasses.dataclass(frozen=True)
class _Use:
    """How an op reads a tensor of the model: through nodes that each have one reader."""

    node: Any
    through: Any = None  # a view op between the tensor and its reader


class _Owners:
    """Answers whether a node is the one and only run of an ordinary module on its own, unshared tensors."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.graph = graph
        self.modules = dict(model.named_modules())
        self.registered = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        self.shared = set(graph.aliases.values())
        storages: dict[int, str] = {}
        for name in graph.owned:
            pointer = graph.tensors[name].untyped_storage().data_ptr()
            first = storages.setdefault(pointer, name) if pointer else name
            if first != name:
                self.shared |= {first, name}

    def layer(self, node: fx.Node) -> bool:
        """Whether `node` is the run of a conv or linear layer, whose output channels are dim 1 of the node's output."""
        module = self._ordinary(node, (*_CONVS, *_TRANSPOSED, nn.Linear))
        linear = isinstance(module, nn.Linear)
        if module is None or node.kwargs:
            return False
        if node.target is _aten.convolution.default and not linear:
            uses = {"weight": _Use(node.args[1]), "bias": _Use(node.args[2])}
        elif node.target is _aten.addmm.default and linear:
            uses = {"weight": _Use(node.args[2], _aten.t.default), "bias": _Use(node.args[0])}
        elif node.target is _aten.mm.default and linear:
            uses = {"weight": _Use(node.args[1], _aten.t.default), "bias": _Use(None)}
        else:
            return False
        return self._own(node, module, uses)

    def norm(self, node: fx.Node) -> bool:
        """Whether `node` is the run of a batch norm that uses its running statistics."""
        module = self._ordinary(node, _NORMS)
        if module is None or node.args[5] or module.running_mean is None or module.running_var is None:
            return False
        if any(user.args[1] != 0 for user in node.users if user.users):  # only the normalised values are read
            return False
        names = ("weight", "bias", "running_mean", "running_var")
        return self._own(node, module, {name: _Use(node.args[1 + i]) for i, name in enumerate(names)})

    def _ordinary(self, node: fx.Node, kinds: tuple[type, ...]) -> Any:
        module = self.modules.get(node.meta["module"])
        if module is None or type(module) not in kinds or module.training or self.registered[id(module)] != 1:
            return None
        if "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS):
            return None
        return module

    def _own(self, reader: fx.Node, module: nn.Module, uses: dict[str, _Use]) -> bool:
        """Whether each use is the module's own tensor of that name, unshared, and read by `reader` alone."""
        for name, use in uses.items():
            tensor = module._parameters.get(name, module._buffers.get(name))
            node: Any = use.node
            user = reader
            if node is None and tensor is None:
                continue
            if use.through is not None and isinstance(node, fx.Node):
                if node.target is not use.through or set(node.users) != {user}:
                    return False
                node, user = node.args[0], node
            if not isinstance(node, fx.Node) or node.op != "get_attr" or set(node.users) != {user}:
                return False
            owned = str(node.target)
            if self.graph.tensors[owned] is not tensor or owned in self.shared or owned not in self.graph.owned:
                return False
        return True


def _fold(layer: Any, norm: Any, where: str) -> None:
    """Write W' and b' of the module's docstring into `layer`, in place."""
    weight = layer.weight
    mean, var = _exact(norm.running_mean), _exact(norm.running_var)
    scale = torch.rsqrt(var + norm.eps)
    scale = scale if norm.weight is None else scale * _exact(norm.weight)
    beta = torch.zeros_like(mean) if norm.bias is None else _exact(norm.bias)
    bias = torch.zeros_like(mean) if layer.bias is None else _exact(layer.bias)
    groups = layer.groups if isinstance(layer, _TRANSPOSED) else None
    old = _exact(weight)
    if groups is None:  # (out, ...)
        new = old * scale.reshape(-1, *[1] * (old.ndim - 1))
    else:  # (groups * in per group, out per group, ...), output channels ordered by group
        shape = old.shape
        per_group = scale.reshape(groups, 1, shape[1], *[1] * (old.ndim - 2))
        new = (old.reshape(groups, -1, *shape[1:]) * per_group).reshape(shape)
    shift = (bias - mean) * scale + beta
    with torch.no_grad():
        weight.copy_(new)
        weight.grad = None
        if layer.bias is None:
            empty = torch.empty(shift.shape, dtype=weight.dtype, device=weight.device)
            layer.bias = nn.Parameter(empty, requires_grad=weight.requires_grad)
        layer.bias.copy_(shift)
        layer.bias.grad = None
    if not (torch.isfinite(weight).all() and torch.isfinite(layer.bias).all()):
        raise FuseError(
            f"a folded weight is not finite in {weight.dtype}",
            where=where,
            why="the batch norm scales by more than the dtype can hold, or a tensor was not finite before",
            fix="call model.float() first, or check the weights and running statistics for NaN and infinity",
        )


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _check_gone(graph: Graph, fused: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Refuse a copy that reaches a folded norm other than by its path (a plain list of modules), or reads its attributes."""
    try:
        after = capture(fused, dict(graph.kwargs) or graph.args)
    except CaptureError as error:
        why = f"forward uses a batch norm as more than a function: {error.what}"
        found = -1
    else:
        found = _norms(graph) - _norms(after)
        why = f"{len(pairs)} batch norms were folded but {found} left the graph: forward holds some outside the module tree"
    if found != len(pairs):
        raise FuseError(
            "this model cannot be fused exactly",
            where=type(fused).__name__,
            why=why,
            fix="register the batch norms as submodules and call them by name, or export without fuse(...)",
        )


def _norms(graph: Graph) -> int:
    return sum(node.target in _NORM_OPS for node in graph.fx.nodes)
