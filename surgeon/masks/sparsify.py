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
from surgeon.graph.check_model import check_model
from surgeon.graph.copying.model_copy import copied
from surgeon.graph.given import MODEL, check_given
from surgeon.graph.process import plain_torch
from surgeon.masks.prune_masks import MASK, ORIG, check_pruned, settle

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCOPES, STRUCTURES = ("local", "global"), ("unstructured", "2:4", "block")
Scores = Mapping[str, Tensor]  # name of a tensor -> one number for each of its entries, low leaves first


class Sites:
    """The tensors of a model that may be sparse: weights of two or more dims that one module holds, embeddings apart.

    Attributes:
        found: name -> the module that holds it, and its name there.
        shared: names of those that several modules share, which stay dense.
    """

    def __init__(self, model: nn.Module, ignore: Iterable[nn.Module | str] = ()) -> None:
        skipped = [item if isinstance(item, str) else path_of(model, item) for item in ignore]
        uncalled = _uncalled(model)
        names: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for path, module in model.named_modules():
            for key, parameter in module._parameters.items():
                plain = key.removesuffix(ORIG)
                if parameter is not None and _is_weight(parameter) and hasattr(module, plain):
                    names.setdefault(id(parameter), []).append((f"{path}.{plain}".lstrip("."), module, plain))
        self.shared = [name for several in names.values() if len(several) > 1 for name, _, _ in several]
        single = {
            name: (module, key)
            for (name, module, key), *more in names.values()
            if not more
            and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
            and id(module) not in uncalled
        }
        parts = {path for path, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        for item in skipped:
            if item not in parts and item not in single:
                raise InputError(
                    f"ignore names '{item}', and the model has no such part",
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

    def inputs(self, name: str) -> int:
        """The dim of a weight that numbers what it reads: the first one of a transposed convolution's, else the second one."""
        return 0 if isinstance(self.found[name][0], nn.modules.conv._ConvTransposeNd) else 1


def _is_weight(parameter: Tensor) -> bool:
    """Whether a parameter has more than one dim along which it has several numbers (magnitudes of weight_norm have one)."""
    return parameter.dtype in _DTYPES and sum(size > 1 for size in parameter.shape) > 1


def _uncalled(model: nn.Module) -> set[int]:
    """Modules that hold weights and are not called themselves, so that torch's hooks on them never run: lists of parameters, and
    what torch's attention holds.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ParameterList | nn.ParameterDict)]
    inside = [
        part
        for m in model.modules()
        if isinstance(m, nn.MultiheadAttention)
        for part in m.modules()
        if part is not m
    ]
    return set(map(id, (*lists, *inside)))


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
    fits = [name for name in sites.found if scores[name].shape[sites.inputs(name)] % 4 == 0]
    if not fits:
        raise InputError(
            "no weight has a number of inputs that four divides",
            fix='use structure="unstructured" or "block"',
        )
    for name in fits:
        dim = sites.inputs(name)
        score = _masked_last(scores[name], sites.mask(name)).movedim(dim, -1)
        fours = score.reshape(*score.shape[:-1], -1, 4)
        mask = torch.zeros_like(fours).scatter_(-1, fours.topk(2, dim=-1).indices, 1.0)
        _put(sites, name, mask.reshape(score.shape).movedim(-1, dim).contiguous())


def _masked_last(score: Tensor, mask: Tensor | None) -> Tensor:
    """Scores by which what is masked leaves before all else."""
    return score if mask is None else score.masked_fill(mask == 0, float(score.min()) - 1)


def _blocks(amount: float, scores: Scores, scope: str, sites: Sites, block: tuple[int, int]) -> None:
    """Blocks of outputs x inputs leave whole, those with the lowest mean score first; kernels of a convolution stay together.

    Blocks are chosen one by one, until as many weights are zero as can be near to the amount; one block of each tensor stays.
    """
    tiles = {name: _Tiles(scores[name], sites.mask(name), block, sites.inputs(name)) for name in sites.found}
    every = [list(tiles)] if scope == "global" else [[name] for name in tiles]
    for names in every:
        total = sum(scores[name].numel() for name in names)
        done = total - sum(int(tiles[name].left.sum()) for name in names)
        means = torch.cat([tiles[name].means.flatten() for name in names])
        left = torch.cat([tiles[name].left.flatten() for name in names])
        order = means.argsort(stable=True)
        zeros = done + torch.cat([left.new_zeros(1), left[order].cumsum(0)])
        count = int((zeros - amount * total).abs().argmin())
        gone = torch.zeros_like(means, dtype=torch.bool)
        gone[order[:count]] = True
        for name, part in zip(names, gone.split([tiles[name].means.numel() for name in names]), strict=True):
            _put(sites, name, tiles[name].mask(part))


class _Tiles:
    """A weight in blocks.

    Attributes:
        means: [blocks of outputs, blocks of inputs], the mean score of what is not masked; below all where all is.
        left: the same shape, how many weights are not masked.
    """

    def __init__(self, score: Tensor, mask: Tensor | None, block: tuple[int, int], inputs: int) -> None:
        self._like, self._block, self._inputs = score, block, inputs
        free = torch.ones_like(score) if mask is None else (mask != 0).to(score.dtype)
        self.left = self._summed(free)
        means = self._summed(score * free) / self.left.clamp_min(1)
        self.means = means.masked_fill(self.left == 0, float(means.min()) - 1)

    def _summed(self, values: Tensor) -> Tensor:
        flat = values.double().movedim(self._inputs, 1)
        flat = flat.reshape(*flat.shape[:2], -1).sum(2)
        rows, columns = (-(-size // edge) for size, edge in zip(flat.shape, self._block, strict=True))
        padded = flat.new_zeros(rows * self._block[0], columns * self._block[1])
        padded[: flat.shape[0], : flat.shape[1]] = flat
        return padded.reshape(rows, self._block[0], columns, self._block[1]).sum((1, 3))

    def mask(self, gone: Tensor) -> Tensor:
        """A mask of the weight's shape; the block with the largest score stays in any case."""
        gone = gone.clone()
        if bool(gone.all()):
            gone[self.means.flatten().argmax()] = False
        wide = (~gone).reshape(self.means.shape)
        wide = wide.repeat_interleave(self._block[0], 0).repeat_interleave(self._block[1], 1)
        shape = self._like.movedim(self._inputs, 1).shape
        wide = wide[: shape[0], : shape[1]].reshape(*shape[:2], *(1,) * (len(shape) - 2)).expand(shape)
        return wide.movedim(1, self._inputs).to(self._like.dtype).contiguous()


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
    check_model(model)
    check_pruned(model)
    small = copied(model)
    settle(small, permanent=True)
    return small
