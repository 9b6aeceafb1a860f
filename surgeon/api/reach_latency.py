"""reach(...) -> what is chosen within budgets of which one is a measured latency, and its figures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from surgeon.cut.inspected import Inspected
from surgeon.errors import InputError
from surgeon.latency.predict import LatencyTable, Predictor
from surgeon.latency.search import CLOSE, Candidate, Stopwatch, search
from surgeon.selection.budgets import Costs
from surgeon.selection.cost import Choice, nothing
from surgeon.selection.request import Request


def reach(
    found: Inspected,
    request: Request,
    chosen: Callable[[Request, Costs], Candidate],
    cut: Callable[[Choice], nn.Module],
    block: int,
) -> tuple[Candidate, dict[str, Any]]:
    """What is chosen within the budgets and measured within the latency, and its figures (see `search`).

    Args:
        chosen: what to take within the budgets of a request, given what they are counted in.
        cut: the small model of a choice.
        block: of kernels, by which latencies are predicted.

    Raises:
        InputError: the weights have no values.
        BudgetError: as `search`.
    """
    shapes, graph = found.shapes, found.graph
    device = next((graph.tensors[name].device for name in shapes.parameters), torch.device("cpu"))
    if device.type == "meta":
        raise InputError(
            "a model on the meta device has no latency", fix="pass macs=..., or load the weights"
        )
    runtime, threads = request.options["runtime"], request.options["threads"]
    table = LatencyTable(runtime, threads, device)
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch(found.model, graph.kwargs or graph.args, runtime, threads, folder)
        whole = nothing(shapes.solution)
        predict = Predictor(shapes, whole, table, watch.measure()[0], block)
        limit = request.limit("latency", predict.total)
        fixed = request.but(latency=f"{limit}ms")  # a share is one of what was measured
        costs: dict[str, Any] = {kind: getattr(shapes, kind) for kind in request.budgets if kind != "latency"}
        limits = {kind: request.limit(kind, cost(whole)) for kind, cost in costs.items()}
        return search(
            lambda: chosen(fixed, {**costs, "latency": predict}),
            predict,
            lambda choice: watch.measure(cut(choice)),
            lambda full: request.limit("latency", full),
            lambda choice: any(cost(choice) > (1 - CLOSE) * limits[kind] for kind, cost in costs.items()),
        )
