"""Blueprint(model): what a model's config can say of its sizes, learned by building the class from changed configs.

Models that keep a `config` from which their class builds itself (those of transformers, say) are stored as config and weights,
so a small model is only stored that way if some config builds just its shapes. No names are known here: each whole number of
the config is changed alone, the class is built on the meta device, and the sizes that moved are those that this number says.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._quiet import quiet_run
from surgeon.edits import Edit, get_path, set_path
from surgeon.errors import PlanError
from surgeon.graph import Graph, architecture, tensor_leaves
from surgeon.groups import Group, Slot
from surgeon.recorder import named_tensors

_BUILDS = 96  # configs tried for one plan
_RUNS = 12  # of models built from them
_DEPTH = 3  # config.vision_config.hidden_sizes.0
Sizes = Mapping[Slot, int]
Values = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Response:
    """How one size moves with one number of the config: from `old` to `new` when the number goes from `value` to `trial`."""

    value: int
    trial: int
    old: int
    new: int

    def solve(self, now: int, want: int) -> int | None:
        """The number for which a size that is `now` becomes `want`; None if no whole number does."""
        if self.old * self.trial == self.new * self.value:  # proportional, also where other numbers changed meanwhile
            found = Fraction(self.value * want, now)
        else:
            found = self.value + Fraction((want - now) * (self.trial - self.value), self.new - self.old)
        return int(found) if found.denominator == 1 and found > 0 else None


class Blueprint:
    """Builds a model's class from changed configs."""

    def __init__(self, model: nn.Module) -> None:
        self.kind = next(kind for kind in type(model).__mro__ if "_surgeon_edits" not in vars(kind))
        self.config: Any = model.config
        self.values: Values = dict(_numbers(self.config))
        self.speaking: list[str] = []  # numbers that matter; known with `responses`

    @staticmethod
    def of(model: nn.Module) -> Blueprint | None:
        """The blueprint of a model whose class builds the same architecture from its config; None for all others."""
        config = getattr(model, "config", None)
        if not hasattr(config, "to_dict") or not hasattr(type(config), "from_dict"):
            return None
        blueprint = Blueprint(model)
        built = blueprint.build({})
        return blueprint if built is not None and architecture(built) == architecture(model) else None

    def changed(self, values: Values) -> Any:
        """A copy of the config with other numbers."""
        config = copy.deepcopy(self.config)
        for name, value in values.items():
            set_path(config, name, value)
        return config

    def build(self, values: Values, device: str = "meta") -> nn.Module | None:
        """The model that the changed config describes; None if the class refuses it."""
        with torch.random.fork_rng(devices=[]), torch.device(device):
            try:
                model: nn.Module = self.kind(self.changed(values))
                return model.eval()
            except Exception:  # noqa: BLE001  # a class may refuse sizes with any error; that is an answer
                return None

    @cached_property
    def base(self) -> Sizes:
        """The sizes that the config as it is says."""
        built = self.build({})
        assert built is not None
        return _sizes(built)

    @cached_property
    def responses(self) -> dict[Slot, dict[str, Response]]:
        """Which numbers of the config say the size of each slot, and how."""
        built = self.build({})
        assert built is not None
        base, plain = self.base, _scalars(built)
        found: dict[Slot, dict[str, Response]] = defaultdict(dict)
        for name, value in self.values.items():
            for trial in (2 * value, 3 * value, value + 1):
                other = self.build({name: trial})
                if other is not None:
                    break
            if other is None:
                continue
            sizes, says = _sizes(other), False
            for slot, size in sizes.items():
                if size != base.get(slot, size):
                    found[slot][name] = Response(value, trial, base[slot], size)
                    says = True
            if says or (sizes.keys() == base.keys() and _scalars(other) != plain):
                self.speaking.append(name)
        return found

    # -- a config for given shapes --------------------------------------------------------------------------------------

    def fits(self, target: Sizes, shares: Collection[Fraction]) -> Iterator[Values]:
        """Changes of the config with which the class builds just these sizes; those that change least come first.

        A number may matter without saying a size (a number of heads that only divides), so each is also tried at every share.
        """
        room = [_BUILDS]
        seen: set[frozenset[tuple[str, int]]] = set()

        def visit(values: Values) -> Iterator[Values]:
            key = frozenset(values.items())
            if room[0] == 0 or key in seen:
                return
            seen.add(key)
            room[0] -= 1
            built = self.build(values)
            if built is None:
                return
            sizes = _sizes(built)
            wrong = [slot for slot, size in target.items() if sizes.get(slot) != size]
            if not wrong:
                yield values
                return
            fields = {slot: [f for f in self.responses.get(slot, {}) if f not in values] for slot in wrong if slot in sizes}
            slot = min(fields, key=lambda s: len(fields[s]), default=wrong[0])
            for name in fields.get(slot, ()):
                new = self.responses[slot][name].solve(sizes[slot], target[slot])
                if new is not None:
                    yield from visit({**values, name: new})

        yield from visit({})
        lists = self._lists()
        for several in (*((names,) for names in lists), *itertools.combinations(lists, 2)):
            for share in shares:
                new = {name: self.values[name] * share for names in several for name in names}
                yield from visit({name: int(value) for name, value in new.items() if value.denominator == 1})

    def _lists(self) -> list[list[str]]:
        """The numbers that matter, those of one list together."""
        together: dict[str, list[str]] = defaultdict(list)
        for name in self.speaking:
            stem, _, last = name.rpartition(".")
            together[stem if last.isdigit() else name].append(name)
        return list(together.values())

    def express(self, small: nn.Module, graph: Graph, shares: Collection[Fraction]) -> Values | str:
        """Changes of the config that build a model which, with the small model's weights, computes the same bit for bit.

        Args:
            small: the model that was cut.
            graph: the original's recorded run; its inputs are used.
            shares: of channels that the plan keeps, slot by slot.

        Returns:
            The changed numbers, or a sentence that says why there are none.
        """
        target = _sizes(small)
        mute = [slot for slot, size in target.items() if slot not in self.responses and size != self.base.get(slot)]
        if mute:
            return f"no number of the config says the size of {_name(mute[0])}"
        if any(tensor.is_meta for tensor in small.parameters()):
            return "the model has no values (meta device), so that no config could be checked"
        outputs: list[Tensor] = []
        for values in itertools.islice(self.fits(target, shares), _RUNS):
            outputs = outputs or _run(small, graph)
            if self._same(values, small, graph, outputs):
                return values
        if outputs:
            return "a model built with these sizes computes something else (constants that it derives from a size, say)"
        slot, fields = self._odd_one(target)
        return f"{_name(slot)} has size {target[slot]}, but {fields or 'the config'} holds for other layers too"

    def _odd_one(self, target: Sizes) -> tuple[Slot, str]:
        """A slot whose share disagrees with that of most others that the same numbers say."""
        shares: dict[str, dict[Fraction, list[Slot]]] = defaultdict(lambda: defaultdict(list))
        for slot, responses in self.responses.items():
            if slot in target:
                shares[", ".join(responses)][Fraction(target[slot], self.base[slot])].append(slot)
        for fields, slots in shares.items():
            if len(slots) > 1:
                return min(slots.values(), key=len)[0], fields
        return next(slot for slot, size in target.items() if size != self.base.get(slot)), ""

    def _same(self, values: Values, small: nn.Module, graph: Graph, outputs: list[Tensor]) -> bool:
        """Whether the config, written and read again, builds a model that computes the very same with the small one's weights."""
        config = self.changed(values)
        if dict(_numbers(type(config).from_dict(config.to_dict()))) != dict(_numbers(config)):
            return False
        built = self.build(values, "cpu")
        if built is None:
            return False
        try:
            built.load_state_dict(small.state_dict(), assign=True)
            found = _run(built.to(next(small.parameters()).device), graph)
        except Exception:  # noqa: BLE001  # whatever a wrongly built model raises: it does not compute the same
            return False
        return len(found) == len(outputs) and all(
            a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, outputs, strict=True)
        )

    # -- a plan that the config can say -----------------------------------------------------------------------------------

    def restrict(self, groups: Iterable[Group], aliases: Mapping[str, str]) -> tuple[list[tuple[str, str]], set[str]]:
        """Pairs of groups whose sizes one number says, so that they must keep the same share; and groups that may not shrink.

        Those are groups with a slot that no number says, or of which a number says a slot too that must stay.

        Args:
            aliases: other names of tied tensors, as in `Graph.aliases`.
        """
        fields_of: dict[str, set[str]] = {}
        free: dict[Slot, set[int]] = defaultdict(set)
        fixed: set[str] = set()
        for group in groups:
            fields_of[group.name] = {field for slot in group.slots for field in self.responses.get(slot, {})}
            if any(slot not in self.responses for slot in group.slots):
                fixed.add(group.name)
            for member in group.members:
                free[member.tensor, member.dim].update(member.index.tolist())
        held = {
            field
            for (name, dim), fields in self.responses.items()
            if len(free[aliases.get(name, name), dim]) < self.base[name, dim]
            for field in fields
        }
        fixed |= {name for name, fields in fields_of.items() if fields & held}
        first: dict[str, str] = {}
        links = {(first.setdefault(field, name), name) for name, fields in fields_of.items() for field in fields}
        return sorted((a, b) for a, b in links if a != b), fixed


