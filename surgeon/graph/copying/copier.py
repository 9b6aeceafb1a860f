"""Copier: copies what a model holds, and binds what leads to the model to the copy."""

from __future__ import annotations

import collections
import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from surgeon.graph.copying.reach import Reach, reachable
from surgeon.graph.copying.rebuild import CannotCopyError, Globals, bound, rebuilt, scripted
from surgeon.graph.copying.references import (
    ATOMIC,
    globals_read,
    is_atomic,
    is_weak,
    referent,
    sets_globals,
    slots_held,
)
from surgeon.graph.tensors import copied_tensor, named_tensors

Memo = dict[int, Any]
T = TypeVar("T")
_MISSING = object()
_EMPTY = (dict, OrderedDict)
_NOT_COPIED = ("_compiled_call_impl",)  # what `module.compile()` made: it runs the module that it was made of


class Copier:
    """Copies what a model holds; `memo` says what took the place of what.

    Inside of closures and behind weak references (`foreign`) only what leads to the model is copied: the rest
    is no part of it.
    """

    def __init__(self, model: nn.Module, memo: Memo) -> None:
        self.model, self.memo = model, memo
        self.known: list[tuple[int, Any]] = []  # ids in the order in which they came; keeps the objects alive
        self.way: list[str] = []
        self.foreign = self.inside_object = False

    def __call__(self, value: Any) -> Any:
        if is_atomic(value):
            return value
        found = self.memo.get(id(value), _MISSING)
        if found is not _MISSING:
            return found
        if is_weak(value):
            return self._weak(value)
        if self.foreign and not self.leads_back(value):
            return value
        exact = _EXACT.get(type(value))
        if exact is not None:
            return exact(self, value)
        for kinds, make in _MAKERS:
            if isinstance(value, kinds):
                return make(self, value)
        return self._object(value)

    def attributes(self, tensor: Tensor, new: Tensor) -> None:
        """What the user's code hung on a tensor, hung on the one that took its place."""
        for name, value in vars(tensor).items():
            if not is_weak(value) or self.leads_back(value):
                new.__dict__[name] = self(value)

    @functools.cached_property
    def leads_back(self) -> Reach:
        """Whether anything that the model owns, other than through closures and weak references, can be reached
        from an object.
        """
        shared = (types.FunctionType, types.BuiltinFunctionType, tuple, frozenset)

        def goes_on(value: Any) -> bool:
            return not isinstance(value, types.FunctionType) and not is_weak(value)

        owned = reachable(self.model, goes_on)
        return Reach(
            {key for key, value in owned.items() if not is_weak(value) and not isinstance(value, shared)}
        )

    @functools.cached_property
    def holds_model(self) -> Reach:
        """Whether a module or tensor of the model can be reached from an object."""
        parts = (*self.model.modules(), *(tensor for _, tensor in named_tensors(self.model)))
        return Reach({id(part) for part in parts})

    def _know(self, value: Any, new: T) -> T:
        self.memo[id(value)] = new
        self.known.append((id(value), value))
        return new

    def _forget(self, mark: int) -> None:
        """Nothing was copied since `mark`."""
        for key, _ in self.known[mark:]:
            self.memo.pop(key, None)

    def _at(self, label: str, value: Any) -> Any:
        if type(value) in ATOMIC:
            return value
        found = self.memo.get(id(value), _MISSING)
        if found is not _MISSING:
            return found
        self.way.append(label)
        new = self(value)
        self.way.pop()
        return new

    # -- modules and containers ------------------------------------------------------------------------------

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return self._know(module, scripted(module, self.memo))
        if isinstance(module, fx.GraphModule):
            for name, value in module.__dict__.items():
                self._at(name, value)
            made: nn.Module = copy.deepcopy(module, self.memo)
            return made
        new = self._know(module, nn.Module.__new__(type(module)))
        for name, value in module.__dict__.items():
            if type(value) in _EMPTY and not value and id(value) not in self.memo:  # most of what it holds
                new.__dict__[name] = self._know(value, type(value)())
            elif name not in _NOT_COPIED:
                new.__dict__[name] = value if type(value) in ATOMIC else self._at(name, value)
        for name, value in slots_held(module):
            object.__setattr__(new, name, self._at(name, value))
        return new

    def _dict(self, value: Any) -> Any:
        """A dict, an `OrderedDict` or a `defaultdict`."""
        counts = isinstance(value, collections.defaultdict)
        new = self._know(value, type(value)(self(value.default_factory)) if counts else type(value)())
        for key, item in value.items():
            new[key if type(key) in ATOMIC else self(key)] = self._at(str(key), item)
        return new

    def _list(self, value: Any) -> Any:
        """A list or a deque."""
        new: Any = self._know(value, deque(maxlen=value.maxlen) if isinstance(value, deque) else [])
        new.extend(self._at(str(place), item) for place, item in enumerate(value))
        return new

    def _several(self, value: Any) -> Any:
        """A tuple or a set."""
        items = [self._at(str(place), item) for place, item in enumerate(value)]
        if id(value) in self.memo:  # it holds itself
            return self.memo[id(value)]
        same = isinstance(value, tuple) and all(a is b for a, b in zip(items, value, strict=True))
        return self._know(value, value if same else type(value)(items))

    def _tensor(self, tensor: Tensor) -> Tensor:
        new: Tensor = self._know(tensor, copied_tensor(tensor))
        self.attributes(tensor, new)
        return new

    # -- what leads to other objects -------------------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        others = self._other_globals(function)
        if not others and not self.leads_back(function):
            return self._know(function, function)  # type: ignore[no-any-return]  # it is what was given
        cells = {id(cell): cell for cell in function.__closure__ or ()}
        for key, cell in cells.items():
            if key not in self.memo:
                self._know(cell, types.CellType())
        code = function.__code__
        closure = (
            None if function.__closure__ is None else tuple(self.memo[id(c)] for c in function.__closure__)
        )
        space = Globals(function.__globals__) if others else function.__globals__
        new = types.FunctionType(code, space, function.__name__, None, closure)
        self._know(function, new)
        outer, self.foreign = self.foreign, True
        space.update({name: self._at(f"global '{name}'", value) for name, value in others.items()})
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._fill(f"closure variable '{name}' of {function.__qualname__}", cell)
        new.__defaults__, new.__kwdefaults__ = self(function.__defaults__), self(function.__kwdefaults__)
        new.__dict__.update({name: self._at(name, value) for name, value in function.__dict__.items()})
        self.foreign = outer
        for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
            setattr(new, name, getattr(function, name))
        return new

    def _other_globals(self, function: types.FunctionType) -> dict[str, Any]:
        """The globals that a function reads and that lead to the model."""
        found = {name: value for name, value in globals_read(function) if self.leads_back(value)}
        return {} if found and sets_globals(function) else found

    def _fill(self, label: str, cell: types.CellType) -> None:
        try:
            held = cell.cell_contents
        except ValueError:  # it holds nothing yet
            return
        self.memo[id(cell)].cell_contents = self._at(label, held)

    def _method(self, method: types.MethodType) -> types.MethodType:
        return types.MethodType(self(method.__func__), self(method.__self__))

    def _builtin(self, method: Any) -> Any:
        """A method of an object of C, such as `list.append`."""
        return getattr(self(method.__self__), method.__name__) if self.leads_back(method) else method

    def _partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        new = type(value)(self(value.func), *self(value.args), **self(value.keywords))
        self._know(value, new)
        new.__dict__.update({name: self(item) for name, item in value.__dict__.items()})
        return new

    def _cached(self, value: Any) -> Any:
        """A function with an `lru_cache`; the copy's is empty."""
        if not self.leads_back(value):
            return value
        return self._know(value, functools.lru_cache(**value.cache_parameters())(self(value.__wrapped__)))

    def _weak(self, value: Any) -> Any:
        target = referent(value)
        if target is None or not self.leads_back(value):
            return value
        if isinstance(value, weakref.WeakMethod):
            return self._know(value, type(value)(self._held(target)))
        new = self._held(target)
        return self._know(value, weakref.ref(new) if isinstance(value, weakref.ref) else weakref.proxy(new))

    def _held(self, target: Any) -> Any:
        """The copy of what a weak reference leads to: something of the model, else it would be gone at once."""
        owner = target.__self__ if isinstance(target, types.MethodType) else target
        if id(owner) not in self.leads_back.targets:
            raise bound(f"{'.'.join(self.way)} (weak reference to a {type(owner).__name__})", "")
        return self(target)

    def _weak_container(self, value: Any) -> Any:
        new = self._know(value, type(value)())
        if isinstance(value, weakref.WeakSet):
            new.update(map(self, value))
        else:
            new.update({self(key): self(item) for key, item in value.items()})
        return new

    # -- other objects ---------------------------------------------------------------------------------------

    def _object(self, value: Any) -> Any:
        """By the object's own protocol.

        Where it, or what it holds, has none (a lock, say), the object is shared; if it holds the model, only those parts.
        """
        mark, way, outer = len(self.known), len(self.way), self.inside_object
        self.inside_object = True
        try:
            return self._copy_of(value)
        except CannotCopyError as error:
            itself = error.args[0] is value
            if itself and outer:  # whoever holds it decides
                raise
            self._forget(mark)
            del self.way[way:]
        finally:
            self.inside_object = outer
        if not self.holds_model(value):
            return self._know(value, value)
        if itself:
            raise bound(f"{'.'.join(self.way)} (a {type(value).__name__}, which cannot be copied)", "")
        self.inside_object = False
        try:
            return self._copy_of(value)
        finally:
            self.inside_object = outer

    def _copy_of(self, value: Any) -> Any:
        return rebuilt(value, self.memo, lambda new: self._know(value, new), self)


_CACHED = type(functools.lru_cache(len))
_MAKERS: tuple[tuple[Any, Callable[[Copier, Any], Any]], ...] = (
    (nn.Module, Copier._module),
    (Tensor, Copier._tensor),
    (types.FunctionType, Copier._function),
    (types.MethodType, Copier._method),
    ((types.BuiltinMethodType, types.MethodWrapperType), Copier._builtin),
    (functools.partial, Copier._partial),
    (_CACHED, Copier._cached),
    ((weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet), Copier._weak_container),
)
_EXACT: dict[type, Callable[[Copier, Any], Any]] = {
    dict: Copier._dict,
    OrderedDict: Copier._dict,
    collections.defaultdict: Copier._dict,
    list: Copier._list,
    deque: Copier._list,
    tuple: Copier._several,
    set: Copier._several,
    frozenset: Copier._several,
}
