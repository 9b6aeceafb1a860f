"""described(plan) -> lines: what a plan removes, what was asked for, what was missed, what of the code changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from surgeon.mend.edits import Edit
from surgeon.selection.options import OPTIONS

_LISTED = 12  # entries of a kind that are named


class Described(Protocol):
    """A `Plan`."""

    @property
    def kept(self) -> Mapping[str, Mapping[int, list[int]]]: ...
    @property
    def macs(self) -> int: ...
    @property
    def params(self) -> int: ...
    @property
    def macs_before(self) -> int: ...
    @property
    def params_before(self) -> int: ...
    @property
    def edits(self) -> tuple[Edit, ...]: ...
    @property
    def request(self) -> Mapping[str, Any]: ...


def described(plan: Described) -> list[str]:
    """The first line says all in short."""
    macs = _change(plan.macs_before, plan.macs, "MACs") if plan.macs_before else "0 MACs"
    lines = [
        f"Plan: {_change(plan.params_before, plan.params, 'params')}, {macs}, {len(plan.kept)} tensors cut"
        + (f", {len(plan.edits)} numbers in the code changed" if plan.edits else "")
    ]
    if not plan.macs_before:
        lines.append("no convolution, matrix product or attention ran, so that MACs say nothing")
    if not plan.kept:
        lines.append("nothing leaves")
    asked = (f"{name} {_short(value)}" for name, value in plan.request.items() if not _silent(name, value))
    lines.append("asked: " + ", ".join(asked))
    lines += _missed(plan.request.get("missed", ()))
    lines += _listed("changed in the code:", (_edit(edit) for edit in plan.edits), "plan.edits")
    kept = (
        f"{name}[{dim}] keeps {len(index)}" for name, dims in plan.kept.items() for dim, index in dims.items()
    )
    return lines + _listed("tensors:", kept, "plan.kept")


def _change(before: int, after: int, what: str) -> str:
    return f"{before:,} -> {after:,} {what} ({after / max(before, 1):.1%})"


def _missed(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every group of which another share leaves than was asked for."""
    if groups:
        yield f"{len(groups)} groups lose another share than was asked for:"
    for group in groups:
        left = round(group["width"] * (1 - group["reached"]))
        yield (
            f"  {group['group']}: asked {group['asked']:.0%}, reached {group['reached']:.0%} "
            f"({left} of {group['width']} channels stay)"
        )


def _listed(title: str, entries: Iterable[str], all_of_them: str) -> list[str]:
    found = list(entries)
    more = len(found) - _LISTED
    lines = [title, *(f"  {entry}" for entry in found[:_LISTED])] if found else []
    return lines + ([f"  and {more} more: {all_of_them} has all"] if more > 0 else [])


def _edit(edit: Edit) -> str:
    return f"{edit.kind} {edit.name} of '{edit.module}': {edit.old} -> {edit.new}"


def _silent(name: str, value: Any) -> bool:
    """Whether a part of the request is said elsewhere, or is a default."""
    return name in ("missed", "config_says") or (name in OPTIONS and value == OPTIONS[name].default)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
