"""fields_of(text) -> the fields of a plan, after every one of them was checked; text_of(fields) -> the text.

A plan may come from anywhere. Its text is plain data of a fixed form: what is unknown, missing, of another type, out
of bounds or out of order is refused before anything is made of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from surgeon.errors import PlanError
from surgeon.mend.edits import Edit

LARGEST_TEXT = 128 << 20  # bytes
_FORMAT, _VERSION = "surgeon-plan", 1
_CONTAINERS = 4_000_000  # lists and objects in one text
_DIMS = 64  # torch's own limit
_INDEX = 1 << 31
_COUNT = 1 << 62
_NAME = 1000  # characters
_DEPTH = 8  # of the request
_COUNTS = ("macs", "params", "macs_before", "params_before", "size", "memory")
_LISTS = ("outputs", "rescaled")  # of texts, in the request
_ANEW = "make the plan anew with surgery.plan(...), or pass a file written by plan.save(...)"


def text_of(fields: Mapping[str, Any]) -> str:
    """A plan's fields (`kept`, `edits` as `Edit`s, ...) as JSON, one tensor a line."""
    texts: dict[int, str] = {}  # of indices: many slots share one list
    kept: dict[str, dict[str, str]] = {}
    for name, dims in fields["kept"].items():
        kept[name] = {}
        for dim, index in dims.items():
            if id(index) not in texts:
                texts[id(index)] = json.dumps(list(map(int, index)))
            kept[name][str(int(dim))] = texts[id(index)]
    body: dict[str, Any] = {
        **fields,
        "edits": [{**vars(edit), "old": int(edit.old), "new": int(edit.new)} for edit in fields["edits"]],
        "request": plain(fields["request"]),
    }
    body |= {name: int(body[name]) for name in _COUNTS}
    sums = {key: json.dumps(value, sort_keys=True) for key, value in body.items() if key != "kept"}
    sums["kept"] = _sorted({name: _sorted(dims) for name, dims in kept.items()})
    head = {"format": _FORMAT, "version": _VERSION, "checksum": _digest(_sorted(sums))}
    lines = {key: json.dumps(value) for key, value in (head | body | {"kept": None}).items()}
    lines["kept"] = _lines({name: _object(dims) for name, dims in kept.items()}, "  ")
    return _lines(lines, " ") + "\n"


def _object(members: Mapping[str, str]) -> str:
    """A JSON object of members that are JSON already, as `json.dumps` writes it."""
    return f"{{{', '.join(f'{json.dumps(name)}: {value}' for name, value in members.items())}}}"


def _sorted(members: Mapping[str, str]) -> str:
    return _object(dict(sorted(members.items())))


def _lines(members: Mapping[str, str], margin: str) -> str:
    """A JSON object of members that are JSON already, one on each line."""
    said = ",\n".join(f"{margin}{json.dumps(name)}: {value}" for name, value in members.items())
    return f"{{\n{said}\n{margin[1:]}}}" if said else "{}"


