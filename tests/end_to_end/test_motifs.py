"""Every motif three ways: the expected groups, proof at several ratios with random scores, and wrong plans
that must fail.
"""

from __future__ import annotations

import pytest
import torch
from motifs import MOTIFS, Motif
from torch import nn
from wrong import wrong_cuts

import surgeon
from surgeon.coupling.groups import Group
from surgeon.errors import ProofError, SurgeonError

CASES = pytest.mark.parametrize("motif", MOTIFS, ids=lambda m: m.name)


def prepared(motif: Motif, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """The motif's model with random statistics and scales, so that no channel is like another."""
    torch.manual_seed(seed)
    model = motif.make().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_()
    return model, torch.randn(motif.shape)


def said(group: Group) -> str:
    return f"{group.steps}x{len(group.sets)}: " + " ".join(sorted(f"{t}[{d}]" for t, d in group.slots))


@CASES
def test_groups(motif: Motif) -> None:
    model, x = prepared(motif)
    found: dict[str, str] = {}
    for group in surgeon.inspect(model, x).groups:
        found[group.name if group.name not in found else f"{group.name} #2"] = said(group)
    assert found == motif.groups


@CASES
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_small_model_is_the_masked_reference(motif: Motif, ratio: float) -> None:
    for seed in range(2):
        model, x = prepared(motif, seed)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        surgery = surgeon.inspect(model, x)
        plan = surgery.plan(ratio, criterion="random", seed=seed, round_to=1)
        small = plan.apply(model)
        proof = surgeon.verify(model, small, plan, x)
        assert proof.error <= 1e-9
        assert proof.compared > 0
        assert isinstance(small, type(model))
        assert plan.params == sum(p.numel() for p in small.parameters())
        assert plan.params < plan.params_before
        assert surgeon.inspect(small, x).macs == plan.macs
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        small.train()
        out = small(x)
        leaves = (
            list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, tuple) else [out]
        )
        sum(leaf.sum() for leaf in leaves).backward()


@CASES
def test_wrong_plans_are_rejected(motif: Motif) -> None:
    """In each cut slot in turn, one kept index is exchanged for a removed one: every such plan must fail the
    proof.
    """
    model, x = prepared(motif)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, criterion="random", seed=1, round_to=1)
    plan.apply(model)  # finds the edits
    tried = 0
    for small, bad in wrong_cuts(model, plan):
        with pytest.raises(ProofError):
            surgeon.verify(model, small, bad, x)
        tried += 1
    assert tried >= 2


@CASES
def test_mending(motif: Motif) -> None:
    """The places in the code that the motif names are found, and no others."""
    model, x = prepared(motif)
    names = set()
    for ratio in (0.25, 0.5, 0.75):
        plan = surgeon.inspect(model, x).plan(ratio, criterion="random", seed=3, round_to=1)
        plan.apply(model)
        names |= {edit.name for edit in plan.edits}
    assert names == set(motif.edits)


def test_errors_are_of_the_family() -> None:
    assert issubclass(ProofError, SurgeonError)
