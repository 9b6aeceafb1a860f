"""sparsify: single weights, 2:4 patterns or blocks are masked, by torch.nn.utils.prune; finalize: masks become zeros.

Dense kernels gain nothing by zeros. What gains: files that are compressed, 2:4 patterns on GPUs that have kernels for
them (`torch.sparse.to_sparse_semi_structured`), runtimes with sparse kernels, and `compact` where whole channels go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from surgeon.capture.isolation.mode import Isolation
from surgeon.coupling.ignore import path_of
from surgeon.cut.weight_hooks import recompute
from surgeon.errors import InputError
from surgeon.graph.copying.model_copy import copied
from surgeon.graph.given import MODEL, check_given
from surgeon.graph.process import plain_torch
from surgeon.masks.prune_masks import MASK, ORIG, check_pruned, settle

SCOPES, STRUCTURES = ("local", "global"), ("unstructured", "2:4", "block")
Scores = Mapping[str, Tensor]  # name of a tensor -> one number for each of its entries, low leaves first


class Sites:
    """The tensors of a model that may be sparse: weights of two or more dims that one module holds, embeddings apart.

    Attributes:
        found: name -> the module that holds it, and its name there.
        shared: names of those that several modules share, which stay dense.
    """

    def __init__(self, model: nn.Module, ignore: Iterable[nn.Module | str] = ()) -> None:
        held = [ignore] if isinstance(ignore, str | nn.Module) else list(ignore)
        skipped = [item if isinstance(item, str) else path_of(model, item) for item in held]
        names: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for path, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is None or parameter.dim() < 2:
                    continue
                plain = key.removesuffix(ORIG)
                if parameter.is_floating_point() and hasattr(module, plain):
                    names.setdefault(id(parameter), []).append((f"{path}.{plain}".lstrip("."), module, plain))
        self.shared = [name for several in names.values() if len(several) > 1 for name, _, _ in several]
        single = {
            name: (module, key)
            for (name, module, key), *more in names.values()
            if not more and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        for item in skipped:
            if not any(name == item or name.startswith(f"{item}.") for name in (*single, *self.shared)):
                raise InputError(
                    f"ignore names '{item}', and there is no weight of two or more dims",
                    fix="use modules, or names as in model.named_modules()",
                )
        self.found = {
            name: site
            for name, site in single.items()
            if not any(name == item or name.startswith(f"{item}.") for item in skipped)
        }

    def weight(self, name: str) -> Tensor:
        """The tensor as forward sees it, masks included."""
        module, key = self.found[name]
        recompute(module)
        found: Tensor = getattr(module, key)
        return found.detach()

    def mask(self, name: str) -> Tensor | None:
        """The mask that a tensor has; None without one."""
        module, key = self.found[name]
        found: Tensor | None = module._buffers.get(f"{key}{MASK}")
        return found


def check_amount(amount: Any, structure: str) -> float:
    """The share that is to be zero.

    Raises:
        InputError: it is no number in (0, 1), or not one half where the pattern says so.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < 1:
        raise InputError(
            f"amount must be a share in (0, 1), got {amount!r}", fix="pass 0.5 for half of the weights"
        )
    if structure == "2:4" and amount != 0.5:
        raise InputError("a 2:4 pattern keeps two of four weights: amount is 0.5", fix="pass amount=0.5")
    return float(amount)


def put_masks(
    model: nn.Module, amount: float, scores: Scores | None, scope: str, structure: str, sites: Sites, seed: int,
    block: tuple[int, int],
) -> None:  # fmt: skip
    """Mask weights in place, until `amount` of them are zero in all; those that are masked stay so.

    Args:
        scores: low leaves first; None to draw.
    """
    if not sites.found:
        raise InputError("the model has no weights of two or more dims that may be sparse")
    if structure == "unstructured":
        with Isolation(seed=seed):
            _unstructured(amount, scores, scope, sites)
    else:
        with Isolation(seed=seed):
            drawn = scores or {name: torch.rand_like(sites.weight(name)) for name in sites.found}
        if structure == "2:4":
            _two_of_four(drawn, sites)
        else:
            _blocks(amount, drawn, scope, sites, block)
    for module, _ in sites.found.values():
        recompute(module)  # without a gradient, so that the model can be copied


