"""Which architectures can be shrunk: every model of the zoo at channel ratio 0.5, with proof; with --peer
also by torch-pruning.

    pip install torchvision timm transformers torch-pruning==1.6.1
    python -m benchmarks.coverage.zoo [--peer] [--filter PATTERN] [--all] [--fresh | --retry] [--jobs 2]

Each model runs in a process of its own with a time limit. Results are kept in benchmarks/.cache/zoo.json, so
that a sweep that was stopped goes on, and docs/zoo.md is written from them (not with --filter). A row works
if the proof passes, and if the small model runs on another batch size, in training mode and through a
backward pass.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.lib import isolated
from benchmarks.lib.results import ROOT, conditions, markdown

RATIO, LIMIT = 0.5, 240  # LIMIT: seconds of CPU time
LEFT, FROZEN = 0.60, 0.05  # what a row may not pass without a reason that is printed beside it
STATUS = Path("/proc/self/status")
TOOLS = ("surgeon", "torch-pruning")


# -- one model, in its own process ---------------------------------------------------------------------------


def measured(tool: str, name: str) -> dict[str, Any]:
    """One row: what one tool makes of one model."""
    from benchmarks.lib.zoo.models import build

    model, inputs = build(name)
    before = sum(p.numel() for p in model.parameters())
    base = _memory()
    start = time.perf_counter()
    row, small = _by_surgeon(model, inputs) if tool == "surgeon" else _by_torch_pruning(model, inputs)
    row |= {"seconds": time.perf_counter() - start, "mib": (_memory("VmHWM") - base) / 2**20}
    row["left"] = sum(p.numel() for p in small.parameters()) / before
    alive(small, inputs, name)
    return row


def _by_surgeon(model: Any, inputs: Any) -> tuple[dict[str, Any], Any]:
    import surgeon

    surgery = surgeon.inspect(model, example_inputs=inputs)
    plan = surgery.plan(RATIO, round_to=1)
    small = plan.apply(model)
    proof = surgeon.verify(model, small, plan, inputs)
    frozen = surgery.frozen_share
    return {"error": proof.error, "frozen": frozen.share, "reason": frozen.reason}, small


def _by_torch_pruning(model: Any, inputs: Any) -> tuple[dict[str, Any], Any]:
    """As in its own examples: the output layer is ignored, heads are declared, and their number is put right
    afterwards.
    """
    import torch_pruning as tp
    from torch import nn

    from benchmarks.lib.zoo.models import classifiers

    heads: dict[Any, int] = {}
    owners: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            heads[module] = module.num_heads
            continue
        count = next(
            (
                getattr(module, a)
                for a in ("num_heads", "num_attention_heads", "n_heads")
                if hasattr(module, a)
            ),
            None,
        )
        layers = [
            getattr(module, a, None)
            for a in ("qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q", "k", "v")
        ]
        for layer in layers:
            if isinstance(layer, nn.Linear) and isinstance(count, int):
                heads[layer] = count
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1:]
    pruner = tp.pruner.MagnitudePruner(
        model,
        inputs,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=RATIO,
        ignored_layers=classifiers(model) or last,
        num_heads=heads,
    )
    pruner.step()
    for module in model.modules():
        qkv = getattr(module, "qkv", None)
        if qkv in pruner.num_heads and isinstance(qkv, nn.Linear):
            module.num_heads = pruner.num_heads[qkv]
            module.head_dim = qkv.out_features // (3 * module.num_heads)
            if hasattr(module, "attn_dim"):
                module.attn_dim = qkv.out_features // 3
        for layer, attributes in (
            ("query", ("num_attention_heads", "attention_head_size", "all_head_size")),
            ("q_proj", ("num_heads", "head_dim", "embed_dim")),
        ):
            inner = getattr(module, layer, None)
            if isinstance(inner, nn.Linear) and inner in pruner.num_heads:
                count = pruner.num_heads[inner]
                for attribute, value in zip(
                    attributes, (count, inner.out_features // count, inner.out_features), strict=True
                ):
                    if hasattr(module, attribute):
                        owners.append((module, attribute, value))
    for module, attribute, value in owners:
        setattr(module, attribute, value)
    return {}, model


def _pictures(item: Any) -> bool:
    """Whether an input is a list of pictures of any size, as torchvision's detectors take."""
    return isinstance(item, list) and all(picture.dim() == 3 for picture in item)


