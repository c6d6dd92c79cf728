"""From what a caller writes (names, globs, types, predicates, ``until``) to the modules and parameters it means.

One language for all that takes patterns: `freeze` and `unfreeze` (`select`), ``convert(only=)`` and the ``layers=`` of
schedules (`named_modules`).
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from freezekit._arguments import check_module, shown
from freezekit.distributed import wrapper_prefix
from freezekit.freezing.computed import computed, statistics_inside
from freezekit.freezing.norm import has_statistics
from freezekit.freezing.order import before

Predicate = Callable[[str, nn.Parameter], bool]
Pattern = str | type[nn.Module] | nn.Module | nn.Parameter | Predicate
Patterns = Pattern | Iterable[Pattern]

# Each is iterable, and one pattern, or none.
_NO_LISTS = (str, bytes, type, Mapping, Tensor, nn.Module)
_MODULES = "names of modules, globs over them, subclasses of nn.Module or modules of the model"
_PARAMETERS = f"{_MODULES}, names of parameters, parameters, or predicates(name, parameter)"


class PatternError(ValueError):
    """A pattern that selects nothing, or cannot be read as one."""


@dataclass
class Selection:
    """What patterns mean in one model.

    params: name -> parameter; one name per parameter (its first), found by identity, never by value.
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

    @cached_property
    def every(self) -> frozenset[str]:
        """All names of modules, parameters and computed tensors."""
        return frozenset((*self.modules, *self.params, *(name for name, *_ in self.computed)))

    def whole(self, pattern: Any) -> Any:
        """``pattern``, with the prefix of DDP, DataParallel or torch.compile where it meets names inside alone."""
        prefix = wrapper_prefix(self.model)
        inside = f"{prefix}{pattern}"
        if not (prefix and isinstance(pattern, str)) or self.meets(pattern) or not self.meets(inside):
            return pattern
        return inside

    def meets(self, pattern: str) -> bool:
        """Whether some name is ``pattern``, or matches it."""
        return any(name and self._is_meant(name, pattern) for name in self.every)

    def under(self, module_name: str) -> tuple[set[int], set[int]]:
        """Ids of the parameters and of the norm layers in the module of that name, itself included."""
        module = self.modules[module_name]
        params = {id(p) for p in module.parameters() if id(p) in self.names}
        return params, {id(m) for m in module.modules() if has_statistics(m)}

    def one(self, pattern: Any) -> tuple[set[int], set[int]]:
        """Ids of the parameters and of the norm layers that one pattern means."""
        params: set[int] = set()
        norms: set[int] = set()
        if isinstance(pattern, nn.Parameter):
            return {id(pattern)} & self.names.keys(), norms
        if isinstance(pattern, nn.ParameterList | nn.ParameterDict):
            return {id(p) for p in pattern.parameters()} & self.names.keys(), norms
        if isinstance(pattern, str):
            params = {id(p) for name, p in self.params.items() if self._is_meant(name, pattern)}
            if pattern in self.params:
                return params, norms
            more_params, norms = self.making(pattern)
            params |= more_params
        elif not isinstance(pattern, nn.Module | type) and callable(pattern):
            return {id(p) for name, p in self.params.items() if pattern(name, p)}, norms
        for name in meeting(self.modules, pattern, "patterns", _PARAMETERS):
            more_params, more_norms = self.under(name)
            params |= more_params
            norms |= more_norms
        return params, norms

    def has(self, pattern: Any) -> bool:
        """Whether that is one of the model's modules itself."""
        return isinstance(pattern, nn.Module) and any(pattern is module for module in self.modules.values())

    def _is_meant(self, name: str, pattern: str) -> bool:
        return name == pattern if pattern in self.every else fnmatch.fnmatchcase(name, pattern)

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
            return f"patterns: this {type(pattern).__name__} is not part of the model, or has nothing to freeze"
        name = getattr(pattern, "__name__", repr(pattern))
        return f"patterns: the predicate {name} selects none of the {len(self.names)} parameters"

    @cached_property
    def computed(self) -> list[tuple[str, nn.Module, str, list[str]]]:
        """Each tensor that a module computes: its name in the model, the module, its name there, what it is made of."""
        return [
            (prefix + name, module, name, [prefix + part for part in made_of])
            for prefix, module in ((f"{path}." if path else "", module) for path, module in self.modules.items())
            for name, made_of in computed(module).items()
        ]

    def making(self, pattern: str) -> tuple[set[int], set[int]]:
        """Ids of the parameters, and of the layers with statistics, that move a computed tensor which is meant."""
        params: set[int] = set()
        norms: set[int] = set()
        for name, module, own, made_of in self.computed:
            if self._is_meant(name, pattern):
                params |= {id(self.params[part]) for part in made_of if part in self.params}
                norms |= {id(part) for part in statistics_inside(module, own)}
        return params, norms

    def stilled(self, params: set[int]) -> set[int]:
        """Ids of the layers whose statistics move a computed tensor that is made of nothing but ``params``."""
        found: set[int] = set()
        for _, module, own, made_of in self.computed:
            if {id(self.params[part]) if part in self.params else 0 for part in made_of} <= params:
                found |= {id(part) for part in statistics_inside(module, own)}
        return found

    def unknown(self, pattern: str) -> str:
        for name, _, _, made_of in self.computed:
            if name == pattern or fnmatch.fnmatchcase(name, pattern):
                return f"{name!r} is no parameter, but computed from {' and '.join(map(repr, made_of))}: name these"
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


