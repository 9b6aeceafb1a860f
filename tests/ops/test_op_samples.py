"""Torch's own samples of every op of the table, cut: what a group lets go gives what the whole op gives of it.

`op_db` is torch's list of its ops with sample inputs. It imports `expecttest` for a base class of its test cases
alone; where that package is absent, an empty one stands in for it.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest
from typing import Any

import pytest
import torch
from cases import CASES
from grid_cases import OPS, Grid
from test_ops import Op, analysed, check_removals
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgeon.capture.capture import capture
from surgeon.ops.table import known, op_name

if importlib.util.find_spec("expecttest") is None:
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]  # all that torch's tests take from it
    sys.modules.setdefault("expecttest", stand_in)

from torch.testing._internal.common_methods_invocations import op_db  # after what stands in for expecttest

MOST, LARGEST = 4, 4000  # samples of an op, entries of an operand


class Sample(nn.Module):
    """An op on its sample's tensors of real numbers, each times the input: every dim of each is a slot."""

    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.op = op
        self.leaves, self.form = pytree.tree_flatten((args, kwargs))
        for number, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                setattr(self, f"t{number}", nn.Parameter(leaf.detach().clone()))

    def forward(self, x: Tensor) -> Any:
        given = [
            getattr(self, f"t{n}") * x if hasattr(self, f"t{n}") else leaf
            for n, leaf in enumerate(self.leaves)
        ]
        args, kwargs = pytree.tree_unflatten(given, self.form)
        out = self.op(*args, **kwargs)
        return out[0] if isinstance(out, (tuple, list)) else out


BY_NAME = {
    name: info for info in reversed(op_db) for name in (info.name.split(".")[-1], info.aten_name or info.name)
}
# nothing to compare: what they give is drawn, or left as memory was; and what takes no real numbers
NOT_COMPARED = set(
    "bernoulli dropout exponential uniform rand_like randn_like empty_like new_empty new_empty_strided".split()
)
NOT_REAL = set("bitwise_and bitwise_not bitwise_or bitwise_xor view_as_real".split())
# with statistics that it writes in place, each a further result that the proof does not compute
WRITES = {"_native_batch_norm_legit"}
NAMES = sorted((set(known()) & set(BY_NAME)) - NOT_COMPARED - NOT_REAL - WRITES)


# torch writes these as other ops before its dispatcher is reached; in inference mode they reach it as they are
COMPOSITE = set(
    """
__and__ __or__ _convolution _fused_rms_norm _upsample_bicubic2d_aa _upsample_nearest_exact2d adaptive_avg_pool1d
adaptive_avg_pool2d adjoint avg_pool1d batch_norm broadcast_to chunk concat contiguous dropout flatten float_power
group_norm isfinite layer_norm linear log_sigmoid log_softmax max_pool1d max_pool2d mish_backward numpy_T outer
positive prelu rand randn relu6 reshape resolve_conj resolve_neg rms_norm selu silu_backward softmax special_erf
special_expit square tile to true_divide unflatten unsafe_chunk upsample_bicubic2d upsample_bilinear2d
upsample_linear1d upsample_nearest1d upsample_nearest3d upsample_trilinear3d
""".split()
)
# kernels of other devices, ops of training and of drawn numbers, and what no sample of torch's reaches: no row yet
NO_ROW = set(
    """
_adaptive_avg_pool3d _batch_norm_no_update _conj _conj_physical _embedding_bag _fft_c2c _grouped_mm
_native_batch_norm_legit _native_batch_norm_legit_no_training _reshape_alias _safe_softmax
_scaled_dot_product_cudnn_attention _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
_scaled_dot_product_fused_attention_overrideable _sparse_addmm _unsafe_index _unsafe_index_put _weight_norm_interface
alias bernoulli bitwise_and bitwise_not bitwise_or bitwise_xor col2im cudnn_batch_norm detach elu_backward
empty_like empty_strided
exponential full gelu_backward hann_window hardsigmoid_backward hardswish_backward hardtanh_backward
leaky_relu_backward lift_fresh_copy log_sigmoid_backward logspace max_pool3d_with_indices mkldnn_max_pool2d
native_dropout new_empty_strided norm normal_functional rand_like randint randn_like randperm reflection_pad1d replication_pad1d
replication_pad2d replication_pad3d scalar_tensor sigmoid_backward softplus_backward tanh_backward threshold_backward
tril_indices triu_indices uniform zero
""".split()
)
UNTRIED = COMPOSITE | NO_ROW


def samples(name: str) -> list[Sample]:
    """Those of most dims, first one of each set of keywords.

    `OpInfo.sample_inputs` does the same, but walks the stack for each sample, which takes longer than a cut.
    """
    info = BY_NAME[name]
    found = []
    torch.manual_seed(0)
    for sample in info.sample_inputs_func(info, "cpu", torch.float64, False):
        tensors = [
            t for t in pytree.tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(t, Tensor)
        ]
        if tensors and all(0 < t.numel() <= LARGEST for t in tensors) and max(t.dim() for t in tensors) > 0:
            found.append((max(t.dim() for t in tensors), sample))
    found.sort(key=lambda item: -item[0])
    by_keywords: dict[Any, Any] = {}
    for _, sample in found:
        by_keywords.setdefault(repr(sample.kwargs), sample)
    ordered = [*by_keywords.values(), *(sample for _, sample in found)]
    chosen = list({id(sample): sample for sample in ordered}.values())[:MOST]
    return [Sample(info.op, (s.input, *s.args), s.kwargs) for s in chosen]


def recorded(model: nn.Module, *inputs: Tensor) -> set[str]:
    """The ops that a run of a model reaches torch's dispatcher with."""
    return {op_name(node) for node in capture(model, *inputs).fx.nodes if node.op == "call_function"}


def test_every_op_of_the_table_is_tried() -> None:
    """By a row of cases.py, on a grid, or by a sample of torch's: each op that is not is listed, and none for nothing."""
    seen: set[str] = set()
    for case in CASES:
        seen |= recorded(Op(case), torch.ones(()))
    for op in OPS:
        seen |= recorded(Grid("4x8", op, 1).eval(), torch.randn(4, 6))
    for name in set(NAMES) - seen:
        for model in samples(name):
            seen |= recorded(model, torch.ones(()))
    assert sorted(set(known()) - seen) == sorted(UNTRIED)


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_torch(name: str) -> None:
    for model in samples(name):
        check_removals(analysed(model))
