"""Blueprint(model): what a model's config can say of its sizes, learned by building the class from changed
configs.

Models that keep a `config` from which their class builds itself (those of transformers, say) are stored as
config and weights, so a small model is only stored that way if some config builds just its shapes. No names
are known here: each whole number of the config is changed alone, the class is built on the meta device, and
the sizes that moved are those that this number says.
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

from surgeon.capture.isolation.mode import Isolation
from surgeon.coupling.propagate import Slot
from surgeon.graph.process import LOCK
from surgeon.graph.tensors import architecture, named_tensors
from surgeon.mend.attribute_path import set_path

_BUILDS = 96  # configs tried for one plan
_DEPTH = 3  # config.vision_config.hidden_sizes.0
ConfigSizes = Mapping[Slot, int]
Values = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Response:
    """How one size moves with one number of the config: from `old` to `new` when the number goes from `value`
    to `trial`.
    """

    value: int
    trial: int
    old: int
    new: int

    def solve(self, now: int, want: int) -> int | None:
        """The number for which a size that is `now` becomes `want`; None if no whole number does."""
        if (
            self.old * self.trial == self.new * self.value
        ):  # proportional, also where other numbers changed meanwhile
            found = Fraction(self.value * want, now)
        else:
            found = self.value + Fraction((want - now) * (self.trial - self.value), self.new - self.old)
        return int(found) if found.denominator == 1 and found > 0 else None


class ConfigModel:
    """Builds a model's class from changed configs."""

    def __init__(self, model: nn.Module) -> None:
        self.kind = next(kind for kind in type(model).__mro__ if "_surgeon_edits" not in vars(kind))
        self.config: Any = model.config
        self.values: Values = dict(numbers_of(self.config))

    @staticmethod
    def of(model: nn.Module) -> ConfigModel | None:
        """The blueprint of a model whose class builds the same architecture from its config; None for all
        others.
        """
        config = getattr(model, "config", None)
        if not hasattr(config, "to_dict") or not hasattr(type(config), "from_dict"):
            return None
        blueprint = ConfigModel(model)
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
        with LOCK, Isolation(seed=0), torch.device(device):
            try:
                model: nn.Module = self.kind(self.changed(values))
                return model.eval()
            except Exception:  # noqa: BLE001  # a class may refuse sizes with any error; that is an answer
                return None

    @cached_property
    def base(self) -> ConfigSizes:
        """The sizes that the config as it is says."""
        return sizes_of(self._plain)

    @cached_property
    def _plain(self) -> nn.Module:
        built = self.build({})
        assert built is not None
        return built

    @cached_property
    def responses(self) -> dict[Slot, dict[str, Response]]:
        """Which numbers of the config say the size of each slot, and how."""
        found: dict[Slot, dict[str, Response]] = defaultdict(dict)
        for name, (trial, other) in self._trials.items():
            for slot, size in sizes_of(other).items():
                if size != self.base.get(slot, size):
                    found[slot][name] = Response(self.values[name], trial, self.base[slot], size)
        return found

    @cached_property
    def _trials(self) -> dict[str, tuple[int, nn.Module]]:
        """Each number of the config changed alone, as far as the class takes it: what it was changed to, and
        what that builds.
        """
        found = {}
        for name, value in self.values.items():
            built = ((trial, self.build({name: trial})) for trial in (2 * value, 3 * value, value + 1))
            trial, other = next(((trial, model) for trial, model in built if model is not None), (0, None))
            if other is not None:
                found[name] = trial, other
        return found

    @cached_property
    def _mattering(self) -> list[str]:
        """Numbers that say a size, or that change a number that some module keeps (and no tensor's name)."""
        plain = _scalars(self._plain)
        saying = {name for responses in self.responses.values() for name in responses}
        return [
            name
            for name, (_, other) in self._trials.items()
            if name in saying or (sizes_of(other).keys() == self.base.keys() and _scalars(other) != plain)
        ]

    def fits(self, target: ConfigSizes, shares: Collection[Fraction]) -> Iterator[Values]:
        """Changes of the config with which the class builds just these sizes; those that change least come
        first.

        A number may matter without saying a size (a number of heads that only divides), so each is also tried
        at every share.
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
            sizes = sizes_of(built)
            wrong = [slot for slot, size in target.items() if sizes.get(slot) != size]
            if not wrong:
                yield values
                return
            fields = {
                slot: [f for f in self.responses.get(slot, {}) if f not in values]
                for slot in wrong
                if slot in sizes
            }
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
        for name in self._mattering:
            stem, _, last = name.rpartition(".")
            together[stem if last.isdigit() else name].append(name)
        return list(together.values())


def sizes_of(model: nn.Module) -> dict[Slot, int]:
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


def numbers_of(value: Any, path: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, int]]:
    """Every positive whole number in a config: its attributes, those of configs that it holds, numbers in
    lists.
    """
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
            yield from numbers_of(item, name, depth - 1)
