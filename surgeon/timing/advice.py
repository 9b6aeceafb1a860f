"""Measured layers of an ONNX file -> what is slow about them, and what would make them faster."""

from __future__ import annotations

from collections import defaultdict

from surgeon.timing.diagnosis import SHOWN, SLOWER, Diagnosis

_TINY = 0.01  # ms: an op that takes less is mostly the starting of it
_MUCH = 0.2  # share of the time from which a cause is worth advice
PRODUCTS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def advice_on(found: Diagnosis) -> list[str]:
    """What to change, the cause that takes most of the time first."""
    odd = [layer for layer in found.layers if layer.aligned is not None]
    slow = [layer for layer in odd if layer.fast is False]
    worse = _not_faster(found)
    waits = [layer for layer in found.layers if layer.waits and layer.ms >= _TINY]
    tiny = [layer for layer in found.layers if layer.ms < _TINY]
    started = max(found.ms - sum(layer.ms for layer in found.layers), 0.0) / max(found.ms, 1e-12)
    causes: list[tuple[float, str]] = []
    if odd:
        what = f"{len(odd)} convolutions ({found.share(odd):.0%} of the time) have widths that are no whole blocks"
        what += f", {len(slow)} of them off the fast path" if slow else ", which are padded and computed"
        causes.append((found.share(odd), f"{what}: cut with round_to={found.block}"))
    if worse:
        names = ", ".join(repr(name) for name in worse[:SHOWN])
        share = found.share([layer for layer in found.layers if layer.name in worse])
        causes.append(
            (
                share,
                f"{len(worse)} layers are not faster than before ({share:.0%}): leave them whole with ignore=[{names}]",
            )
        )
    if found.share(waits) > _MUCH:
        kinds: dict[str, float] = defaultdict(float)
        for layer in waits:
            kinds[layer.op] += layer.ms
        most = ", ".join(sorted(kinds, key=lambda kind: -kinds[kind])[:3])
        text = f"{found.share(waits):.0%} of the time waits for memory (most of it {most}): fewer MACs alone do not help there; "
        causes.append(
            (
                found.share(waits),
                text + "cut the widest activations, or surgeon.quantize(...) to move fewer bytes",
            )
        )
    if found.share(tiny) + started > _MUCH:
        share = found.share(tiny) + started
        text = f"{len(tiny)} ops of less than {_TINY * 1e3:.0f} us and starting them take {share:.0%}: "
        causes.append(
            (share, text + "use a larger batch, fewer layers rather than narrower ones, or CUDA graphs")
        )
    causes.sort(key=lambda cause: -cause[0])
    return [text for _, text in causes] or [
        "nothing stands out: the time is in products on the fast path; cut more of them"
    ]


def _not_faster(found: Diagnosis) -> list[str]:
    """Paths of the layers with products that take as long as before, the slowest first."""
    sums: dict[str, float] = defaultdict(float)
    for layer in found.layers:
        if layer.op in PRODUCTS and layer.before_ms is not None:
            sums[layer.name] += layer.ms
    before = {layer.name: layer.before_ms for layer in found.layers if layer.before_ms is not None}
    return sorted(
        (name for name, ms in sums.items() if ms > SLOWER * before[name] and ms >= _TINY),
        key=lambda name: -sums[name],
    )
