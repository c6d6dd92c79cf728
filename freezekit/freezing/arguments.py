"""What `freeze` and `unfreeze` take for an optimizer, and what they refuse before they change anything.

An optimizer may be inside another: Lookahead, ZeroRedundancyOptimizer, the wrappers of accelerate, fastai, Lightning.
"""

from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from freezekit._arguments import check_choice, check_flag, shown
from freezekit._inputs import in_slots
from freezekit.freezing.optim import strangers

Optimizers = Optimizer | Iterable[Optimizer] | Mapping[str, Optimizer]

# What has optimizers among its globals, cells or attributes wraps none.
_CODE = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType)


def several(given: Any) -> list[Any]:
    """What the argument ``optimizer`` holds: none, one, or the elements of a list, a mapping and the like.

    None among the elements is kept, to be refused: a trainer that lost its second optimizer is to hear of it.
    """
    return [] if given is None else list(_elements(given))


def _elements(given: Any) -> Iterator[Any]:
    if isinstance(given, Mapping):
        given = given.values()
    plain = isinstance(given, (str, bytes, Tensor, nn.Module, *_CODE)) or hasattr(given, "step")
    if plain or not isinstance(given, Iterable):
        yield given
        return
    for each in given:
        yield from _elements(each)


def inside(optimizer: Any) -> list[Optimizer]:
    """The optimizers that ``optimizer``, itself one or not, has as attributes, or in lists and dictionaries; each once.

    Where what is no optimizer has none, those of the wrappers that it has, and so on. A wrapper is what has a ``step``.

    >>> import torch
    >>> class Wrapper:
    ...     def __init__(self, optimizer):
    ...         self.optimizer = optimizer
    ...     def step(self):
    ...         self.optimizer.step()
    >>> sgd = torch.optim.SGD([torch.zeros(1)])
    >>> [type(one).__name__ for one in (*inside(Wrapper(sgd)), *inside(Wrapper(Wrapper(sgd))))]
    ['SGD', 'SGD']
    """
    level, met = [optimizer], {id(optimizer)}
    while level:
        held = {id(value): value for one in level for value in _held(one)}
        found = [value for value in held.values() if isinstance(value, Optimizer) and value is not optimizer]
        if found or isinstance(optimizer, Optimizer):
            return found
        level = [value for key, value in held.items() if key not in met and _is_wrapper(value)]
        met |= held.keys()
    return []


def _is_wrapper(value: Any) -> bool:
    return callable(getattr(type(value), "step", None)) and not isinstance(value, (nn.Module, *_CODE))


def _held(value: Any) -> list[Any]:
    """The attributes of ``value``, and what is in lists and dictionaries among them."""
    if isinstance(value, _CODE):
        return []
    held = [*getattr(value, "__dict__", {}).values(), *in_slots(value).values()]
    for each in held[:]:
        held += dict.values(each) if isinstance(each, dict) else each if isinstance(each, list | tuple) else ()
    return held


def layers(optimizer: Any) -> Iterator[Any]:
    """``optimizer``, the one inside it, the one inside that, and so on, as long as there is exactly one."""
    met: list[Any] = []
    while not any(optimizer is one for one in met):
        met.append(optimizer)
        yield optimizer
        within = inside(optimizer)
        if len(within) != 1:
            return
        optimizer = within[0]


def optimizers_of(given: Any, *, to_change: bool, whole: Any = None) -> list[Optimizer]:
    """What steps the parameters that ``given`` is to step: itself, or what it wraps.

    Of optimizers inside each other it is the innermost that has all parameters; if its groups are to be changed, the
    innermost whose groups are those of ``given``, as those of a shard of ZeroRedundancyOptimizer are not. Of what is no
    optimizer and holds several, it is all of them.

    Args:
        whole: the argument, where ``given`` is an element of it, for the error.

    Raises:
        TypeError: there is none in ``given``.
    """
    every = list(layers(given))
    found = [one for one in every if isinstance(one, Optimizer)]
    if found:
        lists = [[group["params"] for group in one.param_groups] for one in found]
        held = [list(map(id, each)) if to_change else {id(p) for params in each for p in params} for each in lists]
        return [[one for one, ids in zip(found, held) if ids == held[0]][-1]]
    within = [one for held in inside(every[-1]) for one in optimizers_of(held, to_change=to_change)]
    if not within:
        raise TypeError(
            _refused(
                given,
                "pass the one that it wraps, or none where it wraps none (what is frozen has no .grad, and optimizers "
                "pass over what has none)",
                whole,
            )
        )
    return within