# LoFTR wants matches to train on, Flux's positions are those of one batch, a graph is one sample, and SeemoRe
# runs one image
_EVAL_ONLY = ("kornia/LoFTR", "diffusers/FluxTransformer2DModel", "torch_geometric/", "spandrel/SeemoRe")


def alive(small: Any, inputs: Any, name: str) -> None:
    """Another batch size; training mode and a backward pass.

    Raises:
        Exception: whatever the model raises; ValueError if no gradient arrives.
    """
    import torch

    detector = isinstance(inputs, tuple) and _pictures(inputs[0])
    args, kwargs = _more(inputs)
    if name.startswith(_EVAL_ONLY):
        return
    with torch.no_grad():
        small.eval()(*args, **kwargs)
    small.train()
    args, kwargs = _more(inputs)  # the model may have written into the first ones
    if detector:
        boxes = {"boxes": torch.tensor([[20.0, 20.0, 120.0, 150.0]]), "labels": torch.tensor([1])}
        boxes["masks"] = torch.zeros(1, *inputs[0][0].shape[-2:], dtype=torch.uint8)
        boxes["keypoints"] = torch.tensor([[[60.0, 60.0, 1.0]] * 17])
        args = (args[0], [boxes for _ in args[0]])
    total = sum(
        t.float().mean() for t in tensors(small(*args, **kwargs)) if t.is_floating_point() and t.requires_grad
    )
    total.backward()  # type: ignore[union-attr]  # a model without a float output fails here, as it should
    if not any(p.grad is not None and bool(p.grad.isfinite().all()) for p in small.parameters()):
        raise ValueError("no gradient arrives")


