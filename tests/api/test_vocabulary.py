"""vocabulary: rows of token tables leave with the outputs that go with them, and what stays computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import InputError, MendError, ProofError

ROWS, WIDTH = 40, 8
KEEP = [0, 3, 5, 7, 20, 39]
IDS = torch.randint(0, ROWS, (2, 6), generator=torch.Generator().manual_seed(0))


class Words(nn.Module):
    """A table, places, a layer, a head with a bias; tied or not."""

    def __init__(self, tied: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.vocab_size = ROWS
        self.words, self.places = nn.Embedding(ROWS, WIDTH, padding_idx=padding), nn.Embedding(16, WIDTH)
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, ROWS)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.mix(x).relu())  # type: ignore[no-any-return]  # torch's


def make(kind: Callable[..., nn.Module] = Words, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(**options).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_outputs_for_kept_ids_are_the_same(tied: bool) -> None:
    model: Any = make(tied=tied)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = surgeon.vocabulary(model, KEEP, IDS)
    small: Any = found.model
    assert found.ids == {old: new for new, old in enumerate(KEEP)}
    assert small.words.num_embeddings == small.head.out_features == small.vocab_size == len(KEEP)
    assert (small.head.weight is small.words.weight) == tied
    assert small.places.num_embeddings == 16
    places = torch.randint(0, len(KEEP), (3, 9))
    with torch.no_grad():
        assert torch.allclose(small(places), model(torch.tensor(KEEP)[places])[..., KEEP], atol=1e-6)
    assert found.error <= 1e-9
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert "words.weight: (40, 8) -> (6, 8)" in str(found)
    assert found.plan.params == sum(p.numel() for p in small.parameters())


def test_padding_and_saving(tmp_path: Path) -> None:
    model: Any = make(padding=5)
    found = surgeon.vocabulary(model, KEEP, IDS)
    assert found.model.words.padding_idx == 2  # type: ignore[union-attr]  # a Words
    assert not found.model.words.weight[2].any()  # type: ignore[union-attr, index, operator]  # a Words
    found.save_ids(tmp_path / "ids.json")
    assert {
        int(old): new for old, new in json.loads((tmp_path / "ids.json").read_text()).items()
    } == found.ids
    surgeon.save(found.model, tmp_path / "small")
    loaded: Any = surgeon.load(tmp_path / "small", lambda: make(padding=5))
    places = torch.randint(0, len(KEEP), (2, 5))
    with torch.no_grad():
        assert torch.equal(loaded(places), found.model(places))
    assert loaded.words.padding_idx == 2 and loaded.vocab_size == len(KEEP)
    assert surgeon.shrink(found.model, 0.5, example_inputs=places).mix.out_features == 4  # type: ignore[union-attr]  # a Words


class Counts(nn.Module):
    """Its code computes with the number of tokens, which it holds under a name of its own."""

    def __init__(self, literal: bool = False) -> None:
        super().__init__()
        self.known, self.literal = ROWS, literal
        self.words, self.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.head(self.words(ids))
        return y.reshape(-1, 40 if self.literal else self.known)  # type: ignore[no-any-return]  # torch's


def test_numbers_in_the_code() -> None:
    found = surgeon.vocabulary(make(Counts), KEEP, IDS)
    assert found.model.known == len(KEEP) and found.model(torch.zeros(2, 4, dtype=torch.long)).shape == (
        8,
        len(KEEP),
    )
    with pytest.raises((MendError, ProofError)):
        surgeon.vocabulary(make(Counts, literal=True), KEEP, IDS[:1, :5])


class Looks(nn.Module):
    """Its code looks at an id, which means another token afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        held = (ids != 5).unsqueeze(-1)
        return self.last((self.words(ids) * held).sum(1))  # type: ignore[no-any-return]  # torch's


def test_code_that_looks_at_an_id_is_refused() -> None:
    with pytest.raises(ProofError, match="looks at single ids"):
        surgeon.vocabulary(make(Looks), KEEP, IDS)
    kept = surgeon.vocabulary(make(Looks), range(30), IDS)  # 5 stays 5
    assert kept.model.words.num_embeddings == 30  # type: ignore[union-attr]  # a Looks


class Two(nn.Module):
    """Ids of words and of languages."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.languages = nn.Embedding(ROWS, WIDTH), nn.Embedding(50, WIDTH)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, language: Tensor) -> Tensor:
        return self.last((self.words(ids) + self.languages(language)[:, None]).mean(1))  # type: ignore[no-any-return]  # torch's


def test_several_tables_are_named() -> None:
    inputs = (IDS, torch.tensor([1, 2]))
    with pytest.raises(InputError, match="several tables"):
        surgeon.vocabulary(make(Two), KEEP, inputs)
    found = surgeon.vocabulary(make(Two), KEEP, inputs, tables=["languages.weight"])
    assert found.tables == {"languages.weight": ((50, WIDTH), (len(KEEP), WIDTH))}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: surgeon.vocabulary(m, [], IDS), "no id"),
        (lambda m: surgeon.vocabulary(m, [0, -1], IDS), "-1"),
        (lambda m: surgeon.vocabulary(m, [0, 2.5], IDS), "2.5"),
        (lambda m: surgeon.vocabulary(m, [0, 40], IDS), "knows 40"),
        (lambda m: surgeon.vocabulary(m, [0, 1], IDS), "padding_idx"),
        (lambda m: surgeon.vocabulary(m, KEEP, IDS, tables=["head.weight"]), "no input looks up"),
        (lambda m: surgeon.vocabulary(nn.Linear(4, 4), [0], torch.randn(2, 4)), "no table"),
        (lambda m: surgeon.vocabulary("model", KEEP), "not a model"),
    ],
)
def test_bad_input(call: Callable[[nn.Module], object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        call(make(padding=5))


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 120,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "bert": ("BertForMaskedLM", SMALL),
    "bart": ("BartForConditionalGeneration", {"vocab_size": 120, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 120, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1,
           "num_heads": 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
def test_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    name, sizes = KINDS[kind]
    config = transformers.AutoConfig.for_model(kind, **sizes, pad_token_id=1, eos_token_id=2, bos_token_id=0)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    ids = torch.randint(3, 120, (2, 7))
    several = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    inputs = several if config.is_encoder_decoder else {"input_ids": ids}
    keep = [0, 1, 2, *range(5, 120, 2)]
    found = surgeon.vocabulary(model, keep, inputs)
    small: Any = found.model
    assert small.config.vocab_size == small.get_input_embeddings().num_embeddings == len(keep)
    assert small.config.pad_token_id == 1 and small.config.eos_token_id == 2
    places = torch.randint(0, len(keep), (2, 6))
    fed = dict.fromkeys(inputs, places)
    with torch.no_grad():
        want = model(**{key: torch.tensor(keep)[places] for key in inputs}).logits[..., keep]
        assert torch.allclose(small(**fed).logits, want, atol=1e-5)
    small.save_pretrained(tmp_path / "hub")
    again = type(model).from_pretrained(tmp_path / "hub")
    with torch.no_grad():
        assert torch.allclose(again.eval()(**fed).logits, want, atol=1e-5)
