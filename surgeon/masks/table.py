"""sparsity(model) -> how many weights are zero, by layer and in all, and what that saves on a disk."""

from __future__ import annotations

import dataclasses
import zlib

import torch
from torch import Tensor, nn

from surgeon.graph.check_model import check_model
from surgeon.graph.given import MODEL, check_given
from surgeon.masks.prune_masks import MASK, ORIG, check_pruned, check_values

_INDEX = 4  # bytes of an index in a CSR file


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """The zeros of one tensor.

    Attributes:
        name, shape: of the tensor.
        zeros: entries that are zero or masked.
        masked: whether a mask of torch.nn.utils.prune hides some.
        size: bytes as it is; csr: with values, column indices and row starts of 32 bits; compressed: by deflate.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    masked: bool
    size: int
    csr: int
    compressed: int

    @property
    def count(self) -> int:
        """How many entries the tensor has."""
        return int(torch.Size(self.shape).numel())

    @property
    def share(self) -> float:
        """The share of its entries that are zero."""
        return self.zeros / self.count if self.count else 0.0


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """The zeros of a model's weights, tied ones once; printable.

    Attributes:
        layers: parameters of two or more dims.
    """

    layers: tuple[LayerSparsity, ...]

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def count(self) -> int:
        return sum(layer.count for layer in self.layers)

    @property
    def share(self) -> float:
        """The share of all weights that are zero."""
        return self.zeros / self.count if self.count else 0.0

    def __str__(self) -> str:
        total = {
            kind: sum(getattr(layer, kind) for layer in self.layers) for kind in ("size", "csr", "compressed")
        }
        rows = [
            (each.name, f"{each.zeros:,} of {each.count:,}", f"{each.share:.1%}", "masked" if each.masked else "",
             f"{each.size:,}", f"{each.csr:,}", f"{each.compressed:,}")
            for each in self.layers
        ]  # fmt: skip
        last = ("in all", f"{self.zeros:,} of {self.count:,}", f"{self.share:.1%}", "")
        header = ("weight", "zero", "share", "", "bytes", "as CSR", "compressed")
        lines = [header, *rows, (*last, *(f"{size:,}" for size in total.values()))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        return "\n".join([*text, "dense kernels gain nothing by zeros; files that are compressed do"])


def sparsity(model: nn.Module) -> Sparsity:
    """Count the zeros of a model's weights (parameters of two or more dims), masks of torch.nn.utils.prune included.

    Raises:
        InputError: a mask is only half there.
    """
    check_given("surgeon.sparsity(model)", model=(model, MODEL))
    check_model(model)
    check_values(model)
    check_pruned(model)
    found: list[LayerSparsity] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = key.removesuffix(ORIG)
            mask = module._buffers.get(f"{name}{MASK}") if key.endswith(ORIG) else None
            value = parameter.detach() if mask is None else parameter.detach() * mask
            hidden = mask is not None and bool((mask == 0).any())
            found.append(_layer(f"{path}.{name}".lstrip("."), value, hidden))
    return Sparsity(tuple(found))


def _layer(name: str, value: Tensor, masked: bool) -> LayerSparsity:
    zeros = int((value == 0).sum())
    each, rows = value.element_size(), value.shape[0]
    csr = (value.numel() - zeros) * (each + _INDEX) + (rows + 1) * _INDEX
    raw = value.contiguous().cpu().view(torch.uint8) if value.numel() else value
    compressed = len(zlib.compress(raw.numpy().tobytes(), 6)) if value.numel() else 0
    return LayerSparsity(name, tuple(value.shape), zeros, masked, value.numel() * each, csr, compressed)
