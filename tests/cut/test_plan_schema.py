"""A plan is data: whatever a file holds, it is applied as it was checked, or refused with one PlanError."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import surgeon
from surgeon.cut.plan import Plan
from surgeon.errors import MendError, PlanError, SurgeonError
from surgeon.mend.apply_edits import apply_edit
from surgeon.mend.edits import Edit


class Holder:
    """A plain object with numbers."""

    def __init__(self) -> None:
        self.width = 12


class Net(nn.Module):
    """A literal in forward, and what attribute paths may and may not lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.table, self.flag, self.name = {"width": 12, "sizes": [12, 8]}, True, "12"
        self.held, self.opened = Holder(), []

    @property
    def computed(self) -> int:
        self.opened.append("read")
        return 12

    @computed.setter
    def computed(self, value: int) -> None:
        self.opened.append("written")

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu().view(-1, 12)).tanh())


X = torch.randn(4, 6)


def made() -> Plan:
    torch.manual_seed(0)
    surgery = surgeon.inspect(Net().eval(), X)
    plan = surgery.plan(0.5, round_to=1)
    plan.apply(surgery.model)
    return plan


PLAN = made()
HONEST = json.loads(PLAN.to_json())


def signed(data: dict[str, Any]) -> str:
    """A plan's text with a checksum that fits."""
    body = {key: value for key, value in data.items() if key not in ("format", "version", "checksum")}
    text = json.dumps(body, sort_keys=True).encode()
    return json.dumps({**data, "checksum": hashlib.sha256(text).hexdigest()})


def forged(*path: Any, value: Any) -> str:
    """The honest plan with another value at one place (`...`: without it)."""
    data = copy.deepcopy(HONEST)
    *front, last = path
    at: Any = data
    for key in front:
        at = at[key]
    if value is ...:
        del at[last]
    elif isinstance(at, list) and last == len(at):
        at.append(value)
    else:
        at[last] = value
    return signed(data)


def edit(**fields: Any) -> str:
    """The honest plan with one more edit."""
    item = {"module": "", "kind": "attribute", "name": "table.width", "old": 12, "new": 6, **fields}
    return forged("edits", len(HONEST["edits"]), value=item)


def test_the_text_is_the_plan() -> None:
    assert HONEST["edits"], "the literal in forward"
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert signed(HONEST) == json.dumps(HONEST)
    assert max(map(len, PLAN.to_json().splitlines())) < 400
    small = Plan.from_json(PLAN.to_json()).apply(Net().eval())
    assert small(X).shape == (4, 3) and small.a.out_features == 6


