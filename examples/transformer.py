"""Shrink a vision transformer: whole attention heads, MLP neurons and the embedding leave.

The recorded run shows how channels reach the heads, so nothing has to be said about the architecture.
"""

import torch
from torch import Tensor, nn

import surgeon


class TinyViT(nn.Module):
    def __init__(self, width: int = 64, heads: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=8, stride=8)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, dim_feedforward=4 * width, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(x).mean(1))


def sizes(model: TinyViT) -> str:
    """What the first layer says of itself; `shrink` keeps such attributes true."""
    layer = model.encoder.layers[0]
    attention = layer.self_attn
    embedding = attention.out_proj.out_features
    heads, embedding, neurons = (
        attention.num_heads,
        attention.out_proj.out_features,
        layer.linear1.out_features,
    )
    return f"{heads} heads of {attention.head_dim}, {neurons} neurons, embedding {embedding}"


torch.manual_seed(0)
model = TinyViT().eval()
x = torch.randn(2, 3, 32, 32)

surgery = surgeon.inspect(model, x)
print(surgery)
print("\nbefore:", sizes(model))
for ratio in (0.25, 0.5, 0.75):
    plan = surgery.plan(ratio)
    small = plan.apply(model)
    print(f"ratio {ratio}: {sizes(small)}; {plan}")
    print(surgeon.verify(model, small, plan, x))
