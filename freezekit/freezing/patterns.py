"""From what a caller writes (names, globs, types, predicates, ``until``) to the modules and parameters it means.

One language for all that takes patterns: `freeze` and `unfreeze` (`select`), ``convert(only=)`` and the ``layers=`` of
schedules (`named_modules`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from freezekit._arguments import check_module, shown
from freezekit._inputs import Arguments, arguments
from freezekit._twin import Twin, on_twin
from freezekit.freezing.index import Index, meeting

Predicate = Callable[[str, nn.Parameter], bool]
Pattern = str | type[nn.Module] | nn.Module | nn.Parameter | Predicate
Named = tuple[str, nn.Parameter] | tuple[str, nn.Module]
Patterns = Pattern | Iterable[Pattern] | Iterable[Named]

# Each is iterable, and one pattern, or none.
_NO_LISTS = (str, bytes, type, Mapping, Tensor, nn.Module)


class PatternError(ValueError):
    """A pattern that selects nothing, or cannot be read as one."""


@dataclass
class Selection:
    """What patterns mean in one model.

    params: name -> parameter; one name per parameter (its first), found by identity, never by value.
    norms: name -> layer with running statistics, when the pattern covers the layer or all parameters it owns.
    shared: the names of each selected parameter that has more than one.
    names: id of each parameter of the model that can be frozen -> all its names, in registration order.
    modules: each module of the model once, in that order.
    """

    params: dict[str, nn.Parameter] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()
    names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    modules: list[nn.Module] = field(default_factory=list)


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
    index = Index(model)
    found: dict[str, nn.Module] = {}
    for pattern in map(index.whole, flat(index, patterns, argument)):
        names = meeting(index.modules, pattern, argument)
        if not names:
            said = index.unknown(pattern) if isinstance(pattern, str) else f"no module matches {shown(pattern)}"
            raise PatternError(f"{argument}: {said}")
        found.update((name, index.modules[name]) for name in names)
    return found


def flat(index: Index, patterns: Iterable[Any], argument: str = "patterns") -> Iterator[Any]:
    """The patterns in ``patterns``, and in lists, sets, iterators and the like among them, as ``layer.parameters()``.

    A pair as ``layer.named_parameters()`` gives it means its parameter or module, whose name in the model is another.

    Raises:
        PatternError: a list that holds nothing: it selects nothing, and must not pass for "everything"; or a pair whose
            name is something else in the model.
    """
    for pattern in patterns:
        if isinstance(pattern, Iterable) and not isinstance(pattern, _NO_LISTS):
            part = _part_of_pair(index, pattern, argument)
            inside = list(flat(index, pattern, argument)) if part is None else [part]
            if not inside:
                raise PatternError(f"{argument}: an empty {type(pattern).__name__} selects nothing")
            yield from inside
        else:
            yield pattern


def _part_of_pair(index: Index, given: Any, argument: str) -> nn.Parameter | nn.Module | None:
    """The second of a pair, where the first is its name within a part of the model, or within all of it; None for what
    is a list of two patterns, or anything else."""
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str)):
        return None
    name, value = given
    if not isinstance(value, nn.Parameter | nn.Module):
        return None
    own = index.names_of(value)
    starts = name == "" and index.has(value)  # as named_modules() does
    if not starts and not any(f".{one}".endswith(f".{name}") for one in own):
        return None
    if others := sorted(index.met_by(index.whole(name)) - own):
        alone = "the part's .parameters()" if isinstance(value, nn.Parameter) else "the part, or its .children()"
        raise PatternError(
            f"{argument}: a pair of {name!r} and {sorted(own)[0]!r} may mean that one, or {others[0]!r} too;\n"
            f"pass {alone}, without names"
        )
    return value


def select(model: nn.Module, patterns: Iterable[Any], until: str | None = None, inputs: Any = None) -> Selection:
    """Resolve ``patterns`` and ``until`` (their union) in ``model``; neither given means the whole model.

    Raises:
        PatternError: a pattern or ``until`` that selects nothing, with names near to it.
        TypeError: ``model`` is not a module.
    """
    check_module(model)
    if inputs is not None and until is None:
        raise ValueError("inputs: only read to find the forward order for until=; pass until= too, or drop it")
    index = Index(model)
    patterns = list(map(index.whole, flat(index, patterns)))
    found: set[int] = set()
    if not patterns and until is None:
        found = index.under("")
        if not found:
            raise PatternError(f"model: {type(model).__name__} has no parameter that can be trained and no statistics")
    for pattern in patterns:
        meant = index.one(pattern)
        # Among a model's children some are activations.
        if not meant and not (len(patterns) > 1 and index.has(pattern)):
            raise PatternError(index.complaint(pattern))
        found |= meant
    if patterns and not found:
        raise PatternError(index.complaint(patterns[0]))
    if until is not None:
        if not isinstance(until, str):
            raise TypeError(f"until must be the name of a module or parameter, got {shown(until)}")
        until = index.whole(until)
        if not until or (until not in index.modules and until not in index.params):
            raise PatternError(f"until: {index.unknown(until)}")
        before = _registered_before(index, until) if inputs is None else _called_before(index, until, inputs)
        if not before:
            raise PatternError(f"until: nothing with parameters comes before {until!r}")
        found |= before
    return _named(index, found)


def select_present(model: nn.Module, patterns: Iterable[Any]) -> Selection:
    """What `select` selects, of patterns that it took before: those that match nothing any more are passed over."""
    index = Index(model)
    patterns = list(patterns)
    found = set().union(*(index.one(index.whole(pattern)) for pattern in patterns))
    return _named(index, found if patterns else index.under(""))


def _named(index: Index, found: set[int]) -> Selection:
    selection = Selection(names={i: tuple(names) for i, names in index.names.items()})
    for name, param in index.params.items():
        if id(param) in found and index.names[id(param)][0] == name:
            selection.params[name] = param
    found |= index.stilled(found)
    first = {id(module): name for name, module in reversed(index.modules.items())}
    for name, module in index.modules.items():
        if first[id(module)] != name:
            continue
        selection.modules.append(module)
        own = {id(p) for p in module.parameters(recurse=False)}
        if id(module) in index.norms and (id(module) in found or (own and own <= found)):
            selection.norms[name] = module
    selection.shared = tuple(names for i, names in selection.names.items() if i in found and len(names) > 1)
    return selection


def _registered_before(index: Index, until: str) -> set[int]:
    """What can be frozen before ``until``, which itself stays out (as a range's stop does).

    The order of ``model.named_modules()``, in which ``__init__`` assigned the layers, is what a reader of the model's
    repr sees, needs no data, and is the forward order of most models.
    """
    found: list[nn.Parameter | nn.Module] = []
    for module_name, module in index.modules.items():
        if module_name == until:
            # One that is shared with an earlier layer is not before ``until``.
            return index.known(found) - {id(p) for p in module.parameters()}
        for name, param in module._parameters.items():
            if f"{module_name}.{name}".lstrip(".") == until:
                return index.known(found) - {id(param)}
            found += [] if param is None else [param]
        found.append(module)
    raise AssertionError(f"{until} is a name of the model and was not met")


def _called_before(index: Index, until: str, inputs: Any) -> set[int]:
    """The same in the true order of calls, of one forward with ``inputs``."""
    first_call = _trace(index.model, arguments(inputs))
    names = index.modules
    owner_name = until if until in names else until.rpartition(".")[0]
    stop = _position(names, owner_name, first_call)
    if stop is None:
        raise ValueError(f"until: {until!r} was not called in the forward with these inputs; name a layer that is")
    stays = {id(p) for p in names[owner_name].parameters()}
    found: set[int] = set()
    for name, module in names.items():
        position = _position(names, name, first_call, descend=False)
        if position is not None and position < stop:
            found |= index.known([module, *(p for p in module._parameters.values() if p is not None)])
    return found - stays


def _position(names: dict[str, nn.Module], name: str, first_call: dict[int, int], descend: bool = True) -> int | None:
    """When the module ``name`` was first called: itself, else (a list, say) its first called descendant, else the
    nearest ancestor that was called and called no layer inside it (it used the parameters directly, as
    MultiheadAttention does with ``out_proj``). None when the forward did not use it: unused is not "before".
    """
    module = names[name]
    if id(module) in first_call:
        return first_call[id(module)]
    if descend:
        inner = _calls_inside(module, first_call)
        if inner:
            return min(inner)
    while name:
        name = name.rpartition(".")[0]
        if id(names[name]) in first_call:
            inside = _calls_inside(names[name], first_call)
            return None if len(inside) > 1 else inside[0]
    return None


def _calls_inside(module: nn.Module, first_call: dict[int, int]) -> list[int]:
    return [first_call[id(m)] for m in module.modules() if id(m) in first_call]


def _trace(model: nn.Module, inputs: Arguments) -> dict[int, int]:
    """Run one forward of a copy, in eval mode and without gradients, and number the modules by their first call."""

    def run(twin: Twin) -> dict[str, int]:
        first_call: dict[str, int] = {}
        names = {id(module): name for name, module in twin.named_modules()}

        def note(module: nn.Module, args: Any) -> None:
            first_call.setdefault(names[id(module)], len(first_call))

        for _, module in twin.named_modules():
            module.register_forward_pre_hook(note)
            module.training = False  # not by train(), which a module may hold or override
        with twin.undisturbed(), torch.no_grad():
            twin.run()
        return first_call

    return {id(model.get_submodule(name)): position for name, position in on_twin(model, inputs, run).items()}
