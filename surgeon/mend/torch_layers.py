"""refresh(module): the numbers that torch's own layers keep beside their tensors, set from the tensors' shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from surgeon.errors import MendError


def _linear(m: Any) -> dict[str, Any]:
    return {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}


def _bilinear(m: Any) -> dict[str, Any]:
    return dict(zip(("out_features", "in1_features", "in2_features"), m.weight.shape, strict=True))


def _convolution(m: Any) -> dict[str, Any]:
    first, second = m.weight.shape[:2]
    return {"out_channels": first, "in_channels": second * m.groups}


def _transposed(m: Any) -> dict[str, Any]:
    first, second = m.weight.shape[:2]
    return {"in_channels": first, "out_channels": second * m.groups}


def _batch_norm(m: Any) -> dict[str, Any]:
    known = m.weight if m.weight is not None else m.running_mean
    return {} if known is None else {"num_features": known.shape[0]}


def _group_norm(m: Any) -> dict[str, Any]:
    return {} if m.weight is None else {"num_channels": m.weight.shape[0]}


def _layer_norm(m: Any) -> dict[str, Any]:
    return {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)}


def _embedding(m: Any) -> dict[str, Any]:
    return {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}


def _multihead(m: Any) -> dict[str, Any]:
    query = (
        m.q_proj_weight if m.in_proj_weight is None else m.in_proj_weight
    )  # what out_proj gives may be narrower
    sizes = {"embed_dim": query.shape[1], "head_dim": m.out_proj.weight.shape[1] // m.num_heads}
    if m.in_proj_weight is not None:
        sizes |= {"kdim": sizes["embed_dim"], "vdim": sizes["embed_dim"]}
    else:
        sizes |= {"kdim": m.k_proj_weight.shape[1], "vdim": m.v_proj_weight.shape[1]}
    return sizes


def _recurrent(m: Any) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    sizes = {"input_size": m.weight_ih_l0.shape[1], "hidden_size": m.weight_hh_l0.shape[0] // gates}
    if m.proj_size:
        sizes["proj_size"] = m.weight_hr_l0.shape[0]
        if sizes["proj_size"] >= sizes["hidden_size"]:
            raise MendError(
                f"an LSTM cannot project {sizes['hidden_size']} channels to {sizes['proj_size']}",
                why="torch wants proj_size < hidden_size",
                fix="remove the same share of both, or keep the layer with ignore=[...]",
            )
    return sizes


_LAYERS: tuple[tuple[tuple[type, ...], Callable[[Any], dict[str, Any]]], ...] = (
    ((nn.Linear,), _linear),
    ((nn.Bilinear,), _bilinear),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    ((nn.modules.batchnorm._NormBase,), _batch_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    ((nn.MultiheadAttention,), _multihead),
    ((nn.RNNBase,), _recurrent),
    ((nn.PReLU,), lambda m: {"num_parameters": m.weight.shape[0]}),
)


def refresh(module: nn.Module, path: str = "") -> None:
    """Set the numbers that one of torch's own layers keeps beside its tensors from their shapes."""
    for kinds, sizes in _LAYERS:
        if isinstance(module, kinds):
            try:
                for name, value in sizes(module).items():
                    if getattr(module, name, None) != value:
                        setattr(module, name, value)
            except AttributeError as error:
                raise MendError(
                    f"a {type(module).__name__} lacks an attribute that this layer has",
                    where=path,
                    why=str(error),
                ) from error
            return
