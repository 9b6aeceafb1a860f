"""Two small networks with LayerNorm, trained here on real data: a vision transformer and a language model
over bytes.

`trained(kind, train)` gives the weights that benchmarks/.cache holds, or trains for a few minutes of one core
and keeps them.
"""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgeon
from benchmarks.lib.results import CACHE

LENGTH = 128  # bytes of a text
_NO_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
}


class Attention(nn.Module):
    """Heads that attend over all tokens, or over those before; the dims of a head follow from the weights,
    the scale does not.
    """

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.scale = heads, causal, (dim // heads) ** -0.5
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        logits = query @ key.transpose(-2, -1) * self.scale
        if self.causal:
            tokens = x.shape[1]
            logits = logits.masked_fill(
                torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1), float("-inf")
            )
        return self.out((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each after a LayerNorm and added to the residual stream."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Images [N, 3, 32, 32] in, 10 logits out; patches of 4x4, the mean of all tokens is classified."""

    def __init__(self, dim: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


class TextTransformer(nn.Module):
    """Bytes [N, LENGTH] in, logits [N, LENGTH, 256] of the next ones out."""

    def __init__(self, dim: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.places = nn.Parameter(0.02 * torch.randn(1, LENGTH, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(text) + self.places)))


class Shuffled:
    """Batches of a data set in a new order for every epoch, each made by a function of its indices.

    Order and noise come from torch's global generator, so that `surgeon.finetune` goes on exactly where it
    was stopped.
    """

    def __init__(self, size: int, batch: int, make: Callable[[Tensor], Any]) -> None:
        self.size, self.batch, self.make = size, batch, make

    def __len__(self) -> int:
        return self.size // self.batch

    def __iter__(self) -> Any:
        order = torch.randperm(self.size)
        for number in range(len(self)):
            yield self.make(order[number * self.batch : (number + 1) * self.batch])


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [N, T, 256] with bytes [N, T]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


KINDS: dict[str, tuple[type[nn.Module], int, float]] = {  # class, epochs, highest rate
    "vit": (VisionTransformer, 3, 1.5e-3),
    "text": (TextTransformer, 2, 2e-3),
}


def trained(
    kind: str, train: Callable[[], Iterable[Any]], loss: Callable[[Tensor, Tensor], Tensor]
) -> nn.Module:
    """A network with the weights of the cache, or trained now by AdamW (seed 0) on what `train` gives, and
    kept.
    """
    make, epochs, rate = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    path = CACHE / f"recover-{kind}-py{sys.version_info.major}{sys.version_info.minor}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    print(f"training {kind} for {epochs} epochs; kept in {path}", flush=True)
    start = time.perf_counter()
    options: dict[str, Any] = {"warmup": 100, "clip": ("norm", 1.0), "precision": "bf16"}
    CACHE.mkdir(exist_ok=True)
    resumed = path.with_suffix(".ckpt")
    done = surgeon.finetune(
        model,
        train(),
        epochs=epochs,
        loss=loss,
        rate=rate,
        checkpoint=resumed,
        checkpoint_steps=200,
        **options,
    )
    save_file(model.state_dict(), path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    resumed.unlink()
    print(f"loss {done.history[-1].loss:.3f} after {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


def documentation() -> tuple[Tensor, Tensor]:
    """Texts [N, LENGTH + 1] of bytes to learn from, and such to test: Python's own documentation.

    The docstrings of the standard library and the topics of `help()`; every tenth module and topic is for the
    test.
    """
    from pydoc_data.topics import topics

    pieces = [text for _, text in sorted(topics.items())] + ["\n\n".join(texts) for texts in docstrings()]
    pieces = [piece for piece in pieces if piece]
    learned = "\n\n".join(piece for number, piece in enumerate(pieces) if number % 10)
    return _texts(learned), _texts("\n\n".join(pieces[::10]))


def docstrings() -> list[list[str]]:
    """Those of each module of the standard library, by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    paths = [
        path for path in sorted(root.rglob("*.py")) if not _NO_LIBRARY & set(path.relative_to(root).parts)
    ]
    trees = [ast.walk(ast.parse(path.read_bytes())) for path in paths]
    return [
        [text for node in tree if isinstance(node, kinds) and (text := ast.get_docstring(node))]
        for tree in trees
    ]


def _texts(text: str) -> Tensor:
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    count = len(data) // (LENGTH + 1)
    return data[: count * (LENGTH + 1)].view(count, LENGTH + 1)
