"""Models on the meta device: recorded, planned and cut by their shapes alone; the plan fits the real
model.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import CaptureError


class Decoder(nn.Module):
    """Grouped-query attention with rotary positions and a mask that the code looks at, then a gated layer."""

    def __init__(self, heads: int = 4, shared: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.heads, self.shared, self.dim = heads, shared, dim
        self.tokens = nn.Embedding(11, 24)
        self.q, self.k = nn.Linear(24, heads * dim, bias=False), nn.Linear(24, shared * dim, bias=False)
        self.v, self.o = nn.Linear(24, shared * dim, bias=False), nn.Linear(heads * dim, 24, bias=False)
        self.gate, self.up, self.down = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)
        self.head = nn.Linear(24, 11)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.tokens(ids)
        n = ids.shape[1]
        causal = torch.arange(n, device=x.device)[:, None] >= torch.arange(n, device=x.device)[None]
        if mask is not None and not mask.all():  # a decision that reads values
            causal = causal & mask[:, None, None, :]
        q = self.q(x).view(*ids.shape, -1, self.dim).transpose(1, 2)
        k, v = (f(x).view(*ids.shape, -1, self.dim).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.shared, dim=1) for t in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=causal).transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Decoder()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_plan_by_shapes_alone_fits_the_real_model(device: str) -> None:
    ids = torch.ones(2, 5, dtype=torch.int64, device=device)
    surgery = surgeon.inspect(on_meta(), {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)})
    assert any("no values" in remark for remark in surgery.remarks)
    plan = surgery.plan(0.5, round_to=1)
    real = Decoder()
    own = surgeon.inspect(real, torch.ones(2, 5, dtype=torch.int64))
    assert [(g.slots, g.steps) for g in surgery.groups] == [(g.slots, g.steps) for g in own.groups]
    assert (plan.params, plan.macs) == (own.plan(0.5, round_to=1).params, own.plan(0.5, round_to=1).macs)
    assert plan.kept["up.weight"][0] == list(range(20))
    shapes = plan.apply(surgery.model)
    assert all(p.is_meta for p in shapes.parameters())
    small = plan.apply(real)
    assert surgeon.verify(real, small, plan, torch.ones(2, 5, dtype=torch.int64)).error < 1e-9
    assert {n: p.shape for n, p in small.named_parameters()} == {
        n: p.shape for n, p in shapes.named_parameters()
    }


def test_control_flow_that_reads_a_weight_is_refused() -> None:
    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(self.bias.sum()) > 0 else x

    with pytest.raises(CaptureError, match="meta"):
        surgeon.inspect(Reads(4, 4, device="meta"), torch.ones(1, 4, device="meta"))