def config_edits(blueprint: Blueprint, small: nn.Module, values: Values) -> tuple[Edit, ...]:
    """The edits that bring the small model's config to these numbers."""
    found = []
    for name, new in {**blueprint.values, **values}.items():
        old = get_path(small.config, name)
        if old != new:
            found.append(Edit("", "attribute", f"config.{name}", old, new))
    return tuple(found)


def unsaid(reason: str) -> PlanError:
    """What to raise if a config was to say the new widths, and cannot."""
    return PlanError(
        "the model's config cannot say the new widths",
        why=reason,
        fix="leave config_expressible out, and keep the small model with surgeon.save(small, folder)",
    )


def _run(model: nn.Module, graph: Graph) -> list[Tensor]:
    with quiet_run(model, seed=0):
        return [tensor for _, tensor in tensor_leaves(model(*graph.args, **graph.kwargs))]


def _sizes(model: nn.Module) -> dict[Slot, int]:
    """Sizes of all that a state dict stores."""
    stored = model.state_dict(keep_vars=True)
    return {
        (name, dim): size
        for name, tensor in stored.items()
        if isinstance(tensor, Tensor)
        for dim, size in enumerate(tensor.shape)
    }


def _scalars(model: nn.Module) -> dict[str, Any]:
    """Numbers that modules keep, and the shapes of what they keep but do not store."""
    kinds = int, float, bool, tuple
    found: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    for path, module in model.named_modules():
        found |= {f"{path}:{name}": value for name, value in vars(module).items() if isinstance(value, kinds)}
    return found


def _numbers(value: Any, path: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, int]]:
    """Every positive whole number in a config: its attributes, those of configs that it holds, numbers in lists."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        items = ((k, v) for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("_"))
    for key, item in items:
        name = f"{path}.{key}".lstrip(".")
        if isinstance(item, int) and not isinstance(item, bool):
            if item > 0:
                yield name, item
        elif depth and not isinstance(item, bool | str | dict | Tensor | torch.dtype | type):
            yield from _numbers(item, name, depth - 1)


def _name(slot: Slot) -> str:
    return f"{slot[0]}[{slot[1]}]"
