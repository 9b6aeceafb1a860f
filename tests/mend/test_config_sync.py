"""Models that are built from a config: it says the new widths where it can, and the plan keeps to them where
that is asked.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import InputError, PlanError


class Config:
    """As those of transformers: plain attributes, written as a dict and read again."""

    def __init__(self, **options: Any) -> None:
        self.hidden, self.heads, self.kv_heads, self.inner, self.layers, self.words = 16, 4, 2, 24, 2, 11
        self.scaled = False
        vars(self).update(options)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(vars(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        return cls(**values)


class Block(nn.Module):
    """Attention with grouped queries and an MLP; heads only divide, so that no weight of q shows how many
    there are.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.size = config, config.hidden // config.heads
        self.q, self.k = (
            nn.Linear(config.hidden, config.hidden),
            nn.Linear(config.hidden, config.kv_heads * self.size),
        )
        self.v, self.o = (
            nn.Linear(config.hidden, config.kv_heads * self.size),
            nn.Linear(config.hidden, config.hidden),
        )
        self.up, self.down = nn.Linear(config.hidden, config.inner), nn.Linear(config.inner, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        mixed = (q @ k.transpose(2, 3) / math.sqrt(self.size)).softmax(-1) @ v
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.embed = config, nn.Embedding(config.words, config.hidden)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.head = nn.Linear(config.hidden, 3)
        self.scale = config.hidden**0.5 if config.scaled else 1.0

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids) * self.scale))


class Unused(Model):
    """A token that no run in eval mode reads, as those of masked training."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mask_token = nn.Parameter(torch.zeros(config.hidden))


IDS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


def made(kind: type[nn.Module] = Model, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(Config(**options)).eval()


def round_trip(small: nn.Module) -> nn.Module:
    """As save_pretrained and from_pretrained: the class, built from the written config, with the weights."""
    again = type(small)(Config.from_dict(small.config.to_dict())).eval()
    again.load_state_dict(small.state_dict())
    return again


def test_the_config_says_the_new_widths() -> None:
    model = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = surgeon.shrink(model, 0.5, example_inputs=IDS, round_to=1)
    said = small.config
    assert (said.hidden, said.heads, said.kv_heads, said.inner, said.layers) == (8, 2, 1, 12, 2)
    assert (model.config.hidden, model.config.heads) == (16, 4)
    assert torch.equal(small(IDS), round_trip(small)(IDS))


class Strict(Config):
    """A config that is checked when it is read, and refuses widths that the class itself builds."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        if values["inner"] % 4:
            raise ValueError(f"inner ({values['inner']}) is not a multiple of 4")
        return cls(**values)


def test_a_config_that_refuses_to_be_read() -> None:
    model = Model(Strict()).eval()
    with pytest.warns(UserWarning, match=r"config of Model cannot say"):
        small = surgeon.shrink(
            model, {"*": 0.0, "blocks.*.up": 0.25}, example_inputs=IDS, round_to=1
        )  # 18 of 24
    assert small.config.inner == 24 and small.blocks[0].up.out_features == 18


def test_edits_of_the_config_replay_from_a_file(tmp_path: Any) -> None:
    plan = surgeon.inspect(made(), IDS).plan(0.5)
    plan.save(tmp_path / "plan.json")
    small = surgeon.Plan.load(tmp_path / "plan.json").apply(made())
    assert (small.config.hidden, small.config.kv_heads) == (8, 1)
    assert all(module.config is small.config for module in small.blocks)


def test_widths_that_differ_by_layer_are_told_and_change_nothing() -> None:
    model = made()
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(torch.linspace(0, 1, 24)[:, None] ** 4)  # this layer has less to lose
    with pytest.warns(UserWarning, match=r"config of Model cannot say.*surgeon\.save"):
        small = surgeon.shrink(model, 0.3, example_inputs=IDS, scope="global")
    assert small.blocks[0].up.out_features != small.blocks[1].up.out_features
    assert small.config.inner == 24


def test_a_plan_that_the_config_can_say() -> None:
    model = made()
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(torch.linspace(0, 1, 24)[:, None] ** 4)
    surgery = surgeon.inspect(model, IDS)
    plan = surgery.plan(0.3, scope="global", config_expressible=True)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, IDS)
    assert small.blocks[0].up.out_features == small.blocks[1].up.out_features == small.config.inner
    assert plan.params < surgery.params
    assert torch.equal(small(IDS), round_trip(small)(IDS))


def test_a_constant_made_of_a_width_is_noticed() -> None:
    """The sizes fit a config, but the model that it builds scales its embeddings otherwise."""
    model = made(scaled=True)
    with pytest.warns(UserWarning, match="computes something else"):
        small = surgeon.shrink(model, 0.5, example_inputs=IDS)
    assert small.config.hidden == 16
    assert not torch.allclose(small(IDS), surgeon.shrink(made(), 0.5, example_inputs=IDS)(IDS))
    with pytest.raises(
        PlanError, match=r"cannot say the new widths[\s\S]*computes something else[\s\S]*surgeon\.save"
    ):
        surgeon.shrink(model, 0.5, example_inputs=IDS, config_expressible=True)


def test_a_number_that_also_says_a_size_which_stays() -> None:
    model = made(Unused)
    with pytest.warns(UserWarning, match=r"mask_token\[0\] has size 16, but hidden holds"):
        surgeon.shrink(model, 0.5, example_inputs=IDS)
    small = surgeon.shrink(model, 0.5, example_inputs=IDS, config_expressible=True, round_to=1)
    assert (small.config.hidden, small.config.inner) == (16, 12)
    assert torch.equal(small(IDS), round_trip(small)(IDS))


def test_a_model_without_a_config() -> None:
    with pytest.raises(InputError, match=r"config_expressible needs[\s\S]*Sequential"):
        surgeon.shrink(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 0.5, config_expressible=True)


def test_a_config_that_does_not_build_the_model() -> None:
    """Somebody put another head on: the config is not touched, and nothing is said."""
    model = made()
    model.head = nn.Linear(16, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = surgeon.shrink(model, 0.5, example_inputs=IDS)
    assert small.config.hidden == 16