def _more(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with two samples more."""
    import torch

    def longer(item: Any) -> Any:
        if isinstance(item, torch.Tensor) and item.dim():
            return torch.cat([item, item[:1], item[:1]])
        if isinstance(item, list):
            return [*item, item[0], item[0]] if _pictures(item) else [*map(longer, item)]
        return item

    if isinstance(inputs, dict):
        return (), {key: longer(value) for key, value in inputs.items()}
    return tuple(longer(value) for value in (inputs if isinstance(inputs, tuple) else (inputs,))), {}


def tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def _memory(key: str = "VmRSS") -> float:
    for line in STATUS.read_text().splitlines() if STATUS.is_file() else ():
        if line.startswith(f"{key}:"):
            return float(line.split()[1]) * 1024
    return 0.0


# -- the sweep -----------------------------------------------------------------------------------------------


def sweep(names: list[str], tools: list[str], asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All rows by 'tool name'."""
    wanted = {f"{tool} {name}": (tool, name) for name in names for tool in tools}

    def again(row: Mapping[str, Any]) -> bool:
        return asked.fresh or (asked.retry and "failed" in row)

    def show(key: str, row: Mapping[str, Any]) -> None:
        tool, name = wanted[key]
        print(f"{tool:14}", " | ".join(cells(name, row)), flush=True)

    return isolated.sweep(
        "zoo", f"{__package__}.zoo", wanted, limit=LIMIT, jobs=asked.jobs, again=again, show=show
    )


HEADER = ("model", "works", "params left", "frozen", "main reason", "proof error", "seconds", "MiB")


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    if "failed" in row:
        return [name, "no: " + row["failed"], *[""] * 6]
    frozen = [f"{row['frozen']:.1%}", row["reason"], f"{row['error']:.1e}"] if "frozen" in row else [""] * 3
    return [name, "yes", f"{row['left']:.1%}", *frozen, f"{row['seconds']:.1f}", f"{row['mib']:.0f}"]


def summary(names: list[str], rows: Mapping[str, Mapping[str, Any]], tool: str) -> list[str]:
    """Counts and medians of one tool, by library."""
    measured = [rows[f"{tool} {name}"] for name in names if f"{tool} {name}" in rows]
    said = [f"{tool}: {sum('failed' not in row for row in measured)} of {len(measured)} architectures work."]
    for library in dict.fromkeys(name.partition("/")[0] for name in names):
        own = [
            rows[f"{tool} {name}"]
            for name in names
            if name.startswith(f"{library}/") and f"{tool} {name}" in rows
        ]
        fine = [row for row in own if "failed" not in row]
        if not fine:
            said.append(f"{tool}, {library}: 0 of {len(own)} work.")
            continue
        text = f"{tool}, {library}: {len(fine)} of {len(own)} work; median of params left {_median(fine, 'left'):.1%}"
        if tool == "surgeon":
            text += f", most {max(row['left'] for row in fine):.1%}"
            text += f"; median of frozen output channels {_median(fine, 'frozen'):.1%}"
            text += f"; largest proof error {max(row['error'] for row in fine):.1e}"
        said.append(
            f"{text}; median {_median(fine, 'seconds'):.1f} s, most {max(row['seconds'] for row in fine):.0f} s."
        )
    return said


def _median(rows: list[Mapping[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def table_of(names: list[str], rows: Mapping[str, Mapping[str, Any]], tools: list[str]) -> str:
    """A row for each model, torch-pruning's result at its end if that ran."""
    header, table = list(HEADER), []
    for name in names:
        row = cells(name, rows[f"surgeon {name}"])
        if len(tools) > 1:
            peer = rows.get(f"torch-pruning {name}", {"failed": "not run yet"})
            row.append(
                peer["failed"][:80]
                if "failed" in peer
                else f"{peer['left']:.1%} left, {peer['seconds']:.1f} s"
            )
        table.append(row)
    if len(tools) > 1:
        header.append("torch-pruning")
    return markdown(header, table)


def document(names: list[str], rows: Mapping[str, Mapping[str, Any]], tools: list[str]) -> str:
    """docs/zoo.md."""
    said = [line for tool in tools for line in summary(names, rows, tool)]
    table = table_of(names, rows, tools)
    intro = (
        "Every model is cut at channel ratio 0.5 by l1 magnitude, with random weights and no hints. It works if the proof passes "
        "(1e-9 in float64), and if the small model runs on another batch size, in training mode and through a backward pass. "
        "*Frozen* is the share of output channels of weights that may not leave, the model's own outputs apart. Seconds are of "
        "everything together: capture, plan, surgery and proof, on one thread; MiB is the peak above the loaded model. "
        "Other ratios, with what attention loses chosen: [zoo_ratios.md](../benchmarks/results/zoo_ratios.md)."
    )
    lines = [
        "# Supported architectures",
        "",
        intro,
        "",
        *[f"- {line}" for line in said],
        "",
        table,
        "",
        conditions(),
    ]
    return "\n".join(lines) + "\n"


def options(description: str | None) -> argparse.ArgumentParser:
    """What the sweeps with torch-pruning beside surgeon can be asked for."""
    parser = isolated.options(description)
    parser.add_argument("--peer", action="store_true", help="torch-pruning as well")
    return parser


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--all", action="store_true", help="all of torchvision's models, not the smallest of each family"
    )
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "NAME"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        isolated.answer(measured, *chosen.one)
        return
    from benchmarks.lib.zoo.models import names

    tools = list(TOOLS if chosen.peer else TOOLS[:1])
    found = [name for name in names(chosen.all) if not chosen.filter or fnmatch.fnmatch(name, chosen.filter)]
    rows = sweep(found, tools, chosen)
    print("\n".join(line for tool in tools for line in summary(found, rows, tool)))
    if not chosen.filter:
        path = ROOT / "docs" / "zoo.md"
        path.write_text(document(found, rows, tools))
        print(f"written to {path}")


if __name__ == "__main__":
    main()
