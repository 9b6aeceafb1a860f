"""The five-line use: a model, half of its channels gone, the same call as before."""

import torch
from torch import Tensor, nn

import surgeon


class Net(nn.Module):
    """A small residual network: its two convolutions are added, so their channels must leave together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


model = Net()
x = torch.randn(1, 3, 32, 32)

# shrink in one call: a new module of the same class, proven in float64; `model` is not touched
small = surgeon.shrink(model, 0.5, example_inputs=x)
print("one call:", model.stem[0], "->", small.stem[0])

# or step by step, to look at what happens and keep the plan
surgery = surgeon.inspect(model, x)
print(surgery)
plan = surgery.plan(ratio=0.5)
print(plan)
small = plan.apply(model)
print(surgeon.verify(model, small, plan, x))
