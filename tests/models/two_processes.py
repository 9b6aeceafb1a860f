"""What each of several processes does for test_distributed.py.

`torchrun two_processes.py folder` writes there what it saw; without a folder it ends right after a fine-tune.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import surgeon
from surgeon.errors import SurgeonError
from surgeon.training import Distillation, Features

G = torch.Generator().manual_seed(5)
X = torch.randn(32, 3, 6, 6, generator=G, dtype=torch.float64)
Y = torch.randint(0, 4, (32,), generator=G)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu().flatten(1))


def made() -> Net:
    torch.manual_seed(0)
    return Net().double()


def cut(model: Net) -> tuple[surgeon.Surgery, surgeon.Plan]:
    surgery = surgeon.inspect(model, X[:2])
    return surgery, surgery.plan(0.25, round_to=1, criterion="random", seed=3)


def plans(model: Net) -> list[str]:
    """By weights, by a seed, by data; within one width, under a budget, and over all groups."""
    surgery = surgeon.inspect(model, X[:2])
    data = {"data": [(X, Y)], "loss": F.cross_entropy}
    found = [
        surgery.plan(0.25, round_to=1),
        surgery.plan(0.25, round_to=1, criterion="random", seed=3),
        surgery.plan(macs=0.5, round_to=1, criterion="taylor", scope="global", **data),
        surgery.plan(params=0.5, round_to=1, criterion="obs", scope="knapsack", **data),
    ]
    return [plan.to_json() for plan in found]


def gradients(model: nn.Module, wrapped: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    F.cross_entropy(wrapped(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def batches(rank: int, processes: int) -> list[tuple[Tensor, Tensor]]:
    """One process sees 4 batches of 8; two see 8 batches of 4, of which each takes every second one."""
    return list(zip(X.split(8 // processes), Y.split(8 // processes), strict=True))


def fine_tuned(processes: int, checkpoint: Path | None = None) -> tuple[nn.Module, Any, Tensor]:
    """Distillation, gates, a moving average, and with a checkpoint also features: all that must be
    synchronised.
    """
    teacher = made()
    surgery, plan = cut(teacher)
    small = plan.apply(teacher)
    gates = surgeon.regularizer(surgeon.inspect(small, X[:2]), "l0", 1e-2)
    rule = Distillation(2.0, 0.5)
    if checkpoint is not None:
        rule = Distillation(2.0, 0.5, features=Features(surgery, plan, ["b"]), feature_epochs=1)
    done = surgeon.finetune(
        small, batches(0, processes), epochs=3, rate=1e-2, teacher=teacher, distillation=rule, regularizer=gates,
        average=0.9, clip=("norm", 1.0), evaluate=[(X, Y)], keep="last", checkpoint=checkpoint,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )  # fmt: skip
    (alpha,) = gates.parameters()
    return small, done.history, alpha.detach()


class Seen(nn.Module):
    """Remembers which samples it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.seen = nn.Linear(1, 2), nn.BatchNorm1d(2), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.flatten().long().tolist())
        return self.norm(self.layer(x))


class Slow:
    """Takes a second to go."""

    def __del__(self) -> None:
        time.sleep(1)


def drop_slowly() -> None:
    """Leave to a thread of the process group the last reference to a tensor, whose end needs Python for a
    while.
    """
    tensor = torch.ones(1)
    tensor.slow = Slow()  # type: ignore[attr-defined]  # a tensor takes any attribute
    dist.all_reduce(tensor, async_op=True)


def threads() -> list[str]:
    """Of process groups; none where the system does not say."""
    found = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in found if "gloo" in name]


def short() -> None:
    """A script that leaves it to `finetune` to set processes up, and says nothing of their end."""
    surgeon.finetune(nn.Linear(2, 2), [(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))] * 2, epochs=1)
    drop_slowly()


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"size": dist.get_world_size()}

    model = made()
    surgery, plan = cut(model)
    found["plans"] = plans(model)
    other = surgery.plan(0.5, criterion="random", seed=10 + rank)
    found["mine"] = other.to_json()
    found["broadcast"] = surgeon.broadcast_plan(other if rank else None, source=1).to_json()
    try:
        surgeon.broadcast_plan(None if rank == 0 else other)
    except SurgeonError as error:
        found["error"] = [type(error).__name__, error.what]

    small = plan.apply(model)
    half = slice(16 * rank, 16 * rank + 16)
    averaged = gradients(small, DistributedDataParallel(small), X[half], Y[half])

    tuned, history, alpha = fine_tuned(2)
    found["history"] = [[epoch.loss, epoch.accuracy, epoch.score] for epoch in history]
    runs = [
        fine_tuned(2, folder / "run.ckpt") for _ in range(2)
    ]  # the second one finds the first one's checkpoint
    same = [torch.equal(a, b) for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True)]
    found["again"] = runs[0][1] == runs[1][1] and all(same)

    torch.manual_seed(0)
    seen = Seen()
    data = TensorDataset(torch.arange(24.0)[:, None], torch.zeros(24, dtype=torch.int64))
    torch.manual_seed(100 + rank)  # processes may well have drawn different numbers before
    surgeon.finetune(seen, DataLoader(data, batch_size=4, shuffle=True), epochs=2)
    found["seen"] = seen.seen

    tensors = {"gradients": averaged, "tuned": tuned.state_dict(), "alpha": alpha, "seen": seen.state_dict()}
    torch.save(tensors, folder / f"{rank}.pt")
    found["threads"] = [threads()]
    dist.destroy_process_group()
    found["threads"].append(threads())
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1])) if sys.argv[1:] else short()