def innermost(optimizer: Any, whole: Any = None) -> Optimizer:
    """The optimizer whose step reads gradients and moves parameters.

    Args:
        whole: as for `optimizers_of`.

    Raises:
        TypeError: there is none in ``optimizer``.
        ValueError: there are several.
    """
    *_, last = layers(optimizer)
    held = inside(last)
    if len(held) > 1:
        kinds = ", ".join(type(one).__name__ for one in held)
        raise ValueError(
            f"optimizer: {type(last).__name__} has several inside it ({kinds}); pass the one that is meant"
        )
    if not isinstance(last, Optimizer) or "_optimizer_step_pre_hooks" not in vars(last):
        # What is no optimizer, or a wrapper around one that cannot be seen, which never called Optimizer.__init__.
        raise TypeError(
            _refused(
                last,
                "pass the optimizer that it wraps; where it wraps none, it has no hooks to watch its steps by",
                whole,
            )
        )
    return last


def _refused(given: Any, cure: str, whole: Any) -> str:
    """What an error says of a value in which there is no optimizer; ``cure`` is how to go on with what has a step."""
    if isinstance(given, type):
        cure = ";\npass an instance of it"
    elif isinstance(given, _CODE):
        cure = ";\npass the optimizer itself"
    elif isinstance(given, Tensor):
        cure = ";\npass the optimizer that steps it"
    elif isinstance(given, Optimizer) or hasattr(given, "step"):
        cure = f",\nand found none inside it: {cure}"
    else:
        cure = ""
    where = f" in a {type(whole).__name__}" if whole is not None and whole is not given else ""
    return f"optimizer must be a torch.optim.Optimizer or several, got {_kind_of(given)}{where}{cure}"


def _kind_of(value: Any) -> str:
    """What an error shows: a plain value, or a class with its module, since others name theirs Optimizer as well."""
    kind = type(value)
    if value is None:
        return "None"
    if isinstance(value, _CODE):
        return f"the {'class' if isinstance(value, type) else kind.__name__} {value.__name__}"
    plain = kind.__module__ == "builtins"
    return f"{kind.__name__} {shown(value)}" if plain else f"{kind.__module__}.{kind.__qualname__}"


def check_optimizers(optimizer: object, remove: bool, state: str, group: int | None = None) -> tuple[Optimizer, ...]:
    """One optimizer, several or none as a tuple; refuses arguments that contradict each other."""
    check_choice("state", state, "keep", "reset")
    check_flag("remove", remove)
    inner = [inner for one in several(optimizer) for inner in optimizers_of(one, to_change=True, whole=optimizer)]
    given = tuple({id(one): one for one in inner}.values())
    if not given:
        for name, used in (("remove=True", remove), ('state="reset"', state == "reset"), ("group", group is not None)):
            if used:
                raise ValueError(f"{name} changes an optimizer, but there is none; pass optimizer=")
    if group is not None:
        if len(given) > 1:
            raise ValueError(f"group: an index into one of {len(given)} optimizers is ambiguous; pass the one it is of")
        groups = len(given[0].param_groups)
        if not isinstance(group, int) or isinstance(group, bool) or not 0 <= group < groups:
            raise ValueError(f"group must be an index from 0 to {groups - 1}, got {shown(group)}")
    return given


def check_flags(params: Mapping[str, nn.Parameter], frozen: bool) -> None:
    """Refuse what ``requires_grad`` cannot be set of, before anything is changed."""
    for name, param in params.items():
        if not param.is_leaf:
            raise ValueError(
                f"model: {name!r} cannot be {'frozen' if frozen else 'unfrozen'}, since a computation put it in the "
                "place of a parameter; name what it is computed from"
            )
        if not frozen and not is_lazy(param) and param.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"model: {name!r} cannot train, since it was made under torch.inference_mode(); build the model outside"
            )


def check_lbfgs(optimizer: Optimizer, params: list[nn.Parameter], verb: str, ready: bool) -> None:
    """LBFGS keeps one history over all its parameters, as one flat vector, and adds to every one at each step: half of
    that history cannot be kept, and a parameter that stays in the group is written to."""
    if ready or not isinstance(optimizer, LBFGS) or len(strangers(optimizer, params)) == len(params):
        return
    extra = "remove=True, " if verb == "freeze" else ""
    raise ValueError(
        "optimizer: LBFGS keeps one history over all its parameters and writes to every one of them at each step; "
        f'to {verb} some of them pass {extra}state="reset", which clears its history'
    )


def check_norm(norm: object) -> None:
    check_choice("norm", norm, "freeze", "batch")