def plain(value: Any) -> Any:
    """What was asked for as JSON can say it: numbers, texts, lists and objects; of anything else its text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "__index__"):
        return int(value)
    if hasattr(value, "__float__") and math.isfinite(float(value)):
        return float(value)
    return str(value)


def fields_of(text: str | bytes, where: str = "") -> dict[str, Any]:
    """The fields of a plan's text: `kept` with dims as whole numbers, `edits` as `Edit`s, the others as they stand.

    Args:
        where: for messages.

    Raises:
        PlanError: the text is damaged, was changed, or is not a plan; where and what is wrong are said.
    """
    reader = _Reader(where)
    data = reader.parsed(text)
    body = {key: value for key, value in data.items() if key not in ("format", "version", "checksum")}
    fields = reader.fields(body)
    if data.get("checksum") != _checksum(body):
        raise PlanError(
            "the plan was changed after it was written", where=where, why="its checksum does not match",
            fix="make the plan anew with surgery.plan(...)",
        )  # fmt: skip
    return fields


def _checksum(body: Mapping[str, Any]) -> str:
    return _digest(json.dumps(body, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class _Reader:
    """Checks the parts of one text; `where` is the file."""

    def __init__(self, where: str) -> None:
        self.where = where

    def refuse(self, place: str, why: str) -> NoReturn:
        where = ": ".join(part for part in (self.where, place) if part)
        raise PlanError("this is not a plan that surgeon wrote", where=where, why=why, fix=_ANEW)

    def parsed(self, text: str | bytes) -> dict[str, Any]:
        """The outermost object of a text that says that it is a plan of this version."""
        if len(text) > LARGEST_TEXT:
            self.refuse("", f"it has {len(text):,} bytes; at most {LARGEST_TEXT:,} are read")
        try:
            said = text if isinstance(text, str) else text.decode()
            if said.count("[") + said.count("{") > _CONTAINERS:
                self.refuse("", f"it holds more than {_CONTAINERS:,} lists and objects")
            data = json.loads(said, object_pairs_hook=self._once, parse_constant=self._no_number)
        except (ValueError, RecursionError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError("cannot read the plan", where=self.where, why=str(error), fix=_ANEW) from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise PlanError("this file is not a surgeon plan", where=self.where, fix=_ANEW)
        if type(data.get("version")) is not int or data["version"] != _VERSION:
            what = f"plan version {str(data.get('version'))[:40]} is not supported (this is {_VERSION})"
            raise PlanError(what, where=self.where)
        return data

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self.refuse("", "a name stands twice in one object")
        return found

    def _no_number(self, name: str) -> NoReturn:
        self.refuse("", f"it holds {name}, which is no number of JSON")

    def fields(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """All fields but the first three."""
        checks: dict[str, Callable[[str, Any], Any]] = {
            "kept": self._kept, "hash": self._hash, "edits": self._edits, "request": self._request,
            **dict.fromkeys(_COUNTS, lambda place, value: self._whole(place, value, 0, _COUNT)),
        }  # fmt: skip
        self._keys("", body, set(checks))
        return {name: check(name, body[name]) for name, check in checks.items()}

    def _keys(self, place: str, found: Any, known: set[str]) -> None:
        if not isinstance(found, dict):
            self.refuse(place, f"an object is expected, not {_short(found)}")
        for name in sorted(known ^ set(found)):
            self.refuse(place, f"{_short(name)} is {'missing' if name in known else 'unknown'}")

    def _whole(self, place: str, value: Any, low: int, high: int) -> int:
        if type(value) is not int or not low <= value < high:
            self.refuse(place, f"a whole number from {low} to {high - 1} is expected, not {_short(value)}")
        return int(value)

    def _text(self, place: str, value: Any) -> str:
        if not isinstance(value, str) or len(value) > _NAME or not value.isprintable():
            self.refuse(place, f"a name of at most {_NAME} characters is expected, not {_short(value)}")
        return value

    def _hash(self, place: str, value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{16,64}", value):
            self.refuse(place, f"a digest is expected, not {_short(value)}")
        return value

    def _kept(self, place: str, value: Any) -> dict[str, dict[int, list[int]]]:
        if not isinstance(value, dict):
            self.refuse(place, f"an object is expected, not {_short(value)}")
        return {
            self._text(place, name): self._dims(f"{place}[{name!r}]", dims) for name, dims in value.items()
        }

    def _dims(self, place: str, value: Any) -> dict[int, list[int]]:
        if not isinstance(value, dict) or not value:
            self.refuse(place, f"kept indices by dim are expected, not {_short(value)}")
        found = {}
        for dim, index in value.items():
            if dim not in _KNOWN_DIMS:
                self.refuse(place, f"a dim from 0 to {_DIMS - 1} is expected, not {_short(dim)}")
            found[int(dim)] = self._indices(f"{place}[{dim!r}]", index)
        return found

    def _indices(self, place: str, value: Any) -> list[int]:
        if not isinstance(value, list) or not value:
            self.refuse(place, f"a list of indices is expected, not {_short(value)}")
        before = -1
        for number, index in enumerate(value):
            if type(index) is not int or not before < index < _INDEX:
                said = f"index {number} is {_short(index)}"
                self.refuse(
                    place, f"whole numbers from 0 are expected, each larger than the one before: {said}"
                )
            before = index
        return value

    def _edits(self, place: str, value: Any) -> tuple[Edit, ...]:
        if not isinstance(value, list):
            self.refuse(place, f"a list is expected, not {_short(value)}")
        return tuple(self._edit(f"{place}[{number}]", item) for number, item in enumerate(value))

    def _edit(self, place: str, value: Any) -> Edit:
        self._keys(place, value, {"module", "kind", "name", "old", "new"})
        for name in ("module", "kind", "name"):
            self._text(f"{place}.{name}", value[name])
        for name in ("old", "new"):
            self._whole(f"{place}.{name}", value[name], -_COUNT, _COUNT)
        try:
            edit = Edit(**value)
        except PlanError as error:
            self.refuse(place, error.why)
        if edit.old * edit.new < 0:
            self.refuse(place, f"a cut changes no sign, but {edit.old} becomes {edit.new}")
        return edit

    def _request(self, place: str, value: Any, depth: int = _DEPTH) -> Any:
        if depth == _DEPTH and not isinstance(value, dict):
            self.refuse(place, f"an object is expected, not {_short(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            self.refuse(place, f"{value} is no number of JSON")
        if isinstance(value, list | dict):
            if not depth:
                self.refuse(place, f"it is nested deeper than {_DEPTH}")
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                self._request(f"{place}[{_short(key)}]", item, depth - 1)
        for name in _LISTS if depth == _DEPTH else ():
            if name in value:
                self._names(f"{place}.{name}", value[name])
        if depth == _DEPTH and "missed" in value:
            self._missed(f"{place}.missed", value["missed"])
        return value

    def _missed(self, place: str, value: Any) -> None:
        for group in value if isinstance(value, list) else [value]:
            self._keys(place, group, {"group", "width", "asked", "reached"})
            self._text(place, group["group"])
            self._whole(place, group["width"], 1, _INDEX)
            for name in ("asked", "reached"):
                if type(group[name]) not in (int, float) or not 0 <= group[name] <= 1:
                    self.refuse(place, f"a share from 0 to 1 is expected, not {_short(group[name])}")

    def _names(self, place: str, value: Any) -> None:
        if not isinstance(value, list):
            self.refuse(place, f"a list of names is expected, not {_short(value)}")
        for name in value:
            if not isinstance(name, str):
                self.refuse(place, f"a list of texts is expected, not {_short(name)}")


_KNOWN_DIMS = frozenset(map(str, range(_DIMS)))


def _short(value: Any) -> str:
    """Any value, in a message."""
    text = repr(value) if not isinstance(value, list | dict) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= 60 else text[:57] + "..."
