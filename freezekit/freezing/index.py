"""The names of a model, and which of its modules and parameters one pattern means.

A weight that a module computes anew at each forward, by a parametrization, weight norm, spectral norm or pruning, is no
parameter. What trains is what it is made of (``weight_g`` and ``weight_v``, ``weight_orig``,
``parametrizations.weight.original``), and a frozen weight is one of which all that holds still.
"""

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm

from freezekit._arguments import shown
from freezekit.distributed.watching import wrapper_prefix
from freezekit.freezing.norm import has_statistics

_MODULES = "names of modules, globs over them, subclasses of nn.Module or modules of the model"
_PARAMETERS = f"{_MODULES}, names of parameters, parameters, or predicates(name, parameter)"


class Index:
    """The names of one model, read once. A module or parameter that has several names appears under each.

    What patterns mean is told by the ids of parameters that can be frozen, and of layers with running statistics.
    """

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
    def norms(self) -> set[int]:
        """Ids of the layers with running statistics."""
        return {id(module) for module in self.modules.values() if has_statistics(module)}

    def known(self, parts: Iterable[nn.Parameter | nn.Module]) -> set[int]:
        """Ids of those that can be frozen."""
        return {id(part) for part in parts if id(part) in self.names or id(part) in self.norms}

    @cached_property
    def every(self) -> frozenset[str]:
        """All names of modules, parameters and computed tensors."""
        return frozenset((*self.modules, *self.params, *(name for name, *_ in self.computed)))

    def whole(self, pattern: Any) -> Any:
        """``pattern``, with the prefix of DDP, DataParallel or torch.compile where it meets names inside alone."""
        prefix = wrapper_prefix(self.model)
        if not (prefix and isinstance(pattern, str)) or self.meets(pattern):  # of a tensor, text is all its elements
            return pattern
        inside = f"{prefix}{pattern}"
        return inside if self.meets(inside) else pattern

    def meets(self, pattern: str) -> bool:
        """Whether some name is ``pattern``, or matches it."""
        return bool(self.met_by(pattern))

    def met_by(self, pattern: str) -> set[str]:
        """The names of modules, parameters and computed tensors that ``pattern`` is, or matches."""
        if pattern in self.every or not any(character in pattern for character in "*?["):
            return {pattern} & self.every - {""}
        return {name for name in self.every if name and self._is_meant(name, pattern)}

    def names_of(self, part: nn.Parameter | nn.Module) -> set[str]:
        """All names of a parameter or a module of the model."""
        if isinstance(part, nn.Parameter):
            return set(self.names.get(id(part), ()))
        return {name for name, module in self.modules.items() if name and module is part}

    def under(self, module_name: str) -> set[int]:
        """What can be frozen of the module of that name."""
        module = self.modules[module_name]
        return self.known([*module.parameters(), *module.modules()])

    def one(self, pattern: Any) -> set[int]:
        """What one pattern means."""
        if isinstance(pattern, nn.Parameter | nn.ParameterList | nn.ParameterDict):
            return self.known([pattern] if isinstance(pattern, nn.Parameter) else pattern.parameters())
        found: set[int] = set()
        if isinstance(pattern, str):
            found = {id(p) for name, p in self.params.items() if self._is_meant(name, pattern)}
            if pattern in self.params:
                return found
            found |= self.making(pattern)
        elif not isinstance(pattern, nn.Module | type) and callable(pattern):
            _check_predicate(pattern)
            return {id(p) for name, p in self.params.items() if _says(pattern, name, p)}
        return found.union(*map(self.under, meeting(self.modules, pattern, "patterns", _PARAMETERS)))

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
            what = shown(pattern) if isinstance(pattern, nn.Parameter) else f"this {type(pattern).__name__}"
            return f"patterns: {what} is not part of the model, or has nothing to freeze"
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

    def making(self, pattern: str) -> set[int]:
        """What moves a computed tensor that is meant."""
        found: set[int] = set()
        for name, module, own, made_of in self.computed:
            if self._is_meant(name, pattern):
                found |= {id(self.params[part]) for part in made_of if part in self.params}
                found |= {id(part) for part in statistics_inside(module, own)}
        return found

    def stilled(self, params: set[int]) -> set[int]:
        """The layers whose statistics move a computed tensor that is made of nothing but ``params``."""
        found: set[int] = set()
        if not any(module._forward_pre_hooks or is_parametrized(module) for module in self.modules.values()):
            return found
        for _, module, own, made_of in self.computed:
            if {id(self.params[part]) if part in self.params else 0 for part in made_of} <= params:
                found |= {id(part) for part in statistics_inside(module, own)}
        return found

    def unknown(self, pattern: str) -> str:
        for name, _, _, made_of in self.computed:
            if name == pattern or fnmatch.fnmatchcase(name, pattern):
                return f"{name!r} is no parameter, but computed from {' and '.join(map(repr, made_of))}: name these"
        for path, module in self.modules.items():
            for own in module._buffers:
                name = f"{path}.{own}" if path else own
                if fnmatch.fnmatchcase(name, pattern) or name == pattern:
                    norm = id(module) in self.norms and path
                    cure = f"name {path!r}, which holds its statistics too" if norm else "no optimizer moves it"
                    return f"{name!r} is a buffer of {type(module).__name__}, neither module nor parameter; {cure}"
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


