"""One row per op: what it ties, dim by dim.

Operands are called a, b, c; `a1` is dim 1 of a. `ties` lists the groups that must be found, separated by
spaces: `a1=b0` (dim 1 of a and dim 0 of b leave together), `a0/3` (in 3 steps, where that is not the dim's
size), `a0x2` (2 balanced sets: two units a step). Rows and columns of a grid that one dim was cut into stand as
`a0.rows` and `a0.columns`. Everything that is not listed must be frozen. To add an op: one row here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    run: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    ties: str


aten = torch.ops.aten
S, V, M = (4, 6), (6,), (6, 5)

CASES = [
    # elementwise: entries that meet are joined, size 1 and missing dims tie nothing
    Case("add", lambda a, b: a + b, (S, S), "a0=b0 a1=b1"),
    Case("add broadcast", lambda a, b: a + b, (S, V), "a0 a1=b0"),
    Case("mul one to many", lambda a, b: a * b, ((2, 1, 3), (2, 4, 3)), "a0=b0 a2=b2 b1"),
    Case("outer sum", lambda a, b: a + b, ((4, 1), (1, 6)), "a0 b1"),
    Case("sub scalar", lambda a: a - 2, (S,), "a0 a1"),
    Case("div", lambda a, b: a / (b.abs() + 1), (S, S), "a0=b0 a1=b1"),
    Case("relu_", lambda a: a.clone().relu_(), (S,), "a0 a1"),
    Case("sigmoid", torch.sigmoid, (S,), "a0 a1"),
    Case("gelu", F.gelu, (S,), "a0 a1"),
    Case("where", lambda a, b, c: torch.where(a > 0, b, c), (S, S, V), "a0=b0 a1=b1=c0"),
    Case("lerp", lambda a, b: torch.lerp(a, b, 0.3), (S, S), "a0=b0 a1=b1"),
    Case("addcmul", lambda a, b, c: torch.addcmul(a, b, c), (S, S, V), "a0=b0 a1=b1=c0"),
    Case("masked_fill", lambda a, b: a.masked_fill(b > 0, 1.0), (S, S), "a0=b0 a1=b1"),
    Case("maximum", torch.maximum, (S, S), "a0=b0 a1=b1"),
    Case("prelu", lambda a, b: F.prelu(a, b), ((2, 4, 3), (4,)), "a0 a1=b0 a2"),
    Case(
        "batch_norm",
        lambda a, b, c: F.batch_norm(a, c, c.abs() + 1, b, b),
        ((2, 4, 3), (4,), (4,)),
        "a0 a1=b0=c0 a2",
    ),
    Case("statistics", lambda a, b, c: _normed(a, b, c), ((2, 4, 3), (4,), (4,)), "a1=b0=c0"),
    Case("glu", lambda a: F.glu(a, 1), ((3, 8),), "a0 a1/4"),
    Case("to dtype", lambda a: a.to(torch.float64) * 2, (S,), "a0 a1"),
    Case("zeros_like", lambda a, b: torch.zeros_like(a) + b, (S, S), "a0=b0 a1=b1"),
    # factories: constants follow, positions do not
    Case("zeros", lambda a: a + torch.zeros(4, 6), (S,), "a0 a1"),
    Case("ones by column", lambda a: a * torch.ones(6), (S,), "a0 a1"),
    Case("arange", lambda a: a + torch.arange(6.0), (S,), "a0"),
    # movement: ids move along
    Case("transpose", lambda a, b: a.t() + b, (S, (6, 4)), "a0=b1 a1=b0"),
    Case("permute", lambda a, b: a.permute(2, 0, 1) + b, ((2, 3, 4), (4, 2, 3)), "a0=b1 a1=b2 a2=b0"),
    Case("unsqueeze", lambda a, b: a.unsqueeze(1) + b, (S, (4, 2, 6)), "a0=b0 a1=b2 b1"),
    Case("squeeze", lambda a, b: a.squeeze(1) + b, ((4, 1, 6), S), "a0=b0 a2=b1"),
    Case("flatten", lambda a, b: a.flatten() * b, ((4, 1), (4,)), "a0=b0"),
    Case("merge", lambda a, b: a.reshape(24) + b, (S, (24,)), "a0=b0/4 a1=b0/6"),
    Case("split dim", lambda a: a.reshape(2, 3, 5).relu(), (M,), "a0.rows/2 a0.columns/3x2 a1"),
    Case("expand", lambda a, b: a.expand(4, 6) + b, ((1, 6), S), "a1=b1 b0"),
    Case("cat", lambda a, b, c: torch.cat([a, b], 1) + c, (S, (4, 3), (9,)), "a0=b0 a1=c0/6 b1=c0/3"),
    Case("ones before others", lambda a: torch.cat([a.new_ones(4, 2), a], 1) @ _mixer(8), (S,), "a0"),
    Case("cat twice", lambda a, b: torch.cat([a, a], 1) + b, (S, (12,)), "a0 a1=b0/6"),
    Case("stack", lambda a, b, c: torch.stack([a, b], 1) + c, (S, S, V), "a0=b0 a1=b1=c0"),
    Case("slice", lambda a, b: a[:, 1:4] + b, (S, (3,)), "a0 a1/3 a1=b0/3"),
    Case("slice step", lambda a: a[:, ::2] + a[:, 1::2], (S,), "a0 a1/3"),
    Case("select other dim", lambda a: a[1], (S,), "a1"),
    Case("select", lambda a: a[:, 1], (S,), "a0"),
    Case("unbind", lambda a: sum(a.unbind(0)), (S,), "a1"),
    Case("chunk", lambda a: torch.cat(a.chunk(2, 1)[::-1], 1), (S,), "a0 a1/3x2"),
    Case("split", lambda a, b: a.split([2, 4], 1)[1] + b, (S, (4,)), "a0 a1/2 a1=b0/4"),
    Case("flip", lambda a, b: a.flip(1) + b, (S, V), "a0 a1=b0"),
    Case("roll", lambda a: a.roll(1, 1), (S,), "a0"),
    Case("repeat", lambda a, b: a.repeat(1, 2) + b, (S, (12,)), "a0 a1=b0/6"),
    Case("pad", lambda a, b: F.pad(a, (1, 2)) + b, (S, (9,)), "a0 a1=b0/6 b0/3"),
    Case("index_select", lambda a: a.index_select(0, torch.tensor([2, 0])), (S,), "a1"),
    Case("index", lambda a: a[torch.tensor([[0, 1], [2, 3]])], (S,), "a1"),
    Case("embedding", lambda a: F.embedding(torch.tensor([1, 2]), a), (S,), "a1"),
    Case(
        "embedding_bag",
        lambda a: F.embedding_bag(torch.tensor([1, 2, 0]), a, torch.tensor([0, 2])),
        (S,),
        "a1",
    ),
    Case(
        "greatest of bags",
        lambda a: F.embedding_bag(torch.tensor([[1, 2], [0, 3]]), a, mode="max"),
        (S,),
        "a1",
    ),
    Case(
        "weighted bags",
        lambda a, b: F.embedding_bag(torch.tensor([[1, 2], [0, 3]]), a, mode="sum", per_sample_weights=b),
        (S, (2, 2)),
        "a1",
    ),
    Case("gather", lambda a: a.gather(1, torch.zeros(4, 6, dtype=torch.long)), (S,), ""),
    Case(
        "gather whole rows",
        lambda a: a.gather(0, torch.tensor([[2], [0]]).expand(-1, a.shape[1])),
        (S,),
        "a1",
    ),
    Case("gather as many", lambda a: a.gather(0, torch.tensor([[2], [0]]).expand_as(a[:2])), (S,), "a1"),
    Case("gather by a fixed width", lambda a: a.gather(0, torch.tensor([[2], [0]]).repeat(1, 6)), (S,), ""),
    Case(
        "slice of a computed part",
        lambda a: torch.cat([a[:, : a.shape[1] // 5].sin(), a[:, 2:]], 1),
        ((3, 10),),
        "a0 a1/2x5",
    ),
    Case("unfold dim", lambda a: a.unfold(1, 2, 2), (S,), "a0"),
    Case("windows of memory", lambda a: a.as_strided((2, 3, 4, 5), (40, 10, 5, 1)), ((2, 8, 5),), "a0 a2"),
    Case("windows that end within a row", lambda a: a.as_strided((3, 4), (6, 1)), (S,), ""),
    Case("windows on what is written to", lambda a: _rewritten(a), ((2, 8, 5),), "a0 a2"),
    Case("windows in place", lambda a: a.clone().as_strided_((2, 3, 4, 5), (40, 10, 5, 1)), ((2, 8, 5),), ""),
    Case("windows across", lambda a: a.mT.as_strided((6, 3, 2), (1, 6, 6)), (S,), "a1"),
    Case("windows with gaps", lambda a: a[:, ::2].as_strided((4, 3), (6, 2)), (S,), ""),
    Case("pixel_shuffle", lambda a, b: F.pixel_shuffle(a, 2) + b, ((1, 8, 1, 1), (2, 1, 1)), "a1=b0/2"),
    Case("pixel_unshuffle", lambda a, b: F.pixel_unshuffle(a, 2) + b, ((1, 2, 2, 2), (8, 1, 1)), "a1=b0/2"),
    Case("slice_scatter", lambda a, b: torch.slice_scatter(a, b, 1, 0, 3), (S, (4, 3)), "a0=b0 a1/3 a1=b1/3"),
    Case("write heads to part", lambda a, b: _headed(a, b), (M, (2, 5)), "a0.rows/2 a0.columns/3 a1=b1 b0"),
    Case("write to part", lambda a, b: _written(a, b), (S, (4, 2)), "a0=b0 a1=b1/2x3"),
    # diagonals: rows and columns of the main one leave together
    Case("diagonal", lambda a, b: a.diagonal() * b, ((6, 6), V), "a0=a1=b0"),
    Case("diagonal of samples", lambda a: a.diagonal(dim1=2, dim2=0), ((4, 3, 4),), "a0=a2 a1"),
    Case("diagonal beside", lambda a: a.diagonal(1), ((6, 6),), ""),
    Case("diagonal of unequal dims", lambda a: a.diagonal(), (S,), ""),
    Case("diag_embed", lambda a, b: a.diag_embed() @ b, (S, (4, 6, 5)), "a0=b0 a1=b1 b2"),
    Case("diag_embed ahead", lambda a: a.diag_embed(dim1=0, dim2=2), (S,), "a0 a1"),
    Case("diag_embed beside", lambda a: a.diag_embed(1), (S,), "a0"),
    Case("diagonal_scatter", torch.diagonal_scatter, ((6, 6), V), "a0=a1=b0"),
    Case("diagonal of zeros", lambda a: torch.diagonal_scatter(a.new_zeros(6, 6), a), (V,), "a0"),
    Case("write to a diagonal", lambda a, b: _on_diagonal(a, b), ((3, 6, 6), (3, 6)), "a0=b0 a1=a2=b1"),
    Case("tril", torch.tril, ((3, 6, 6),), "a0 a1=a2"),
    Case("triu beside", lambda a: a.triu(1), ((3, 6, 6),), "a0"),
    Case("trace", torch.trace, ((6, 6),), "a0=a1"),
    Case("eye", lambda a: a + torch.eye(6), ((6, 6),), "a0=a1"),
    Case("eye of unequal dims", lambda a: a + torch.eye(4, 6), (S,), ""),
    # contractions: the summed dim is joined and ends
    Case("mm", torch.mm, (S, M), "a0 a1=b0 b1"),
    Case("addmm", lambda a, b, c: torch.addmm(a, b, c), ((5,), S, M), "a0=c1 b0 b1=c0"),
    Case("cdist", lambda a, b: torch.cdist(a, b, p=1.0), ((4, 6), (5, 6)), "a0 a1=b1 b0"),
    Case("cdist broadcast", lambda a, b: torch.cdist(a, b, p=3.0), ((2, 4, 6), (5, 6)), "a0 a1 a2=b1 b0"),
    Case(
        "cdist by products",
        lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"),
        ((4, 6), (5, 6)),
        "a0 a1=b1 b0",
    ),
    Case("pdist", lambda a: F.pdist(a), (S,), "a1"),
    Case("bmm", torch.bmm, ((2, 4, 6), (2, 6, 5)), "a0=b0 a1 a2=b1 b2"),
    Case("baddbmm", torch.baddbmm, ((2, 4, 5), (2, 4, 6), (2, 6, 5)), "a0=b0=c0 a1=b1 a2=c2 b2=c1"),
    Case("mv", torch.mv, (S, V), "a0 a1=b0"),
    Case("vdot", torch.vdot, (V, V), "a0=b0"),
    Case(
        "bilinear", lambda a, b, c: F.bilinear(a, b, c), ((4, 3), (4, 5), (6, 3, 5)), "a0=b0 a1=c1 b1=c2 c0"
    ),
    Case(
        "complex product",
        lambda a, b: torch.view_as_real(torch.view_as_complex(a) @ torch.view_as_complex(b)),
        ((4, 6, 2), (6, 5, 2)),
        "a0 a1=b0 b1",
    ),
    Case("linear", lambda a, b, c: F.linear(a, b, c), ((2, 3, 6), (5, 6), (5,)), "a0 a1 a2=b1 b0=c0"),
    Case(
        "einsum", lambda a, b: torch.einsum("nhd,hde->nhe", a, b), ((3, 2, 4), (2, 4, 5)), "a0 a1=b0 a2=b1 b2"
    ),
    Case("conv2d", lambda a, b, c: F.conv2d(a, b, c), ((2, 3, 5, 5), (4, 3, 3, 3), (4,)), "a0 a1=b1 b0=c0"),
    Case("conv1d", lambda a, b: F.conv1d(a, b), ((2, 3, 5), (4, 3, 3)), "a0 a1=b1 b0"),
    Case("conv3d", lambda a, b: F.conv3d(a, b), ((2, 3, 4, 4, 4), (4, 3, 2, 2, 2)), "a0 a1=b1 b0"),
    Case("conv depthwise", lambda a, b: F.conv2d(a, b, groups=4), ((2, 4, 5, 5), (4, 1, 3, 3)), "a0 a1=b0"),
    Case(
        "conv grouped",
        lambda a, b: F.conv2d(a, b, groups=4),
        ((2, 12, 5, 5), (8, 3, 3, 3)),
        "a0 a1=b0.rows/4 a1=b1.columns/3 b0.columns/2x4",
    ),
    Case("conv one output", lambda a, b: F.conv2d(a, b), ((2, 4, 5, 5), (1, 4, 3, 3)), "a0 a1=b1"),
    Case(
        "conv transposed",
        lambda a, b, c: F.conv_transpose2d(a, b, c),
        ((2, 3, 5, 5), (3, 4, 3, 3), (4,)),
        "a0 a1=b0 b1=c0",
    ),
    Case(
        "attention",
        F.scaled_dot_product_attention,
        ((1, 4, 5, 6), (1, 4, 5, 6), (1, 4, 5, 6)),
        "a1=b1=c1 a2 b2=c2 a3=b3=c3x2",
    ),
    Case(
        "attention of fixed queries",
        lambda a, b: F.scaled_dot_product_attention(
            torch.linspace(0, 1, 120, dtype=torch.float64).view(1, 4, 5, 6), a, b
        ),
        ((1, 4, 5, 6), (1, 4, 5, 6)),
        "a2=b2",
    ),
    Case(
        "attention of grouped queries",
        lambda a, b, c: F.scaled_dot_product_attention(a, b, c, enable_gqa=True),
        ((1, 4, 5, 6), (1, 2, 5, 6), (1, 2, 5, 6)),
        "a1=b1=c1.rows/2 a1.columns/2x2 a2 b2=c2 a3=b3=c3x2",
    ),
    # reductions and normalisations
    Case("mean", lambda a: a.mean(1), (S,), "a0 a1"),
    Case("mean keepdim", lambda a, b: a.mean(1, keepdim=True) * b, (S, S), "a0=b0 a1 b1"),
    Case("sum all", torch.sum, (S,), "a0 a1"),
    Case("amax", lambda a: a.amax(1), (S,), "a0 a1"),
    Case("var", lambda a: a.var(1), (S,), "a0 a1"),
    Case("norm", lambda a: a.norm(dim=1), (S,), "a0 a1"),
    Case("norm of a negative order", lambda a: torch.linalg.vector_norm(a, -1, 1), (S,), "a0 a1"),
    Case("least", lambda a: a.norm(p=-float("inf"), dim=1), (S,), "a0 a1"),
    Case("argmax", lambda a: a.argmax(1), (S,), "a0"),
    Case("max over a dim", lambda a: a.max(1).values, (S,), "a0 a1"),
    Case("max and its index", lambda a: sum(a.max(1)), (S,), "a0"),
    Case("softmax", lambda a: a.softmax(1), (S,), "a0 a1"),
    Case("log_softmax", lambda a: a.log_softmax(1), (S,), "a0 a1"),
    Case("cumsum", lambda a: a.cumsum(1), (S,), "a0"),
    Case("topk", lambda a: a.topk(2, 1).values, (S,), "a0"),
    Case("fft", lambda a: torch.fft.fft(a, dim=0).real, (S,), "a1"),
    Case("rfft and back", lambda a: torch.fft.irfft(torch.fft.rfft(a, dim=1), n=6, dim=1), (S,), "a0"),
    Case("layer_norm", lambda a, b: F.layer_norm(a, (6,), b, b), (S, V), "a0 a1=b0"),
    Case("rms_norm", lambda a, b: F.rms_norm(a, (6,), b), (S, V), "a0 a1=b0"),
    Case(
        "group_norm",
        lambda a, b: F.group_norm(a, 4, b),
        ((2, 12, 3), (12,)),
        "a0 a1=b0.rows/4 a1=b0.columns/3x4",
    ),
    Case("instance_norm", lambda a, b: F.instance_norm(a, weight=b), ((1, 4, 3), (4,)), "a1=b0 a2"),
    Case("max_pool2d", lambda a: F.max_pool2d(a, 2), ((2, 3, 4, 4),), "a0 a1"),
    Case("avg_pool2d", lambda a: F.avg_pool2d(a, 2), ((2, 3, 4, 4),), "a0 a1"),
    Case("adaptive_avg_pool2d", lambda a: F.adaptive_avg_pool2d(a, 2), ((2, 3, 4, 4),), "a0 a1"),
    Case("interpolate", lambda a: F.interpolate(a, scale_factor=2.0), ((2, 3, 4, 4),), "a0 a1"),
    Case(
        "scatter_add",
        lambda a, b: a.scatter_add(0, torch.tensor([[1], [3], [1]]).expand_as(b), b),
        (S, (3, 6)),
        "a1=b1",
    ),
    Case(
        "scatter_reduce",
        lambda a, b: a.scatter_reduce(0, torch.tensor([[1], [3], [1]]).expand_as(b), b, "amax"),
        (S, (3, 6)),
        "a1=b1",
    ),
    Case("scatter by column", lambda a, b: a.scatter(0, torch.arange(6)[None] % 4, b), (S, (1, 6)), ""),
    Case(
        "grid_sample",
        lambda a, b: F.grid_sample(a, b, align_corners=False),
        ((2, 3, 4, 4), (2, 5, 5, 2)),
        "a0=b0 a1",
    ),
    Case(
        "grid_sample 3d",
        lambda a, b: F.grid_sample(a, b, align_corners=True),
        ((2, 3, 4, 4, 4), (2, 2, 5, 5, 3)),
        "a0=b0 a1",
    ),
    # no rule: nothing that it touches may leave
    Case("opaque", lambda a: torch.linalg.inv(a), ((4, 4),), ""),
    Case("sort", lambda a: a.sort(1).values, (S,), "a0"),
]


def _mixer(size: int) -> torch.Tensor:
    return torch.linspace(0, 1, size * 3, dtype=torch.float64).sin().view(size, 3)


def _normed(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    out, mean, _, written, _ = aten._native_batch_norm_legit_functional(a, b, b, c, c.abs(), True, 0.1, 1e-5)
    return out * mean.view(1, -1, 1) + written.view(1, -1, 1)


def _rewritten(a: torch.Tensor) -> torch.Tensor:
    a = a.clone()
    windows = a.as_strided((2, 3, 4, 5), (40, 10, 5, 1))
    a.mul_(2)
    return windows.sin()


def _on_diagonal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a = a.clone()
    a.diagonal(dim1=1, dim2=2).copy_(b)
    return a


def _headed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Three columns of two heads, and two columns that are the same for both."""
    heads = a.reshape(2, -1, a.shape[1])
    both = a.new_empty(2, heads.shape[1] + b.shape[0], a.shape[1])
    both[:, : heads.shape[1]] = heads
    both[:, heads.shape[1] :] = b
    return both


def _written(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a = a.clone()
    a[:, 2:4] = b
    return a