def _unstructured(amount: float, scores: Scores | None, scope: str, sites: Sites) -> None:
    """By torch's own methods; on masks that are there, the rest of the amount."""
    methods = (prune.RandomUnstructured, prune.L1Unstructured)
    parts = list(sites.found.items())
    if scope == "global":
        amounts = [_left(amount, [name for name, _ in parts], sites)]
        if amounts[0]:
            given = (
                {} if scores is None else {"importance_scores": {site: scores[name] for name, site in parts}}
            )
            prune.global_unstructured(
                [site for _, site in parts],
                pruning_method=methods[scores is not None],
                amount=amounts[0],
                **given,
            )
        return
    for name, (module, key) in parts:
        left = _left(amount, [name], sites)
        if left and scores is None:
            prune.random_unstructured(module, key, amount=left)
        elif left and scores is not None:
            prune.l1_unstructured(module, key, amount=left, importance_scores=scores[name])


def _left(amount: float, names: list[str], sites: Sites) -> int:
    """How many more weights are to be masked."""
    masks = [sites.mask(name) for name in names]
    total = sum(sites.weight(name).numel() for name in names)
    done = sum(int((mask == 0).sum()) for mask in masks if mask is not None)
    return max(0, round(amount * total) - done)


def _two_of_four(scores: Scores, sites: Sites) -> None:
    """Of four weights side by side along the inputs, the two with the largest scores stay."""
    fits = [name for name in sites.found if scores[name].shape[1] % 4 == 0]
    if not fits:
        raise InputError(
            "no weight has a number of inputs that four divides",
            fix='use structure="unstructured" or "block"',
        )
    for name in fits:
        score = scores[name].movedim(1, -1)
        fours = score.reshape(*score.shape[:-1], -1, 4)
        mask = torch.zeros_like(fours).scatter_(-1, fours.topk(2, dim=-1).indices, 1.0)
        _put(sites, name, mask.reshape(score.shape).movedim(-1, 1).contiguous())


def _blocks(amount: float, scores: Scores, scope: str, sites: Sites, block: tuple[int, int]) -> None:
    """Blocks of outputs x inputs leave whole, those with the lowest mean score first; kernels of a convolution stay together."""
    tiles = {name: tile_means(score, block) for name, score in scores.items() if name in sites.found}
    sizes = {name: tile_means(torch.ones_like(scores[name]), block, summed=True) for name in tiles}
    if scope == "global":
        every, weights = (torch.cat([tile.flatten() for tile in given.values()]) for given in (tiles, sizes))
        limits = dict.fromkeys(tiles, _limit(every, weights, amount))
    else:
        limits = {name: _limit(tile.flatten(), sizes[name].flatten(), amount) for name, tile in tiles.items()}
    for name, tile in tiles.items():
        shape = scores[name].shape
        kept = (tile > limits[name]).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        kept = kept[: shape[0], : shape[1]].reshape(*shape[:2], *(1,) * (len(shape) - 2)).expand(shape)
        _put(sites, name, kept.to(scores[name].dtype).contiguous())


def tile_means(score: Tensor, block: tuple[int, int], summed: bool = False) -> Tensor:
    """[blocks of outputs, blocks of inputs], the mean score of each, or the sum; smaller blocks at the ends."""
    kernel = score[0, 0].numel()
    flat = score.double().reshape(*score.shape[:2], kernel).sum(2)
    rows, columns = (-(-size // edge) for size, edge in zip(flat.shape, block, strict=True))
    padded = flat.new_zeros(2, rows * block[0], columns * block[1])
    padded[0, : flat.shape[0], : flat.shape[1]], padded[1, : flat.shape[0], : flat.shape[1]] = flat, kernel
    total, count = padded.reshape(2, rows, block[0], columns, block[1]).sum((2, 4))
    found: Tensor = total if summed else total / count
    return found


def _limit(values: Tensor, sizes: Tensor, amount: float) -> float:
    """The largest of the values that are to leave, the lowest first, as near as can be to a share of the sizes; below all if
    none is.
    """
    order = values.argsort()
    gone = torch.cat([sizes.new_zeros(1), sizes[order].cumsum(0)])
    count = int((gone - amount * sizes.sum()).abs().argmin())
    return float(values[order[count - 1]]) if count else -1.0


def _put(sites: Sites, name: str, mask: Tensor) -> None:
    module, key = sites.found[name]
    prune.custom_from_mask(module, key, mask)


@plain_torch()
def finalize(model: nn.Module) -> nn.Module:
    """A copy in which masks of torch.nn.utils.prune are multiplied into the weights, and are gone.

    Args:
        model: it is not touched.

    Raises:
        InputError: a mask is only half there.
    """
    check_given("surgeon.finalize(model)", model=(model, MODEL))
    check_pruned(model)
    small = copied(model)
    settle(small, permanent=True)
    return small
