"""Your own criterion, and layers that must stay as they are.

A criterion is a function (group, tensors) -> one score per unit of the group; units with low scores leave
first. A group's members say which entries of which tensors belong to each unit: tensor `member.tensor`, dim
`member.dim`, and for every entry `member.index[i]` of that dim the unit `member.unit[i]` that it belongs to.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

import surgeon
from surgeon.coupling.groups import Group


def loudest_weight(group: Group, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """A unit is worth its largest weight, over all tensors that hold it."""
    scores = np.zeros(group.units)
    for member in group.members:
        weight = tensors[member.tensor].detach().movedim(member.dim, 0)
        loudest = weight.reshape(len(weight), -1).abs().amax(1).numpy()
        np.maximum.at(scores, member.unit, loudest[member.index])
    return scores


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
x = torch.randn(8, 16)
with torch.no_grad():
    model[0].weight[7] = 10.0  # neuron 7 is loud: this criterion keeps it
    model[0].weight[9] = 0.0  # neuron 9 is silent, in itself and in what reads it: it leaves
    model[0].bias[9] = 0.0
    model[2].weight[:, 9] = 0.0

surgery = surgeon.inspect(model, x)
plan = surgery.plan(ratio=0.5, criterion=loudest_weight, ignore=["2"])  # or ignore=[model[2]]
small = plan.apply(model)

print(plan)
print(
    "widths:",
    [layer.out_features for layer in small if isinstance(layer, nn.Linear)],
    "(layer 2 keeps its 48)",
)
kept = plan.kept["0.weight"][0]
print("neuron 7 stays:", 7 in kept, "- neuron 9 leaves:", 9 not in kept)
print(surgeon.verify(model, small, plan, x))
