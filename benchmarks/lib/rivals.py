"""What torch-pruning has to be told about attention, and what it leaves to its users after a cut; as in its
own examples.
"""

from __future__ import annotations

from torch import nn

_PROJECTIONS = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_HEADS, _WIDTHS = ("heads", "n_heads", "num_attention_heads"), ("dim", "all_head_size")


def _attentions(model: nn.Module) -> list[tuple[nn.Module, list[nn.Linear], int]]:
    """(module, its projections, its heads) of every attention that is made of three linear layers."""
    found = []
    for module in model.modules():
        for names in _PROJECTIONS:
            if hasattr(module, names[0]):
                heads = next(getattr(module, name) for name in _HEADS if hasattr(module, name))
                found.append((module, [getattr(module, name) for name in names], heads))
    return found


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """The heads of every attention, by its projections."""
    whole: dict[nn.Module, int] = {
        m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    }
    return whole | {layer: heads for _, layers, heads in _attentions(model) for layer in layers}


def repair(model: nn.Module) -> None:
    """Set the sizes that the code reads to those of the weights."""
    for module in model.modules():
        if hasattr(module, "conv_proj"):
            module.hidden_dim = module.conv_proj.out_channels
    for module, layers, heads in _attentions(model):
        if hasattr(module, "attention_head_size"):
            module.attention_head_size = layers[0].out_features // heads
            for name in _WIDTHS:
                if hasattr(module, name):
                    setattr(module, name, layers[0].out_features)
