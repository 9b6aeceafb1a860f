"""The Python blocks of the README and of docs/ run as they are printed, and their tables quote what was
measured.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon

ROOT = Path(__file__).parents[2]
ELSEWHERE = (
    "timm.create_model",
    "lightning.LightningModule",
    "Trainer(model",
    "YOLO(",
    "peft_model",
    "lightning.Callback",
    "TrainerCallback",
    "AutoModel",
    "input_ids",
    "Family.MOVEMENT",
    "Family.CONTRACTION",
)  # what other packages or files run


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv3, self.bn3 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn3(self.conv3(self.bn1(self.conv1(x)).relu()))).relu()


def make() -> nn.Module:
    torch.manual_seed(0)
    blocks = {f"layer{n}": nn.Sequential(Block(32)) for n in (2, 3, 4)}
    tail = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "head": nn.Linear(32, 10)}
    return nn.Sequential(OrderedDict({"stem": nn.Conv2d(3, 32, 3), **blocks, **tail})).eval()


def names() -> dict[str, Any]:
    """What the blocks take as given."""
    model, x, generator = make(), torch.randn(2, 3, 12, 12), torch.Generator().manual_seed(1)
    train = [(torch.randn(8, 3, 12, 12, generator=generator), torch.arange(8) % 10) for _ in range(6)]
    surgery = surgeon.inspect(model, x)
    return {
        "surgeon": surgeon, "torch": torch, "itertools": itertools, "model": model, "x": x, "factory": make, "surgery": surgery,
        "plan": surgery.plan(0.5), "train": train, "loader": train, "labelled": train, "held_out": train[:1],
        "batches": [x for x, _ in train], "cross_entropy": F.cross_entropy, "loss": F.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
    }  # fmt: skip


def blocks(path: Path) -> list[str]:
    return [
        b
        for b in re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
        if not any(word in b for word in ELSEWHERE)
    ]


def before_budgets(given: dict[str, Any], part: int) -> None:
    if part == 1:
        accuracies = iter((0.99, 0.95, 0.92, 0.5))
        given |= {"accuracy": lambda model: next(accuracies), "train": lambda model: model.train()}


def before_deployment(given: dict[str, Any], part: int) -> None:
    surgeon.export(given["model"], "before.onnx", given["x"])


def before_training(given: dict[str, Any], part: int) -> None:
    if part == 1:
        given |= {
            "surgery": surgeon.inspect(given["model"], given["x"]),
            "plan": surgeon.inspect(given["model"]).plan(0.5),
        }
        given["small"] = given["plan"].apply(given["model"])
    if part == 3:
        given["model"] = copy.deepcopy(given["model"])
        given["surgery"] = surgeon.inspect(given["model"], given["x"])
        given["reg"] = surgeon.regularizer(given["surgery"], "l0", 1e-4)
    if part == 4:
        given["plan"] = surgeon.inspect(given["model"], given["x"]).plan(0.5)
        given["optimizer"] = torch.optim.SGD(given["model"].parameters(), 0.01)
    if part == 5:
        from surgeon.training import Average

        given |= {
            "total_steps": 200, "average": Average(given["model"], 0.999), "parameters": list(given["model"].parameters()),
            "output": torch.randn(4, 10), "teacher_output": torch.randn(4, 10), "y": torch.arange(4),
            "optimizer": torch.optim.SGD(given["model"].parameters(), 0.01), "cross_entropy": F.cross_entropy,
        }  # fmt: skip


BEFORE: dict[str, Callable[[dict[str, Any], int], None]] = {
    "budgets.md": before_budgets, "deployment.md": before_deployment, "training.md": before_training,
}  # fmt: skip


@pytest.mark.parametrize(
    "path", [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks(p)], ids=str
)
def test_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("surgeon.recovery.distill._STEPS", 1)  # a few show that the lines run
    given = names()
    for part, block in enumerate(blocks(path)):
        BEFORE.get(path.name, lambda given, part: None)(given, part)
        exec(compile(block, f"{path}, block {part + 1}", "exec"), given)


QUOTED = re.compile(r"<!-- table: (\S+) -->\n\|.*\n\| ---.*\n((?:\|.*\n)+)")


def quotes() -> list[tuple[str, str, str]]:
    """(file, source of the table, row) of every row that is said to be measured."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [(path.name, source, rows) for path in files for source, rows in QUOTED.findall(path.read_text())]
    return [(name, source, row) for name, source, rows in found for row in rows.splitlines()]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def within(part: list[str], whole: list[str]) -> bool:
    """Whether the cells are some of a row's, in its order."""
    rest = iter(whole)
    return all(cell in rest for cell in part)


def test_tables_quote_results() -> None:
    assert {name for name, _, _ in quotes()} >= {"README.md", "latency.md"}
    for name, source, row in quotes():
        measured = [cells(line) for line in (ROOT / source).read_text().splitlines() if line.startswith("|")]
        assert any(within(cells(row), line) for line in measured), (
            f"{name} quotes {row}, which {source} does not hold"
        )


MARKED = re.compile(r"<!-- numbers: ([^\n]+?) -->\n((?:.+\n)+)")
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")


def unquoted(text: str, measured: str) -> list[str]:
    """Numbers of a marked paragraph that no result holds; single digits and what stands in code or links are left out."""
    said = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    known = set(NUMBER.findall(measured))
    return [number for number in NUMBER.findall(said) if len(number) > 1 and number not in known]


def test_prose_quotes_results() -> None:
    """A paragraph below `<!-- numbers: FILE ... -->` says only numbers that one of the files holds."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    marked = [(path.name, *found) for path in files for found in MARKED.findall(path.read_text())]
    assert {name for name, _, _ in marked} >= {"README.md", "deployment.md"}
    for name, sources, text in marked:
        measured = " ".join((ROOT / source).read_text() for source in sources.split())
        assert not unquoted(text, measured), f"{name} says numbers that {sources} does not hold"


def test_a_number_that_was_not_measured_is_found() -> None:
    assert unquoted("of 852 cuts `1.5` finds 850, [x](y23) in 1 of 2", "| 852 | 851 | 1.5 |") == ["850"]


def test_what_is_quoted_wrongly_is_found() -> None:
    assert within(["resnet50", "2"], ["resnet50", "1", "2"])
    assert not within(["resnet50", "3"], ["resnet50", "1", "2"])
    assert not within(["2", "resnet50"], ["resnet50", "1", "2"])