WHOLE = [1e30, -1, True, "3", None, 2.5, [1], {}, 1 << 70]
HEAD = ("format", "version", "checksum")
CASES: dict[str, tuple[str | bytes, str]] = {
    **{f"index {bad!r}": (forged("kept", "a.weight", "0", value=[0, bad]), r"kept\['a.weight'\]\['0'\]") for bad in WHOLE},
    **{f"macs {bad!r}": (forged("macs", value=bad), "macs") for bad in WHOLE},
    **{f"new {bad!r}": (forged("edits", 0, "new", value=bad), r"edits\[0\].new") for bad in WHOLE if bad != -1},
    **{f"without {name}": (forged(name, value=...), f"{name}' is missing") for name in HONEST if name not in HEAD},
    **{f"without {name}": (forged("edits", 0, name, value=...), f"{name}' is missing") for name in HONEST["edits"][0]},
    "twice the same index": (forged("kept", "a.weight", "0", value=[0, 3, 3]), "each larger"),
    "descending": (forged("kept", "a.weight", "0", value=[3, 0]), "each larger"),
    "no index": (forged("kept", "a.weight", "0", value=[]), "a list of indices"),
    "no dim": (forged("kept", "a.weight", value={}), "kept indices by dim"),
    "a dim below zero": (forged("kept", "a.weight", "-1", value=[0]), "a dim from 0"),
    "a dim with a zero": (forged("kept", "a.weight", "00", value=[0]), "a dim from 0"),
    "a dim of another script": (forged("kept", "a.weight", "\u0661", value=[0]), "a dim from 0"),
    "too many dims": (forged("kept", "a.weight", "64", value=[0]), "a dim from 0"),
    "kept is a list": (forged("kept", value=[]), "kept"),
    "a long name": (forged("kept", "x" * 5000, value={"0": [0]}), "a name of at most"),
    "a name with a line end": (forged("kept", "a\nb", value={"0": [0]}), "a name of at most"),
    "an unknown field": (forged("more", value=1), "'more' is unknown"),
    "an unknown field of an edit": (forged("edits", 0, "more", value=1), "'more' is unknown"),
    "an unknown kind": (edit(kind="code"), "its kind is 'code'"),
    "an edit that is a text": (forged("edits", 0, value="x"), r"edits\[0\]"),
    "a statement": (edit(kind="source", name="forward:0", new="4))\n    import os\n    ((0"), "whole number"),
    "a signed number in source": (edit(kind="source", name="forward:0", new=-6), "has no sign"),
    "a method by dunder": (edit(kind="source", name="__init__:0"), "leads out"),
    "no method": (edit(kind="source", name="forward.x.y:0"), "no name of a number"),
    "a place without number": (edit(kind="source", name="forward:x"), "no name of a number"),
    "globals": (edit(name="forward.__globals__.torch"), "leads out"),
    "the class": (edit(name="__class__.forward"), "leads out"),
    "a module by dunder": (edit(module="__dict__"), "leads out"),
    "an empty part": (edit(name="table..width"), "no name of a number"),
    "a deep path": (edit(name=".".join("abcdefghij")), "no name of a number"),
    "a hash": (forged("hash", value="../../etc"), "a digest"),
    "a deep request": (forged("request", value={"a": [[[[[[[[[1]]]]]]]]]}), "nested deeper"),
    "a request that is a list": (forged("request", value=[]), "an object is expected"),
    "outputs that are no names": (forged("request", "outputs", value=[1]), "a list of texts"),
    "remarks that are no list": (forged("request", "rescaled", value=5), "a list of names"),
    "missed groups that are a number": (forged("request", "missed", value=5), "an object is expected"),
    "missed groups of text": (
        forged("request", "missed", value=[{"group": "a", "width": "8", "asked": 0.5, "reached": 0.2}]), "a whole number",
    ),
    "shares above one": (
        forged("request", "missed", value=[{"group": "a", "width": 8, "asked": 5, "reached": 0.2}]), "a share from 0 to 1",
    ),
    "outputs that are no list": (forged("request", "outputs", value="all"), "a list of names"),
    "NaN": (signed(HONEST).replace('"macs": ', '"macs": NaN, "x": ', 1), "NaN"),
    "a number beyond floats": (signed(HONEST).replace('"ratio": 0.5', '"ratio": 1e400'), "inf is no number"),
    "a name twice": (signed(HONEST)[:-1] + ', "macs": 1}', "twice"),
    "another version": (forged("version", value=2), "version 2"),
    "a true version": (forged("version", value=True), "version True"),
    "no plan": ("{}", "not a surgeon plan"),
    "a list": ("[]", "not a surgeon plan"),
    "nothing": ("", "cannot read the plan"),
    "half": (signed(HONEST)[: len(signed(HONEST)) // 2], "cannot read the plan"),
    "no text": (b"\xff\xfe" * 100, "cannot read the plan"),
    "deep": ("[" * 100_000 + "]" * 100_000, "cannot read the plan"),
    "deep objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "cannot read the plan"),
    "many lists": ("[" + "[]," * 4_000_001 + "1]", "more than"),
    "a number of a million digits": (signed(HONEST).replace('"size": ', '"size": ' + "1" * 1_000_000, 1), "cannot read"),
    "a wrong checksum": (json.dumps({**HONEST, "checksum": "0" * 64}), "changed after it was written"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_malformed_plans_are_refused(name: str) -> None:
    text, words = CASES[name]
    with pytest.raises(PlanError, match=words) as caught:
        Plan.from_json(text, where="some/plan.json")
    assert "some/plan.json" in str(caught.value) and len(str(caught.value)) < 600


def test_files_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    for path, words in (
        (tmp_path, "directory|folder"), (tmp_path / "none", "No such file"), (tmp_path / "pipe", "a pipe"),
        (tmp_path / "loop", "symbolic links"), (tmp_path / "large", "at most"), (Path("/dev/zero"), "a device"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=words):
            Plan.load(path)
    with pytest.raises(PlanError, match="null"):
        Plan.load("a\0b")


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4).map(str),
    st.lists(st.integers(-3, 20), max_size=4), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["__class__", "a.weight", "attribute", "source", "forward:0", "a.__dict__", "1e9", "computed"]),
    st.sampled_from([..., 1 << 31, 1 << 63, -(1 << 63), [0, 1], [0, 99], {"0": [1]}, {"9": [1]}, [[0]]]),
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, ...]]:
    """Every place in a nest, itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(key, *rest) for key, item in items for rest in ((), *places(item))]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_is_refused_or_harmless(data: st.DataObject) -> None:
    """With a checksum that fits: a PlanError when read, or a plan that applies or is refused by the family."""
    path = data.draw(st.sampled_from(places(HONEST)))
    value = data.draw(JUNK)
    try:
        text = forged(*path, value=value)
    except TypeError:  # json cannot say it
        return
    try:
        plan = Plan.from_json(text)
    except PlanError:
        return
    net = Net().eval()
    try:
        small = plan.apply(net)
    except SurgeonError:
        return
    assert type(small).__name__ == "Net" and not net.opened and not small.opened
    assert Plan.from_json(plan.to_json()) == plan


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200) | st.integers(0, 10**6))
def test_any_text_is_refused(data: bytes | str | int) -> None:
    whole = PLAN.to_json()
    text = whole[: data % len(whole)].rstrip() if isinstance(data, int) else data
    if isinstance(data, int) and text == whole.rstrip():
        return
    with pytest.raises(PlanError):
        Plan.from_json(text)


# -- edits of a well-formed plan that lead where they may not -----------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "computed"}, "is computed"),
        ({"name": "held.none"}, "nothing is called"),
        ({"name": "flag", "old": 1, "new": 0}, "holds True"),
        ({"name": "name"}, "holds '12'"),
        ({"name": "table"}, "holds a dict"),
        ({"name": "table.none"}, "nothing is called"),
        ({"name": "table.sizes.2"}, "has no item"),
        ({"name": "table.sizes.x"}, "has no item"),
        ({"name": "forward.a"}, "nothing is called|not data"),
        ({"name": "_modules.a.out_features"}, "Python's or torch's"),
        ({"name": "training", "old": 1, "new": 0}, "Python's or torch's"),
        ({"name": "_version", "old": 2, "new": 1}, "nothing is called"),
        ({"name": "a.out_features"}, "nothing is called"),
        ({"module": "none"}, "no such module"),
        ({"module": "forward"}, "no such module"),
        ({"module": "a.weight"}, "no such module"),
        ({"name": "table.width", "old": 13, "new": 7}, "holds 6"),
        ({"kind": "source", "name": "none:0"}, "no such method"),
        ({"kind": "source", "name": "forward:7"}, "not number 7"),
        ({"kind": "literal", "name": "view:9:0.1"}, "the call is not there"),
        ({"kind": "literal", "name": "view:0:0.0"}, "it holds"),
        ({"kind": "literal", "name": "view:0:0.7"}, "nothing at 7"),
        ({"kind": "operand", "name": "view:0:0.1"}, "no operand"),
        ({"kind": "operand", "name": "view:0:0.0.users"}, "nothing at users"),
    ],
)  # fmt: skip
def test_edits_stay_within_the_model(change: dict[str, Any], words: str) -> None:
    plan = Plan.from_json(edit(**change))
    net = Net().eval()
    with pytest.raises(MendError, match=words):
        plan.apply(net)
    assert not net.opened


@pytest.mark.parametrize("name", ["table.width", "table.sizes.0", "held.width"])
def test_edits_of_plain_data_are_made(name: str) -> None:
    small = Plan.from_json(edit(name=name)).apply(Net().eval())
    assert 6 in (small.table["width"], small.table["sizes"][0], small.held.width)


def test_numbers_of_the_class_are_hidden_and_not_changed() -> None:
    class Wide(nn.Module):
        width = 12

    one, other = Wide(), Wide()
    apply_edit(one, Edit("", "attribute", "width", 12, 6))
    assert (one.width, other.width, Wide.width) == (6, 12, 12)


def test_indices_beyond_a_tensor_are_refused_wherever_a_plan_goes() -> None:
    kept = {name: dict(dims) for name, dims in PLAN.kept.items()}
    kept["a.weight"][0] = [0, 99]
    plan = dataclasses.replace(PLAN, kept=kept)
    net = Net().eval()
    surgery = surgeon.inspect(net, X)
    for use in (
        lambda: plan.apply(net),
        lambda: surgery.compose([plan]),
        lambda: surgeon.verify(net, net, plan),
    ):
        with pytest.raises(PlanError, match="of shape"):
            use()
