"""From what a caller writes (names, globs, types, predicates, ``until``) to the parameters and norm layers it means."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from freezekit.freezing.norm import has_statistics
from freezekit.freezing.order import before

Predicate = Callable[[str, nn.Parameter], bool]
Pattern = str | type[nn.Module] | nn.Module | nn.Parameter | Predicate


class PatternError(ValueError):
    """A pattern that selects nothing, or cannot be read as one."""


@dataclass
class Selection:
    """What patterns mean in one model.

    params: name -> parameter; one name a parameter (its first), found by identity, never by value.
    norms: name -> layer with running statistics, when the pattern covers the layer or all parameters it owns.
    shared: the names of each selected parameter that has more than one.
    """

    params: dict[str, nn.Parameter] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()


class _Index:
    """The names of one model, read once. A module or parameter that has several names appears under each."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.params = {
            name: param
            for name, param in model.named_parameters(remove_duplicate=False)
            if param.is_floating_point() or param.is_complex()  # no other dtype can require grad
        }
        self.names: dict[int, list[str]] = {}
        for name, param in self.params.items():
            self.names.setdefault(id(param), []).append(name)

    def under(self, module_name: str) -> tuple[set[int], set[int]]:
        """Ids of the parameters and of the norm layers in the module of that name, itself included."""
        module = self.modules[module_name]
        params = {id(p) for p in module.parameters() if id(p) in self.names}
        return params, {id(m) for m in module.modules() if has_statistics(m)}

    def text(self, pattern: str) -> tuple[set[int], set[int]]:
        params: set[int] = set()
        norms: set[int] = set()
        exact = pattern in self.modules or pattern in self.params
        for name in self.modules:
            if name and (name == pattern if exact else fnmatch.fnmatchcase(name, pattern)):
                more_params, more_norms = self.under(name)
                params |= more_params
                norms |= more_norms
        for name, param in self.params.items():
            if name == pattern if exact else fnmatch.fnmatchcase(name, pattern):
                params.add(id(param))
        return params, norms

    def instances(self, wanted: Callable[[nn.Module], bool]) -> tuple[set[int], set[int]]:
        params: set[int] = set()
        norms: set[int] = set()
        for name, module in self.modules.items():
            if wanted(module):
                more_params, more_norms = self.under(name)
                params |= more_params
                norms |= more_norms
        return params, norms

    def one(self, pattern: Any) -> tuple[set[int], set[int]]:
        if isinstance(pattern, str):
            return self.text(pattern)
        if isinstance(pattern, type):
            if not issubclass(pattern, nn.Module):
                raise TypeError(f"patterns: expected a subclass of nn.Module, got the type {pattern.__name__}")
            kind = pattern
            return self.instances(lambda module: isinstance(module, kind))
        if isinstance(pattern, nn.Module):
            return self.instances(lambda module: module is pattern)
        if isinstance(pattern, nn.Parameter):
            return ({id(pattern)} if id(pattern) in self.names else set()), set()
        if callable(pattern):
            return {id(p) for name, p in self.params.items() if pattern(name, p)}, set()
        raise TypeError(
            "patterns: expected a module or parameter name, a glob, a subclass of nn.Module, a module or parameter of "
            f"the model, or a predicate(name, parameter), got {pattern!r}"
        )

    def near(self, pattern: str) -> list[str]:
        """Up to five names that ``pattern`` may have meant: alike as a whole, or alike in their last part."""
        names = [name for name in (*self.modules, *self.params) if name]
        found = difflib.get_close_matches(pattern, names, n=5, cutoff=0.6)
        last = pattern.rsplit(".", 1)[-1]
        tails = {name.rsplit(".", 1)[-1] for name in names}
        for tail in difflib.get_close_matches(last, sorted(tails), n=2, cutoff=0.75):
            found += [name for name in names if name.rsplit(".", 1)[-1] == tail]
        return list(dict.fromkeys(found))[:5]

    def complaint(self, pattern: Any) -> str:
        if isinstance(pattern, str):
            if self.text_hits(pattern):
                return f"patterns: {pattern!r} has no parameter that can be trained and no running statistics"
            return f"patterns: {self.unknown(pattern)}"
        if isinstance(pattern, type):
            owners = (m for m in self.modules.values() if next(m.parameters(), None) is not None)
            kinds = ", ".join(sorted({type(m).__name__ for m in owners}))
            return (
                f"patterns: no {pattern.__name__} with parameters or running statistics in "
                f"{type(self.model).__name__}; it has {kinds or 'no layer with parameters'}"
            )
        if isinstance(pattern, nn.Module | nn.Parameter):
            return f"patterns: this {type(pattern).__name__} is no part of the model, or has nothing to freeze"
        name = getattr(pattern, "__name__", repr(pattern))
        return f"patterns: the predicate {name} selects none of the {len(self.names)} parameters"

    def unknown(self, pattern: str) -> str:
        near = ", ".join(repr(name) for name in self.near(pattern))
        hint = f"near names: {near}" if near else f"top-level names: {', '.join(map(repr, self.top()))}"
        return f"{pattern!r} matches no module or parameter of {type(self.model).__name__}; {hint}"

    def text_hits(self, pattern: str) -> bool:
        params = (name for name, _ in self.model.named_parameters(remove_duplicate=False))
        names = [name for name in (*self.modules, *params) if name]
        return pattern in names or any(fnmatch.fnmatchcase(name, pattern) for name in names)

    def top(self) -> list[str]:
        children = [name for name, _ in self.model.named_children()]
        return (children or list(self.params))[:8]


def select(model: nn.Module, patterns: Iterable[Any], until: str | None = None, inputs: Any = None) -> Selection:
    """Resolve ``patterns`` and ``until`` (their union) in ``model``; neither given means the whole model.

    Raises:
        PatternError: a pattern or ``until`` that selects nothing, with names near to it.
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if inputs is not None and until is None:
        raise ValueError("inputs: only read to find the forward order for until=; pass until= too, or drop it")
    index = _Index(model)
    patterns = list(patterns)
    params: set[int] = set()
    norms: set[int] = set()
    if not patterns and until is None:
        params, norms = index.under("")
        if not params and not norms:
            raise PatternError(f"model: {type(model).__name__} has no parameter that can be trained and no statistics")
    for pattern in patterns:
        more_params, more_norms = index.one(pattern)
        if not more_params and not more_norms:
            raise PatternError(index.complaint(pattern))
        params |= more_params
        norms |= more_norms
    if until is not None:
        if not isinstance(until, str):
            raise TypeError(f"until: expected the name of a module or parameter, got {until!r}")
        if not until or (until not in index.modules and until not in index.params):
            raise PatternError(f"until: {index.unknown(until)}")
        more_params, more_norms = before(model, until, inputs)
        more_params &= index.names.keys()
        if not more_params and not more_norms:
            raise PatternError(f"until: nothing with parameters comes before {until!r}")
        params |= more_params
        norms |= more_norms
    return _named(index, params, norms)


def _named(index: _Index, params: set[int], norms: set[int]) -> Selection:
    selection = Selection()
    for name, param in index.params.items():
        if id(param) in params and index.names[id(param)][0] == name:
            selection.params[name] = param
    for name, module in index.model.named_modules():
        if not has_statistics(module):
            continue
        own = {id(p) for p in module.parameters(recurse=False)}
        if id(module) in norms or (own and own <= params):
            selection.norms[name] = module
    selection.shared = tuple(tuple(names) for i, names in index.names.items() if i in params and len(names) > 1)
    return selection