def meeting(modules: dict[str, nn.Module], pattern: Any, argument: str, expected: str = _MODULES) -> list[str]:
    """Names of those of a model's ``modules`` that one pattern means, without what they contain.

    Raises:
        TypeError: the pattern is not a name, glob, subclass of nn.Module or module; says that ``argument`` takes
            ``expected``.
    """
    if isinstance(pattern, str):
        if pattern in modules:
            return [pattern] if pattern else []
        return [name for name in modules if name and fnmatch.fnmatchcase(name, pattern)]
    if isinstance(pattern, nn.Module):
        found = [name for name, module in modules.items() if module is pattern]
        # A slice of a Sequential is a new one, with the same layers.
        parts = set(pattern.children()) if type(pattern) in (nn.Sequential, nn.ModuleList, nn.ModuleDict) else set()
        if not found and parts <= set(modules.values()):
            found = [name for name, module in modules.items() if module in parts]
        return found
    if isinstance(pattern, type) and issubclass(pattern, nn.Module):
        return [name for name, module in modules.items() if isinstance(module, pattern)]
    more = ", which is not a parameter" if isinstance(pattern, Tensor) else ""
    raise TypeError(f"{argument} must be {expected};\ngot {shown(pattern)}{more}")


def named_modules(model: nn.Module, patterns: Iterable[Any], argument: str) -> dict[str, nn.Module]:
    """Name -> each module that one of ``patterns`` means, in the order of the patterns, without what it contains.

    Args:
        argument: the name under which the caller took the patterns, for errors.

    Raises:
        PatternError: a pattern that no module matches, with similar names.
        TypeError: something that is not a name, glob, subclass of nn.Module or module.

    >>> list(named_modules(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), ["1", nn.Conv2d], "only"))
    ['1', '0']
    """
    index = _Index(model)
    found: dict[str, nn.Module] = {}
    for pattern in map(index.whole, flat(patterns, argument)):
        names = meeting(index.modules, pattern, argument)
        if not names:
            said = index.unknown(pattern) if isinstance(pattern, str) else f"no module matches {shown(pattern)}"
            raise PatternError(f"{argument}: {said}")
        found.update((name, index.modules[name]) for name in names)
    return found


def flat(patterns: Iterable[Any], argument: str = "patterns") -> Iterator[Any]:
    """The patterns in ``patterns``, and in lists, sets, iterators and the like among them, as ``layer.parameters()``.

    Raises:
        PatternError: a list that holds nothing: it selects nothing, and must not pass for "everything".
    """
    for pattern in patterns:
        if isinstance(pattern, Iterable) and not isinstance(pattern, _NO_LISTS):
            inside = list(flat(pattern, argument))
            if not inside:
                raise PatternError(f"{argument}: an empty {type(pattern).__name__} selects nothing")
            yield from inside
        else:
            yield pattern


def select(model: nn.Module, patterns: Iterable[Any], until: str | None = None, inputs: Any = None) -> Selection:
    """Resolve ``patterns`` and ``until`` (their union) in ``model``; neither given means the whole model.

    Raises:
        PatternError: a pattern or ``until`` that selects nothing, with names near to it.
        TypeError: ``model`` is not a module.
    """
    check_module(model)
    if inputs is not None and until is None:
        raise ValueError("inputs: only read to find the forward order for until=; pass until= too, or drop it")
    index = _Index(model)
    patterns = list(map(index.whole, flat(patterns)))
    params: set[int] = set()
    norms: set[int] = set()
    if not patterns and until is None:
        params, norms = index.under("")
        if not params and not norms:
            raise PatternError(f"model: {type(model).__name__} has no parameter that can be trained and no statistics")
    for pattern in patterns:
        more_params, more_norms = index.one(pattern)
        # Among a model's children some are activations.
        if not more_params and not more_norms and not (len(patterns) > 1 and index.has(pattern)):
            raise PatternError(index.complaint(pattern))
        params |= more_params
        norms |= more_norms
    if patterns and not params and not norms:
        raise PatternError(index.complaint(patterns[0]))
    if until is not None:
        if not isinstance(until, str):
            raise TypeError(f"until must be the name of a module or parameter, got {shown(until)}")
        until = index.whole(until)
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
    norms |= index.stilled(params)
    for name, module in index.model.named_modules():
        if not has_statistics(module):
            continue
        own = {id(p) for p in module.parameters(recurse=False)}
        if id(module) in norms or (own and own <= params):
            selection.norms[name] = module
    selection.shared = tuple(tuple(names) for i, names in index.names.items() if i in params and len(names) > 1)
    return selection
