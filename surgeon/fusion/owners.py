"""Owners: which nodes of a recorded graph are the one and only run of an ordinary layer on its own, unshared
tensors.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.fusion.channels import RESHAPES, labels_of
from surgeon.graph.graph import Graph

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_aten = torch.ops.aten
_NORM_OPS = (_aten.native_batch_norm.default, _aten.cudnn_batch_norm.default)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def added_bias(product: fx.Node) -> fx.Node | None:
    """The sum with a tensor of the model that the same module alone makes of this product: a bias added by
    hand.
    """
    node = product
    while len(node.users) == 1:
        (node,) = node.users
        if node.meta.get("module") != product.meta["module"]:  # of the output there is none
            return None
        if node.target is _aten.add.Tensor:
            bias = node.args[1]
            return node if isinstance(bias, fx.Node) and bias.op == "get_attr" and not node.kwargs else None
        if node.target not in RESHAPES:
            return None
    return None


@dataclasses.dataclass(frozen=True)
class _Use:
    """How an op reads a tensor of the model: through nodes that each have one reader."""

    node: Any
    through: Any = None  # a view op between the tensor and its reader


class Owners:
    """Answers for the nodes of one graph."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.graph = graph
        self.modules = dict(model.named_modules())
        self._registered = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        self._shared = set(graph.aliases.values())
        storages: dict[int, str] = {}
        for name in graph.owned:
            tensor = graph.tensors[name]
            pointer = 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
            first = storages.setdefault(pointer, name) if pointer else name
            if first != name:
                self._shared |= {first, name}

    def layer(self, node: Any) -> Any:
        """The conv or linear layer whose run `node` is (its output channels are dim 1 of the node's output),
        or None.
        """
        if not isinstance(node, fx.Node) or node.op != "call_function" or node.kwargs:
            return None
        module = self._ordinary(node, (*CONVS, *TRANSPOSED, nn.Linear))
        linear = isinstance(module, nn.Linear)
        if module is None:
            return None
        if node.target is _aten.convolution.default and not linear:
            uses = {"weight": _Use(node.args[1]), "bias": _Use(node.args[2])}
        elif node.target is _aten.addmm.default and linear:
            uses = {"weight": _Use(node.args[2], _aten.t.default), "bias": _Use(node.args[0])}
        elif node.target is _aten.mm.default and linear:
            added = added_bias(node) if module.bias is not None else None
            if not self._own(added or node, module, {"bias": _Use(None if added is None else added.args[1])}):
                return None
            uses = {"weight": _Use(node.args[1], _aten.t.default)}
        else:
            return None
        return module if self._own(node, module, uses) else None

    def value(self, node: fx.Node) -> tuple[fx.Node, Tensor]:
        """What the layer whose run `node` is gives, and the labels of its output channels."""
        added = added_bias(node) if node.target is _aten.mm.default else None
        return (node, labels_of(node, 1)) if added is None else (added, labels_of(added, -1))

    def norm(self, node: Any) -> Any:
        """The batch norm, or subclass of one, whose own statistics `node` normalises with, or None."""
        if (
            not isinstance(node, fx.Node)
            or node.target not in _NORM_OPS
            or not isinstance(node.args[0], fx.Node)
        ):
            return None
        module = self._ordinary(node, None)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or node.args[5]:
            return None
        if module.running_mean is None or module.running_var is None:
            return None
        if any(user.args[1] != 0 for user in node.users if user.users):  # only the normalised values are read
            return None
        names = ("weight", "bias", "running_mean", "running_var")
        return (
            module
            if self._own(node, module, {name: _Use(node.args[1 + i]) for i, name in enumerate(names)})
            else None
        )

    def code(self, path: str) -> Any:
        """The module of which this is the path if its own forward may be rewritten, or None."""
        module = self.modules.get(path)
        return module if module is not None and self._plain(module) else None

    def _ordinary(self, node: fx.Node, kinds: tuple[type, ...] | None) -> Any:
        module = self.modules.get(node.meta["module"])
        if module is None or not self._plain(module) or (kinds is not None and type(module) not in kinds):
            return None
        return module

    def _plain(self, module: nn.Module) -> bool:
        """In eval mode, registered once, and called without hooks or a forward of its own."""
        if module.training or self._registered[id(module)] != 1 or "forward" in vars(module):
            return False
        return not any(getattr(module, hooks) for hooks in _HOOKS)

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
            if (
                self.graph.tensors[owned] is not tensor
                or owned in self._shared
                or owned not in self.graph.owned
            ):
                return False
        return True