def _check_predicate(pattern: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(pattern)
    except ValueError:  # a builtin that does not tell
        return
    try:
        signature.bind("name", "parameter")
    except TypeError:
        raise TypeError(f"patterns: a predicate is called as f(name, parameter), got {shown(pattern)}") from None


def _says(predicate: Callable[..., Any], name: str, param: nn.Parameter) -> bool:
    answer = predicate(name, param)
    # Comparisons give numpy's bools and tensors of one too, and re.match a match or None. A string is a slip.
    is_one = str(getattr(answer, "dtype", "")) in ("bool", "torch.bool") and answer.nbytes == 1
    if not (is_one or answer is None or isinstance(answer, bool | re.Match)):
        called = getattr(predicate, "__name__", shown(predicate))
        raise TypeError(f"patterns: predicate {called} must return True or False;\ngot {shown(answer)} for {name!r}")
    return bool(answer)


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


def computed(module: nn.Module) -> dict[str, list[str]]:
    """Name of each tensor that ``module`` itself computes -> what it is made of, by names relative to ``module``.

    What is made of something that is computed too is followed to the end. A name in the list is a parameter's, or that
    of a parametrization without any.

    >>> computed(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    {'weight': ['parametrizations.weight.original0', 'parametrizations.weight.original1']}
    """
    lists = _parametrized(module)
    if not (lists or module._parameters):
        return {}
    names = [*lists, *_set_by_hooks(module)]
    first = {name: _inside(module, name) if name in lists else _named_after(module, name, names) for name in names}
    return {name: list(_followed(name, first)) for name in names if first[name]}


def _parametrized(module: nn.Module) -> list[str]:
    if not is_parametrized(module):
        return []
    return [name for name, _ in module.get_submodule("parametrizations").named_children()]


def _set_by_hooks(module: nn.Module) -> Iterator[str]:
    """Names of plain tensors of ``module`` that its pre-hooks compute, or that came out of a computation.

    Another plain tensor beside parameters that are named after it, as integer weights beside a scale, is not computed.
    """
    hooks = module._forward_pre_hooks.values()
    named = {getattr(hook, "_tensor_name", getattr(hook, "name", None)) for hook in hooks}
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and (name in named or not value.is_leaf):
            yield name


def _inside(module: nn.Module, name: str) -> list[str]:
    """The parameters in the parametrizations of ``name``."""
    inside = f"parametrizations.{name}"
    params = module.get_submodule(inside).named_parameters(remove_duplicate=False)
    return [f"{inside}.{known}" for known, _ in params] or [inside]


def _named_after(module: nn.Module, name: str, computed: list[str]) -> list[str]:
    """The parameters that a hook makes ``name`` of: torch's by their endings, others' by their beginning."""
    own = [known for known in (*module._parameters, *computed) if known.startswith(f"{name}_")]
    for endings in (("_orig",), ("_g", "_v")):
        if all(name + ending in own for ending in endings):
            return [name + ending for ending in endings]
    return own


def _followed(name: str, first: dict[str, list[str]]) -> Iterator[str]:
    for part in first[name]:
        yield from _followed(part, first) if part in first else (part,)


def statistics_inside(module: nn.Module, name: str) -> list[nn.Module]:
    """The modules whose running statistics move the tensor ``name`` that ``module`` computes, as spectral norm's do."""
    hooks = module._forward_pre_hooks.values()
    if any(isinstance(hook, SpectralNorm) and hook.name == name for hook in hooks):
        return [module]
    if name not in _parametrized(module):
        return []
    return [part for part in module.get_submodule(f"parametrizations.{name}").modules() if has_statistics(part)]
