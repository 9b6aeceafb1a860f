"""Small models on disk: they come back as they were, per-layer widths, mended code and tied weights
included.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from motifs import Flatten, Tied
from torch import Tensor, nn

import surgeon
from surgeon.errors import InputError, PlanError, SurgeonError


class Net(nn.Module):
    """Per-layer widths, a literal in forward, batch norm statistics and a table that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.c = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 12, 3),
            nn.Linear(12 * 4, 5),
        )
        self.register_buffer("table", torch.linspace(-1, 1, 12).reshape(12, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.b(self.n(self.a(x)).relu()) + self.table).view(-1, 12 * 4))


X = torch.randn(2, 3, 6, 6)


def trained(model: nn.Module) -> nn.Module:
    """Other weights and statistics than the cut left."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.startswith("n."))):
            tensor.add_(torch.rand_like(tensor.float()).to(tensor.dtype))
    return model


@pytest.mark.parametrize("steps", [1, 2])
def test_a_saved_model_comes_back(tmp_path: Path, steps: int) -> None:
    torch.manual_seed(0)
    small = Net().eval()
    for _ in range(steps):
        small = surgeon.shrink(small, 0.4, example_inputs=X, scope="global", criterion="l2")
    trained(small)
    surgeon.save(small, tmp_path / "out")
    back = surgeon.load(tmp_path / "out", Net).eval()
    assert type(back).__name__ == "Net" and isinstance(back, Net)
    assert {n: p.shape for n, p in back.named_parameters()} == {
        n: p.shape for n, p in small.named_parameters()
    }
    assert torch.equal(back(X), small(X)) and torch.equal(back.table, small.table)


def test_fewer_plans_replace_more(tmp_path: Path) -> None:
    once = surgeon.shrink(Net().eval(), 0.3, example_inputs=X)
    surgeon.save(surgeon.shrink(once, 0.3, example_inputs=X), tmp_path)
    surgeon.save(once, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]
    assert torch.equal(surgeon.load(tmp_path, Net).eval()(X), once(X))


@pytest.mark.parametrize("make", [Tied, Flatten])
def test_tied_weights_and_literals(tmp_path: Path, make: type[nn.Module]) -> None:
    from motifs import MOTIFS

    motif = next(m for m in MOTIFS if m.make is make)
    model, x = make().eval(), torch.randn(motif.shape)
    small = surgeon.shrink(model, 0.5, example_inputs=x)
    surgeon.save(small, tmp_path)
    assert torch.equal(surgeon.load(tmp_path, make).eval()(x), small(x))


def test_models_without_a_plan_are_refused(tmp_path: Path) -> None:
    small = surgeon.shrink(Net().eval(), 0.5, example_inputs=X)
    for model in (Net(), surgeon.fuse(small, X)):
        with pytest.raises(InputError, match="carries no plan"):
            surgeon.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def saved(folder: Path) -> Path:
    return surgeon.save(surgeon.shrink(Net().eval(), 0.5, example_inputs=X, round_to=1), folder)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no saved model"):
        surgeon.load(tmp_path, Net)
    saved(tmp_path)
    with pytest.raises(PlanError, match="another architecture"):
        surgeon.load(tmp_path, lambda: nn.Linear(3, 4))
    with pytest.raises(InputError, match="without values"), torch.device("meta"):
        surgeon.load(tmp_path, Net)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SurgeonError, match="cannot read the weights"):
        surgeon.load(tmp_path, Net)
    body = json.loads((tmp_path / "plan.json").read_text())
    body["kept"]["a.weight"]["0"] = [0]
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(PlanError, match="changed after it was written"):
        surgeon.load(tmp_path, Net)
