"""broadcast_plan(plan) -> the plan of one process, on every process of torch.distributed; as JSON, no pickle.

A plan is a function of the weights, the seed and the batches of data: processes that hold the same make the
same plan anyway. What may differ is data (each process sees its own part) and measured latencies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from surgeon.cut.plan import Plan
from surgeon.errors import InputError, PlanError


def broadcast_plan(plan: Plan | None, source: int = 0, group: Any = None) -> Plan:
    """The plan of process `source`, on every process of the group; without an initialised process group the
    plan itself.

    All processes must call it.

    Args:
        plan: on the source; elsewhere it is not looked at and may be None.
        source: global rank.
        group: of processes; all by default.

    Raises:
        InputError: the source has no plan.
        PlanError: on all other processes, if the source failed; the source raises its own error.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if plan is None:
            raise _without_plan("this process")
        return plan
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend(group) == "nccl"
        else torch.device("cpu")
    )
    text = b""
    try:
        if dist.get_rank() == source:
            if plan is None:
                raise _without_plan(f"process {source}, the source,")
            text = plan.to_json().encode()
    finally:  # the others wait for it, whatever goes wrong
        length = torch.tensor([len(text)], dtype=torch.int64, device=device)
        dist.broadcast(length, source, group)
    if not length.item():
        raise PlanError(f"process {source} made no plan", fix="see the error that it raised")
    body = (
        torch.frombuffer(bytearray(text), dtype=torch.uint8)
        if text
        else torch.empty(int(length.item()), dtype=torch.uint8)
    )
    body = body.to(device)
    dist.broadcast(body, source, group)
    return Plan.from_json(bytes(body.cpu().tolist()).decode(), where=f"the plan of process {source}")


def _without_plan(who: str) -> InputError:
    return InputError(f"{who} has no plan", fix="pass the plan that surgery.plan(...) gave")
