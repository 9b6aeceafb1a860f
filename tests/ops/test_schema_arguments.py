"""Arguments by name: whatever the order, and with the defaults of the schema."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Spec
from surgeon.ops.masked_op import MaskedOp
from surgeon.ops.table import absent_of, op_name

aten = torch.ops.aten


def called(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    return fx.Graph().call_function(op, args, kwargs)


def test_defaults_stand_in() -> None:
    found = arguments(called(aten.slice.Tensor, "x", 1))
    assert dict(found) == {"self": "x", "dim": 1, "start": None, "end": None, "step": 1}


def test_one_argument_has_one_name_wherever_it_stands() -> None:
    by_place = arguments(called(aten.topk.default, "x", 3, 1))
    by_name = arguments(called(aten.topk.default, "x", k=3, dim=1))
    assert dict(by_place) == dict(by_name)


def test_alternatives() -> None:
    found = arguments(called(aten.pixel_shuffle.default, "x", 2))
    assert found["downscale_factor|upscale_factor"] == 2
    assert found.get("groups") is None
    with pytest.raises(KeyError, match=r"pixel_shuffle.* has no argument groups"):
        found["groups"]


KERNELS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [  # q, k, v and a mask; causal, scale 0.3
    (aten._scaled_dot_product_flash_attention_for_cpu.default, (0.0, True), {"attn_mask": "m", "scale": 0.3}),
    (aten._scaled_dot_product_efficient_attention.default, ("m", False, 0.0, True), {"scale": 0.3}),
    (aten._scaled_dot_product_cudnn_attention.default, ("m", False, 0.0, True), {"scale": 0.3}),
    (aten._scaled_dot_product_fused_attention_overrideable.default, ("m", 0.0, True), {"scale": 0.3}),
]


@pytest.mark.parametrize(("op", "rest", "named"), KERNELS, ids=lambda item: getattr(item, "_opname", ""))
def test_every_attention_kernel_is_read_alike(op: Any, rest: Any, named: Any) -> None:
    found = arguments(called(op, "q", "k", "v", *rest, **named))
    read = [found[name] for name in ("query", "key", "value", "attn_bias|attn_mask", "is_causal", "scale")]
    assert read == ["q", "k", "v", "m", True, 0.3]


@pytest.mark.parametrize(("op", "rest", "named"), KERNELS, ids=lambda item: getattr(item, "_opname", ""))
@pytest.mark.parametrize("causal", [False, True])
def test_the_proof_computes_what_every_attention_kernel_does(
    op: Any, rest: Any, named: Any, causal: bool
) -> None:
    """Each kernel's arguments, also those of kernels that run on no CPU, against torch's own definition."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, m = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 3), (5, 5))
    )
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in "qkvm"}
    given = [nodes["m"] if item == "m" else causal if item is True else item for item in rest]
    options = {key: nodes["m"] if item == "m" else item for key, item in named.items()}
    node = graph.call_function(op, (nodes["q"], nodes["k"], nodes["v"], *given), options)
    for name, tensor in zip("qkvm", (q, k, v, m), strict=True):
        nodes[name].meta["spec"] = Spec(tuple(tensor.shape), tensor.dtype)
    node.meta["spec"] = (Spec((2, 4, 5, 3), q.dtype), *(None for _ in op._schema.returns[1:]))
    values: dict[fx.Node, Any] = dict(zip(nodes.values(), ((t, ()) for t in (q, k, v, m)), strict=True))
    call = MaskedOp(node, op_name(node), arguments(node), values)
    (got, mask), *_ = absent_of(node)(call)
    allowed = m.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf) if causal else m
    want = F.scaled_dot_product_attention(q, k, v, allowed, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert mask == ()
