"""Small models on disk: they come back as they were, per-layer widths, mended code and tied weights
included.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from motifs import Flatten, Tied
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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


def test_modes_and_dtypes_come_back(tmp_path: Path) -> None:
    small = surgeon.shrink(Net().eval(), 0.5, example_inputs=X, round_to=1)
    for mode in (True, False):
        small.train(mode).n.train(not mode)
        surgeon.save(small, tmp_path)
        back = surgeon.load(tmp_path, Net)
        assert [m.training for m in back.modules()] == [m.training for m in small.modules()]
    surgeon.save(small.half(), tmp_path)
    back = surgeon.load(tmp_path, Net)
    assert {p.dtype for p in back.parameters()} == {torch.float16}
    assert {n: b.dtype for n, b in back.named_buffers() if n != "table"} == {
        n: b.dtype for n, b in small.named_buffers() if n != "table"
    }


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    small = surgeon.shrink(Net().eval(), 0.5, example_inputs=X, round_to=1)
    texts = {
        surgeon.save(small, tmp_path / str(n)).joinpath("model.safetensors").read_bytes() for n in range(6)
    }
    assert len(texts) == 1


def test_a_plan_of_other_weights_is_refused(tmp_path: Path) -> None:
    """Same widths, other channels: each file is whole, and they are not of one model."""
    for seed in (0, 1):
        small = surgeon.shrink(Net().eval(), 0.5, example_inputs=X, round_to=1, criterion="random", seed=seed)
        surgeon.save(small, tmp_path / str(seed))
    plan = tmp_path / "1" / "plan.json"
    plan.write_bytes((tmp_path / "0" / "plan.json").read_bytes())
    with pytest.raises(PlanError, match="not that of the weights"):
        surgeon.load(tmp_path / "1", Net)
    plan.unlink()
    assert torch.equal(surgeon.load(tmp_path / "1", Net)(X), small(X))
    save_file(small.state_dict(), tmp_path / "1" / "model.safetensors")
    with pytest.raises(PlanError, match="hold no plan"):
        surgeon.load(tmp_path / "1", Net)


def test_modes_that_are_none(tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    for modes in ("", "x", "[]", "[" * 100_000, '{"training": 1}', '{"training": true, "except": ["none"]}'):
        save_file(load_file(path), path, {**metadata, "surgeon.training": modes})
        with pytest.raises(PlanError, match=r"in which mode|no module 'none'"):
            surgeon.load(tmp_path, Net)


def test_damaged_weights(tmp_path: Path) -> None:
    """One byte changed or the end missing: an error of the family, or a model whose weights differ by that byte."""
    path = saved(tmp_path) / "model.safetensors"
    (tmp_path / "plan.json").unlink()
    whole, places = path.read_bytes(), range(0, path.stat().st_size, 41)
    assert len(places) > 50
    for place in places:
        for data in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xA5]) + whole[place + 1 :]):
            path.write_bytes(data)
            try:
                assert isinstance(surgeon.load(tmp_path, Net), Net)
            except SurgeonError as error:
                assert str(tmp_path) in str(error) or "Net" in str(error)


PICKLED = """
import sys
sys.modules["surgeon"] = None
import torch
model = torch.load(sys.argv[1], weights_only=False)
assert type(model) is torch.nn.Sequential, type(model)
print(tuple(model(torch.randn(2, 6)).shape), model[0].out_features)
"""


def test_a_model_whose_code_is_as_it_was_unpickles_without_surgeon(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    for number, small in enumerate(
        (
            surgeon.shrink(model, 0.5, example_inputs=torch.randn(2, 6), round_to=1),
            surgeon.inspect(model, torch.randn(2, 6)).plan(0.5, round_to=1).apply(model),
        )
    ):
        torch.save(small, tmp_path / f"{number}.pt")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PICKLED, str(tmp_path / f"{number}.pt")],
            capture_output=True,
            text=True,
        )
        assert done.stdout.split("\n")[0] == "(2, 3) 4", done.stderr


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
    saved(tmp_path)
    body = json.loads((tmp_path / "plan.json").read_text())
    body["kept"]["a.weight"]["0"] = [0]
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(PlanError, match="changed after it was written"):
        surgeon.load(tmp_path, Net)


def test_a_head_that_was_replaced_after_the_cut(tmp_path: Path) -> None:
    """The plan is for the original; what was done since is done again between plan and weights."""

    def new_head(model: Any) -> None:
        model.c = nn.Linear(model.c.in_features, 7)

    def same(left: nn.Module, right: nn.Module) -> None:
        assert torch.equal(left.eval()(X), right.eval()(X))

    small = surgeon.shrink(Net().eval(), 0.4, example_inputs=X)
    new_head(small)
    surgeon.save(small, tmp_path)
    with pytest.raises(InputError, match=r"size mismatch for c(.|\n)*after_cut=lambda small"):
        surgeon.load(tmp_path, Net)
    same(surgeon.load(tmp_path, Net, after_cut=new_head), small)
    again = surgeon.shrink(small, 0.4, example_inputs=X)
    assert len(surgeon.Plan.of(again)) == 2
    surgeon.save(again, tmp_path)
    same(surgeon.load(tmp_path, Net, after_cut=[new_head, None]), again)
    with pytest.raises(PlanError, match="another architecture"):
        surgeon.load(tmp_path, Net, after_cut=new_head)
    for wrong in ([new_head], 7, [7, None]):
        with pytest.raises(InputError, match="this model was cut 2 times"):
            surgeon.load(tmp_path, Net, after_cut=wrong)  # type: ignore[arg-type]  # on purpose
