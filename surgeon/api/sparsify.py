"""sparsify(model, amount): a copy whose weights are masked one by one, in 2:4 patterns or in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.api.pipeline import inspect
from surgeon.capture.batches import check_iterable
from surgeon.criteria.data.gather import gather
from surgeon.errors import InputError
from surgeon.graph.check_model import check_model
from surgeon.graph.copying.model_copy import copied
from surgeon.graph.given import MODEL, check_given
from surgeon.graph.process import plain_torch
from surgeon.masks.prune_masks import MASK, ORIG, check_pruned, check_values
from surgeon.masks.sparsify import SCOPES, STRUCTURES, Sites, check_amount, put_masks

Method = str | Callable[[str, Tensor], Tensor]
METHODS = ("l1", "random", "gradient", "taylor")


@plain_torch()
def sparsify(
    model: nn.Module,
    amount: float,
    *,
    method: Method = "l1",
    scope: str = "local",
    structure: str = "unstructured",
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    ignore: Iterable[nn.Module | str] = (),
    block: tuple[int, int] = (4, 4),
    seed: int = 0,
) -> nn.Module:
    """A copy in which a share of the weights is masked by torch.nn.utils.prune; the masks hold while it trains.

    Shapes stay, and dense kernels gain nothing: what gains are files that are compressed, 2:4 patterns on GPUs with kernels for
    them, and sparse runtimes. Where masks make up whole channels, `surgeon.compact` removes them; `surgeon.finalize` makes
    masks permanent, `surgeon.sparsity` counts.

    Args:
        model: it is not touched. Weights are its parameters of two or more dims; embeddings, shared ones and what is read while
            its module is not called (lists of parameters, the output layer of nn.MultiheadAttention) stay dense.
        amount: share in (0, 1) that is zero in all afterwards; what is masked already counts, and stays masked.
        method: what leaves first: "l1", the smallest (Han et al., Learning both Weights and Connections, 2015); "random";
            "gradient", where the root of the mean square of the gradient is smallest; "taylor", where |weight * mean gradient| is
            (Molchanov et al., 2019); or a callable (name, tensor) -> one score for each entry, low leaves first.
        scope: "local", the same share of each tensor, or "global", the lowest wherever they are.
        structure: "unstructured"; "2:4", two of four weights side by side along the inputs (tensors whose inputs four does not
            divide stay dense); or "block", blocks of outputs x inputs with the lowest mean score.
        data: batches for "gradient" and "taylor"; with a loss, pairs (inputs, targets).
        loss: called as loss(output, targets); without one, the energy of the outputs takes its place.
        ignore: modules, or names, whose weights stay dense.
        block: outputs and inputs of a block; kernels of convolutions stay together.
        seed: of "random": the masks are those that torch.nn.utils.prune draws after torch.manual_seed(seed).

    Raises:
        InputError: an argument is out of range or unknown, data are missing, or no weight may be sparse.
    """
    check_given("surgeon.sparsify(model, amount)", model=(model, MODEL))
    share = check_amount(amount, structure)
    _check_choice("scope", scope, SCOPES)
    _check_choice("structure", structure, STRUCTURES)
    _check_method(method, data)
    if (
        not isinstance(block, tuple | list)
        or len(block) != 2
        or any(type(edge) is not int or edge < 1 for edge in block)
    ):
        raise InputError(
            f"block={block!r} must be two positive whole numbers",
            fix="pass (outputs, inputs), such as (4, 4)",
        )
    if type(seed) is not int:
        raise InputError(f"seed must be a whole number, got {seed!r}")
    if data is not None:
        check_iterable(data, "data")
    check_model(model)
    check_values(model)
    check_pruned(model)
    small = copied(model)
    paths = [item if isinstance(item, str) else _path(model, item) for item in _listed(ignore)]
    sites = Sites(small, paths)
    scores = None if method == "random" else _scores(model, sites, method, data, loss)
    put_masks(small, share, scores, scope, structure, sites, seed, block)
    return small


def _listed(ignore: Any) -> list[Any]:
    return [ignore] if isinstance(ignore, str | nn.Module) else list(ignore or ())


def _path(model: nn.Module, module: nn.Module) -> str:
    from surgeon.coupling.ignore import path_of

    return path_of(model, module, "ignore has")


def _check_choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise InputError(f"unknown {name} {value!r}", fix=f"use one of {', '.join(known)}")


def _check_method(method: Method, data: object) -> None:
    if not callable(method):
        _check_choice("method", method, METHODS)
    if method in ("gradient", "taylor") and data is None:
        raise InputError(
            f"method {method!r} looks at data, and there is none",
            fix="pass data=[...], batches as the model takes them",
        )


def _scores(
    model: nn.Module,
    sites: Sites,
    method: Method,
    data: Iterable[Any] | None,
    loss: Callable[[Any, Any], Tensor] | None,
) -> Mapping[str, Tensor]:
    weights = {name: sites.weight(name) for name in sites.found}
    if method == "l1":
        return {name: weight.abs() for name, weight in weights.items()}
    if not isinstance(method, str):
        return _own(weights, method)
    batches = list(data or ())
    if not batches:
        raise InputError("data holds no batch", fix="pass a list of batches, or a fresh iterator")
    surgery = inspect(model, batches[0][0] if loss is not None else batches[0])
    found = gather(
        {"gradients"}, model=model, graph=surgery.graph, propagation=surgery.propagation, solution=surgery.solution,
        groups=[], data=batches, loss=loss,
    )  # fmt: skip
    result = {}
    for name, weight in weights.items():
        known = found.gradients.get(name) or found.gradients.get(f"{name}{ORIG}")
        if known is None:
            result[name] = torch.zeros_like(weight)
            continue
        mask = sites.mask(name)
        size = known.square.sqrt() if method == "gradient" else (known.total * weight).abs()
        result[name] = size.to(weight.dtype) if mask is None else size.to(weight.dtype) * mask
    return result


def _own(weights: Mapping[str, Tensor], method: Callable[[str, Tensor], Tensor]) -> Mapping[str, Tensor]:
    """Scores of the user's own, moved so that none is below zero."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        score = method(name, weight.clone())
        if (
            not isinstance(score, Tensor)
            or score.shape != weight.shape
            or not bool(torch.isfinite(score).all())
        ):
            raise InputError(
                "the method gives no finite number for each entry",
                where=name,
                fix=f"return a tensor of shape {tuple(weight.shape)}",
            )
        found[name] = score.detach().to(weight.dtype)
    least = min(float(score.min()) for score in found.values())
    return {name: score - least for name, score in found.items()}


__all__ = ["MASK", "METHODS", "sparsify"]
