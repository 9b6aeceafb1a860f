"""The parts of training in loops that are not surgeon's: what docs/training.md shows for the HF Trainer and
for Lightning.

Those packages are not part of `make test`: the tests that need them say so and are skipped there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.training import soft_targets

G = torch.Generator().manual_seed(5)
X, Y = torch.randn(32, 6, generator=G), torch.randint(0, 4, (32,), generator=G)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.head = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.n(self.a(x)).relu())


def made() -> Any:
    torch.manual_seed(0)
    return Net()


def by_hand(model: Any, teacher: nn.Module, reg: surgeon.training.Regularizer) -> None:
    """Four steps of SGD on batches of eight, in order."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for x, y in zip(X.split(8), Y.split(8), strict=True):
        optimizer.zero_grad()
        output = model(x)
        with torch.no_grad():
            theirs = teacher(x)
        (F.cross_entropy(output, y) + soft_targets(output, theirs)).backward()
        reg.step()
        optimizer.step()


def prepared() -> tuple[Any, nn.Module, surgeon.training.Regularizer, Any]:
    """A model, its teacher and regulariser; and a twin that the plain loop has trained."""
    teacher = made().eval()
    models, regs = zip(
        *[(m, surgeon.regularizer(surgeon.inspect(m, X[:2]), "group_lasso", 0.01)) for m in (made(), made())],
        strict=True,
    )
    by_hand(models[1], teacher, regs[1])
    return models[0], teacher, regs[0], models[1]


def same(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_hf_trainer(tmp_path: Path) -> None:
    try:
        from transformers import Trainer, TrainerCallback, TrainingArguments
    except ImportError:
        pytest.skip("needs transformers")
    model, teacher, reg, want = prepared()

    class Penalty(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            reg.step()

    class Distilling(Trainer):
        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
        ) -> Any:
            output = model(inputs["x"])
            with torch.no_grad():
                theirs = teacher(inputs["x"])
            return F.cross_entropy(output, inputs["labels"]) + soft_targets(output, theirs)

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(range(len(X)))

    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=8, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0.0, lr_scheduler_type="constant", label_names=["labels"],
    )  # fmt: skip
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Distilling(
        model, arguments, train_dataset=data, callbacks=[Penalty()], optimizers=(optimizer, None)
    ).train()
    same(model, want)


def test_lightning() -> None:
    """Also a cut in the middle of the training: the optimizer goes on with the small model."""
    lightning = pytest.importorskip("lightning.pytorch")
    model, teacher, reg, want = prepared()
    widths = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            widths.append(self.model.a.out_features)
            output = self.model(batch[0])
            with torch.no_grad():
                theirs = teacher(batch[0])
            return F.cross_entropy(output, batch[1]) + soft_targets(output, theirs)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    class Pruning(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 0:
                reg.step()

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                same(module.model, want)
                plan = surgeon.inspect(module.model, X[:2]).plan(0.5)
                module.model = plan.apply(module.model, optimizer=trainer.optimizers[0])
                self.before = [p.detach().clone() for p in module.model.parameters()]

    pruning = Pruning()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[pruning],
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8))
    assert widths == [32] * 4 + [16] * 4
    assert all(
        not torch.equal(p, before)
        for p, before in zip(module.model.parameters(), pruning.before, strict=True)
    )
