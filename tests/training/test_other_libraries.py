"""The recipes of docs/libraries.md, run as they stand there.

Those libraries are not part of `make test`: the tests that need them say so and are skipped there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import surgeon
from surgeon.errors import InputError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "libraries.md"
G = torch.Generator().manual_seed(5)
X, Y = torch.randn(32, 6, generator=G), torch.randint(0, 4, (32,), generator=G)
pytestmark = pytest.mark.filterwarnings("ignore")


def block(title: str) -> str:
    """The Python lines of a section."""
    section = DOCS.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    (found,) = re.findall(r"```python\n(.*?)```", section, re.S)
    return str(found)


def run(lines: str, **names: Any) -> dict[str, Any]:
    given = {"surgeon": surgeon, "torch": torch, "nn": nn, **names}
    exec(compile(lines, str(DOCS), "exec"), given)
    return given


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.head = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.n(self.a(x)).relu())


def same(left: nn.Module, right: nn.Module) -> None:
    theirs = right.state_dict()
    assert left.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in left.state_dict().items())


def test_plans_of_a_model() -> None:
    model = Net().eval()
    assert surgeon.Plan.of(model) == []
    once = surgeon.shrink(model, 0.5, example_inputs=X[:2])
    twice = surgeon.shrink(once, 0.5, example_inputs=X[:2])
    first, second = surgeon.Plan.of(twice)
    assert first.kept == surgeon.Plan.of(once)[0].kept
    again = second.apply(first.apply(model))
    same(again, twice)


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    small = run(block("timm"), timm=timm)["small"]
    assert small.fc.weight.shape == (7, 256) and small(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    base = run(block("Lightning"), lightning=lightning, Net=Net)["Module"]
    steps: list[int] = []

    class Module(base):  # type: ignore[misc, valid-type]  # a class made by the docs
        def training_step(self, batch: Any, _: int) -> Tensor:
            steps.append(self.model.a.out_features)
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def trainer(epochs: int) -> Any:
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip

    data = DataLoader(TensorDataset(X, Y), batch_size=16)
    module = Module()
    module.model = surgeon.shrink(module.model, 0.5, example_inputs=X[:2])
    once, kept = trainer(1), tmp_path / "one.ckpt"
    once.fit(module, data)
    once.save_checkpoint(kept)
    same(Module.load_from_checkpoint(kept), module)
    resumed, whole = Module(), trainer(2)
    whole.fit(resumed, data, ckpt_path=kept)
    trainer(2).fit(module, data, ckpt_path=kept)  # a module that is small already
    assert steps == [16] * 6
    same(resumed, module)


def test_trainer_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50,
    )  # fmt: skip
    model_class = transformers.BertForSequenceClassification
    made = model_class(config).eval()
    ids = torch.randint(0, 50, (8, 5), generator=G)
    small = surgeon.shrink(made, macs=0.5, example_inputs={"input_ids": ids}, outputs=["logits"])
    data = [{"input_ids": row, "labels": torch.tensor(place % 2)} for place, row in enumerate(ids)]

    def arguments(epochs: int) -> Any:
        return transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            save_strategy="epoch", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip

    transformers.Trainer(model=small, args=arguments(1), train_dataset=data).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    given = run(
        block("The Trainer of transformers"), checkpoint=checkpoint, config=config, data=data, arguments=arguments(2),
        Trainer=transformers.Trainer, Model=type("Model", (), {"from_config": model_class}),
    )  # fmt: skip
    resumed = given["small"]
    assert sum(p.numel() for p in resumed.parameters()) == sum(p.numel() for p in small.parameters())
    assert Path(tmp_path, "checkpoint-4").is_dir() and not Path(tmp_path, "checkpoint-6").exists()
    last = surgeon.load(tmp_path / "checkpoint-4", lambda: model_class(config))
    same(last, resumed)


def test_ultralytics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ultralytics = pytest.importorskip("ultralytics")
    from ultralytics.models.yolo.detect import DetectionTrainer

    cv2 = pytest.importorskip("cv2")
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for place in range(4):
        picture = torch.randint(0, 255, (64, 64, 3), generator=G, dtype=torch.uint8)
        cv2.imwrite(str(tmp_path / f"images/{place}.png"), picture.numpy())
        (tmp_path / f"labels/{place}.txt").write_text(f"{place % 2} 0.5 0.5 0.3 0.3\n")
    names = "".join(f"  {number}: class{number}\n" for number in range(80))
    Path(tmp_path, "data.yaml").write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames:\n{names}")
    monkeypatch.chdir(tmp_path)
    lines = block("ultralytics").replace("yolov8n.pt", "yolov8n.yaml").replace("640, 640", "64, 64")
    lines = lines.replace('format="onnx"', 'format="onnx", imgsz=64, simplify=False').replace(
        "epochs=20",
        "epochs=1, imgsz=64, batch=2, workers=0, plots=False, val=False, amp=False, device='cpu', project=str(project)",
    )
    monkeypatch.setattr(  # the last step of a training looks at the boxes that are left
        "ultralytics.engine.trainer.BaseTrainer.final_eval", lambda trainer: None
    )
    given = run(lines, YOLO=ultralytics.YOLO, DetectionTrainer=DetectionTrainer, project=tmp_path / "runs")
    whole = sum(p.numel() for p in ultralytics.YOLO("yolov8n.yaml").model.parameters())
    left = sum(p.numel() for p in given["yolo"].model.parameters())
    assert left < 0.4 * whole
    (last,) = tmp_path.glob("runs/**/last.pt")
    assert sum(p.numel() for p in ultralytics.YOLO(last).model.parameters()) == left
    assert Path("yolov8n.onnx").exists()


def test_peft(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=50,
    )  # fmt: skip
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=16, target_modules=["q_proj", "up_proj"])
    ).eval()
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(tensor, std=0.1, generator=G)
    ids = torch.randint(0, 50, (2, 5), generator=G)
    lines, _, merge = block("peft").strip().rpartition("\n")
    given = run(lines, peft_model=model, ids=ids)
    small = given["small"]
    want = small(ids).logits
    with pytest.raises(InputError, match="would not load again"):
        small.save_pretrained(tmp_path / "adapter")
    surgeon.save(small, tmp_path / "all")
    torch.testing.assert_close(surgeon.load(tmp_path / "all", lambda: model)(ids).logits, want)
    torch.testing.assert_close(run(merge, small=small)["merged"](ids).logits, want)
