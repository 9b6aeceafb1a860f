"""`save_pretrained` of small models: where no config says the widths that are left, it writes the plan beside the
weights, and `surgeon.load` restores the model.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgeon
from surgeon.errors import ConfigWarning, InputError, PlanError


@dataclasses.dataclass
class Config:
    hidden: int = 16
    inner: int = 24
    layers: int = 2

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        return cls(**values)

    @classmethod
    def from_pretrained(cls, folder: Any) -> Config:
        return cls(**json.loads(Path(folder, "config.json").read_text()))


class Net(nn.Module):
    """A class that builds itself from a config, and saves itself as libraries do: in one file or in parts."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Linear(5, config.hidden)
        self.up = nn.ModuleList(nn.Linear(config.hidden, config.inner) for _ in range(config.layers))
        self.down = nn.ModuleList(nn.Linear(config.inner, config.hidden) for _ in range(config.layers))
        self.head = nn.Linear(config.hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.head(x)

    def save_pretrained(
        self,
        folder: Any,
        is_main_process: bool = True,
        parts: int = 1,
        safe: bool = True,
        push_to_hub: bool = False,
        only: str = "",
    ) -> str:
        """Saves."""
        if not is_main_process:
            return "nothing"
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "config.json").write_text(json.dumps(self.config.to_dict()))
        state = {name: tensor for name, tensor in self.state_dict().items() if only in name}
        for part in range(parts):
            name = "model" if parts == 1 else f"model-{part + 1:05}-of-{parts:05}"
            tensors = dict([*state.items()][part::parts])
            if safe:
                save_file(tensors, Path(folder, f"{name}.safetensors"), {"format": "pt"})
            else:
                torch.save(tensors, Path(folder, f"{name}.bin"))
        return "saved"

    @classmethod
    def from_pretrained(cls, folder: Any) -> Net:
        model = cls(Config.from_pretrained(folder))
        model.load_state_dict(load_file(Path(folder, "model.safetensors")))
        return model.eval()


X = torch.randn(4, 5)


def cut(model: nn.Module | None = None, *ratios: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    made = Net(Config()).eval() if model is None else model
    ratio = ratios[0] if ratios else {"up.0": 0.5, "up.1": 0.25}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        return surgeon.shrink(made, ratio, example_inputs=X, round_to=1, **options)


def back(folder: Path) -> nn.Module:
    return surgeon.load(folder, lambda: Net(Config.from_pretrained(folder)))


@pytest.mark.parametrize("parts", [1, 3])
def test_what_no_config_says_comes_back_by_its_plan(tmp_path: Path, parts: int) -> None:
    small = cut()
    assert type(small) is Net
    with pytest.warns(
        ConfigWarning, match=r"surgeon\.load\(.*, lambda: Net\(Config\.from_pretrained\("
    ) as said:
        assert small.save_pretrained(tmp_path, parts=parts) == "saved"
    assert [warning.filename for warning in said] == [__file__]
    assert torch.equal(back(tmp_path)(X), small(X)) and not back(tmp_path).training
    assert surgeon.Plan.load(tmp_path / "plan.json").kept


@pytest.mark.filterwarnings("ignore::surgeon.errors.ConfigWarning")
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: cut(m, 0.2)]
)
def test_copies_save_themselves(tmp_path: Path, how: Callable[[nn.Module], Any]) -> None:
    small = cut()
    other = how(small)
    with torch.no_grad():
        other.head.bias += 1
    other.save_pretrained(tmp_path)
    assert torch.equal(back(tmp_path)(X), other(X)) and not torch.equal(other(X), small(X))
    restored = back(tmp_path)
    restored.save_pretrained(tmp_path)
    assert torch.equal(back(tmp_path)(X), other(X))


@pytest.mark.filterwarnings("error")
def test_a_config_that_says_the_widths_is_enough(tmp_path: Path) -> None:
    small = cut(None, 0.5)
    assert small.config.inner == 12 and "save_pretrained" not in vars(small)
    small.save_pretrained(tmp_path)
    assert torch.equal(Net.from_pretrained(tmp_path)(X), small(X))


@pytest.mark.filterwarnings("ignore::surgeon.errors.ConfigWarning")
def test_a_config_that_said_the_first_cut_is_that_of_the_original_again(tmp_path: Path) -> None:
    first = cut(None, 0.5)
    second = cut(first)
    second.save_pretrained(tmp_path)
    assert Config.from_pretrained(tmp_path) == Config() and second.config == first.config != Config()
    assert torch.equal(back(tmp_path)(X), second(X))


