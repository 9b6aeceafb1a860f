"""Refused: the edits that a search does not try, or not again."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from surgeon.mend.edits import Edit

Key = tuple[str, str, str]


def key(edit: Edit) -> Key:
    """Module, kind and name: the place of an edit, whatever the number."""
    return edit.module, edit.kind, edit.name


class Refused:
    """Places of edits.

    Attributes:
        barred: those that would change a number which is no size: they stay refused.
    """

    def __init__(self, tried: Iterable[Key] = (), barred: Iterable[Key] = ()) -> None:
        self._tried, self.barred = set(tried), set(barred)
        self._reasons: list[str] = []

    def __contains__(self, place: Key) -> bool:
        return place in self._tried or place in self.barred

    def add(self, *places: Key) -> None:
        self._tried.update(places)

    def bar(self, edits: Collection[Edit], constants: Iterable[object]) -> None:
        """Refuse edits for good, because numbers that are no sizes changed with them."""
        self.barred.update(map(key, edits))
        changed = "; ".join(dict.fromkeys(map(str, constants)))
        names = ", ".join(dict.fromkeys(edit.name for edit in edits))
        self._reasons.append(f"a change of {names} would change other numbers as well ({changed})")

    def why(self) -> str:
        """Why edits were barred; "" if none was."""
        return "; ".join(self._reasons)

    def forget(self, modules: Collection[str] | None = None) -> None:
        """Let edits of some modules (of all, if None) be tried again, but not those that are barred: what did
        not help may help beside another edit.
        """
        self._tried = (
            set() if modules is None else {place for place in self._tried if place[0] not in modules}
        )

    def alone(self, edit: Edit) -> Refused:
        """What is refused beside an edit: what was refused by itself may be right together with it."""
        return Refused([key(edit)], self.barred)
