"""Two processes over gloo against one: plans, averaged gradients, fine-tuning, data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes as work

import surgeon
from surgeon.errors import InputError, PlanError

Found = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def run(*arguments: str) -> None:
    """Two processes of two_processes.py, which must end well."""
    paths = os.pathsep.join([str(Path(surgeon.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", work.__file__, *arguments],
        env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("both")
    run(str(folder))
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    tensors = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [item["size"] for item in said] == [2, 2]
    return said, tensors


def test_every_process_makes_the_same_plan(both: Found) -> None:
    one = work.plans(work.made())
    assert [item["plans"] for item in both[0]] == [one, one]
    assert len(set(one)) == 4


def test_the_plan_of_one_process_reaches_all(both: Found) -> None:
    """Each made its own (from other seeds); after the broadcast both hold process 1's."""
    first, second = both[0]
    assert first["mine"] != second["mine"]
    assert first["broadcast"] == second["broadcast"] == second["mine"]


def test_a_source_without_a_plan_hangs_nobody(both: Found) -> None:
    assert both[0][0]["error"] == ["InputError", "process 0, the source, has no plan"]
    assert both[0][1]["error"] == ["PlanError", "process 0 made no plan"]


def test_averaged_gradients_are_those_of_one_process(both: Found) -> None:
    model = work.made()
    small = work.cut(model)[1].apply(model)
    want = work.gradients(small, small, work.X, work.Y)
    for found in both[1]:
        assert set(found["gradients"]) == set(want)
        for name, gradient in want.items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-10, atol=1e-14)


def test_two_processes_train_like_one(both: Found) -> None:
    """Half of each batch in each of two processes, and whole batches in one: the same weights, gates, losses
    and scores.
    """
    small, history, alpha = work.fine_tuned(1)
    assert len({epoch.loss for epoch in history}) == 3
    for said, found in zip(*both, strict=True):
        for name, tensor in small.state_dict().items():
            torch.testing.assert_close(found["tuned"][name], tensor, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found["alpha"], alpha, rtol=1e-5, atol=1e-6)
        assert said["again"]
        for (loss, accuracy, score), epoch in zip(said["history"], history, strict=True):
            assert accuracy == epoch.accuracy and score == epoch.score
            assert loss == pytest.approx(epoch.loss, rel=1e-5)


def test_a_loader_is_shared(both: Found) -> None:
    """In each epoch both together see every sample once, in an order that changes."""
    first, second = (item["seen"] for item in both[0])
    epochs = [
        [sorted(n for batch in part[3 * e : 3 * e + 3] for n in batch) for part in (first, second)]
        for e in (0, 1)
    ]
    for parts in epochs:
        assert sorted(parts[0] + parts[1]) == list(range(24))
    assert first[:3] != first[3:] and first[0] != sorted(first[0])


def test_statistics_are_the_same_in_the_end(both: Found) -> None:
    """Each process saw other samples; all end with the main one's batch norm."""
    first, second = (found["seen"] for found in both[1])
    assert float(first["norm.running_mean"].abs().max()) > 0
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_thread_outlives_the_process_group(both: Found) -> None:
    """One that does may drop a tensor while Python shuts down, which aborts the process."""
    for before, after in (item["threads"] for item in both[0]):
        assert not after
        assert before or not Path("/proc/self/task").exists()


def test_a_script_need_not_end_the_processes() -> None:
    """Though a thread of the process group still drops a tensor when the script is done."""
    run()


def test_broadcast_without_processes() -> None:
    plan = work.cut(work.made())[1]
    assert surgeon.broadcast_plan(plan) is plan
    with pytest.raises(InputError, match="has no plan"):
        surgeon.broadcast_plan(None)


def test_a_plan_as_text() -> None:
    plan = work.cut(work.made())[1]
    text = plan.to_json()
    assert surgeon.Plan.from_json(text).to_json() == text
    for damaged in (text[:-5], text.replace('"params"', '"parms"'), "[]"):
        with pytest.raises(PlanError, match="the process"):
            surgeon.Plan.from_json(damaged, where="the process")