@pytest.mark.filterwarnings("ignore::surgeon.errors.ConfigWarning")
def test_parts_of_an_earlier_save_go(tmp_path: Path) -> None:
    small = cut()
    (tmp_path / "optimizer.pt").write_text("of the trainer")
    small.save_pretrained(tmp_path, parts=3)
    small.save_pretrained(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "optimizer.pt", "plan.json"]
    assert small.save_pretrained(tmp_path / "none", is_main_process=False) == "nothing"
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore::surgeon.errors.ConfigWarning")
def test_parts_of_two_saves_of_one_plan_are_refused(tmp_path: Path) -> None:
    small = cut()
    small.save_pretrained(tmp_path / "a", parts=2)
    with torch.no_grad():
        small.stem.weight += 1  # trained on
    small.save_pretrained(tmp_path / "b", parts=2)
    part = "model-00002-of-00002.safetensors"
    (tmp_path / "a" / part).write_bytes(
        (tmp_path / "b" / part).read_bytes()
    )  # as after a kill between two renames
    with pytest.raises(PlanError, match="of several saves"):
        back(tmp_path / "a")


@pytest.mark.filterwarnings("ignore::surgeon.errors.ConfigWarning")
def test_parts_of_two_saves_are_refused(tmp_path: Path) -> None:
    cut().save_pretrained(tmp_path / "a", parts=2)
    cut(None, {"up.0": 0.25}).save_pretrained(tmp_path / "b", parts=2)
    name = "model-00002-of-00002.safetensors"
    (tmp_path / "b" / name).replace(tmp_path / "a" / name)
    with pytest.raises(PlanError, match="several saves"):
        back(tmp_path / "a")


def test_what_would_not_load_is_refused(tmp_path: Path) -> None:
    small = cut()
    for options, said in (
        ({"push_to_hub": True}, "without the plan"),
        ({"safe": False}, "no safetensors file"),
        ({"only": "up"}, r"would not load again(.|\n)*stem.weight is missing"),
    ):
        with pytest.raises(InputError, match=said):
            small.save_pretrained(tmp_path / "out", **options)
    with pytest.raises(InputError, match="carries no plan"):
        surgeon.fuse(small, X).save_pretrained(tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_hub_mixin(tmp_path: Path) -> None:
    """A library whose classes have no config that surgeon could change."""
    hub = pytest.importorskip("huggingface_hub")

    class Mixed(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    small = surgeon.shrink(Mixed(12).eval(), 0.5, example_inputs=X, round_to=1)
    with pytest.warns(ConfigWarning, match=r"factory\(\) makes the original Mixed"):
        small.save_pretrained(tmp_path)
    assert torch.equal(surgeon.load(tmp_path, lambda: Mixed(12))(X), small(X))


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
}
WORDS = {"input_ids": torch.arange(2, 10)[None]}
PIXELS = {"pixel_values": torch.randn(1, 3, 32, 32)}
CLASSES = {
    "BertForSequenceClassification": (SIZES, WORDS),
    "RobertaForMaskedLM": (SIZES | {"max_position_embeddings": 40}, WORDS),
    "ElectraForSequenceClassification": (SIZES | {"embedding_size": 16}, WORDS),
    "DistilBertForSequenceClassification": (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60}, WORDS,
    ),
    "GPT2LMHeadModel": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60}, WORDS),
    "LlamaForCausalLM": (SIZES | {"num_key_value_heads": 2}, WORDS),
    "Qwen2ForCausalLM": (SIZES | {"num_key_value_heads": 2}, WORDS),
    "OPTForCausalLM": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 60,
         "word_embed_proj_dim": 32}, WORDS,
    ),
    "ViTForImageClassification": (SIZES | {"image_size": 32, "patch_size": 8}, PIXELS),
    "T5ForConditionalGeneration": (
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60,
         "decoder_start_token_id": 0}, WORDS | {"decoder_input_ids": torch.arange(2, 6)[None]},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::surgeon.errors.SurgeonWarning")
@pytest.mark.parametrize("request_", [{"ratio": 0.3, "round_to": 1}, {"macs": 0.5}], ids=["ratio", "macs"])
@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_transformers(name: str, request_: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    options, inputs = CLASSES[name]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**options)).eval()
    small = surgeon.shrink(model, **request_, example_inputs=inputs, outputs=["logits"])
    small.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    if "save_pretrained" in vars(small):
        again = surgeon.load(tmp_path, lambda: kind(config))
    else:
        again = kind.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, small(**inputs).logits)
    if small.can_generate():
        given = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
        said = [m.generate(**given, max_new_tokens=4, do_sample=False) for m in (small, again)]
        assert torch.equal(*said)
