"""Freezing that survives a restart: what is frozen, by name, as plain data that goes into a checkpoint.

A saved state is checked alone and against a model and its optimizers, before anything is changed.
"""

import difflib
from functools import partial
from typing import Any, TypeVar

from torch import nn
from torch.optim import LBFGS, Optimizer

from freezekit._arguments import check_flag, check_module, shown
from freezekit.distributed.watching import note_freeze, unwrapped
from freezekit.freezing import norm as statistics
from freezekit.freezing import optim
from freezekit.freezing.api import all_names, keep_param, names_of, set_note, set_statistics
from freezekit.freezing.arguments import Optimizers, check_flags, check_optimizers
from freezekit.freezing.baked import check_can_hold
from freezekit.freezing.flags import announce
from freezekit.freezing.result import Frozen


def freeze_state(model: nn.Module, optimizer: Optimizers | None = None) -> dict[str, Any]:
    """What is frozen in ``model``, by name: plain data for ``torch.save`` and ``torch.load(weights_only=True)``.

    Args:
        optimizer: pass it (or several) where ``freeze(remove=True)`` was used: which parameters were taken out of it,
            their places, and the state that is kept for them are part of no ``optimizer.state_dict()``.

    Returns:
        ``version``; ``frozen`` and ``trainable`` (names of parameters, each once); ``statistics`` (name of each
        layer that has some -> whether they are frozen); ``batch`` and ``learns`` (names of such layers whose statistics
        ``freeze(norm="batch")`` left to move, and of those whose parameters alone ``unfreeze`` lets train); ``removed``
        (None without an optimizer, else a list with, per optimizer, name -> ``group``, ``position`` and ``state``).
        Names are those inside DDP, DataParallel and torch.compile, with or without which the state can be loaded.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> model[0].weight.requires_grad = False
    >>> freeze_state(model)["frozen"]
    ['0.weight']
    """
    check_module(model)
    model = unwrapped(model)
    named = dict(model.named_parameters())
    norms = {name: module for name, module in model.named_modules() if statistics.has_statistics(module)}
    state: dict[str, Any] = {
        "version": VERSION,
        "frozen": [name for name, p in named.items() if not p.requires_grad],
        "trainable": [name for name, p in named.items() if p.requires_grad],
        "statistics": {name: statistics.is_held(module) for name, module in norms.items()},
        "batch": [name for name, module in norms.items() if statistics.reads_batch(module)],
        "learns": [name for name, module in norms.items() if statistics.learns_held(module)],
        "removed": None,
    }
    optimizers = check_optimizers(optimizer, False, "keep")
    if optimizers:
        state["removed"] = [_removed_state(named, optim.removed_from(one)) for one in optimizers]
    return state


def _removed_state(named: dict[str, nn.Parameter], record: optim.Removed) -> dict[str, Any]:
    return {
        name: {
            "group": record.group[p],
            "position": next(i for i, q in enumerate(record.order[record.group[p]]) if q is p),
            "state": dict(record.state.get(p, {})),
        }
        for name, p in named.items()
        if p in record.group
    }


def load_freeze_state(
    model: nn.Module, state: dict[str, Any], optimizer: Optimizers | None = None, strict: bool = True
) -> Frozen:
    """Freeze in ``model`` what was frozen when ``state`` was taken, and unfreeze the rest.

    The order for a resume: build model and optimizer as for a fresh start, load the model's ``state_dict``, call this
    with the optimizer, then ``optimizer.load_state_dict``: by then its groups have the sizes they had at the save.
    (LBFGS, whose history belongs to one set of parameters, forgets it here and has it again from its ``state_dict``.)

    Args:
        state: from `freeze_state`.
        optimizer: needed when ``state`` was taken with one and had parameters out of it: they are taken out again.
            Several come in the order in which `freeze_state` got them.
        strict: False leaves names that only one side knows as they are, and lists them in ``.skipped``.

    Returns:
        what changed; in a ``with`` statement it is undone at the end of the block.

    Raises:
        ValueError: ``state`` is not a freeze state, or does not fit the model or optimizer. Nothing is changed then.
        TypeError: an argument of the wrong type.

    >>> model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> model.bias.requires_grad = False
    >>> load_freeze_state(other, freeze_state(model)).params
    ('bias',)
    >>> other.bias.requires_grad
    False
    """
    check_module(model)
    model = unwrapped(model)
    check_form(state)
    check_flag("strict", strict)
    state = as_inside(state, model)
    params, skipped = match_params(model, state, strict)
    for flag, listed in ((True, "frozen"), (False, "trainable")):
        check_flags({name: params[name] for name in state[listed] if name in params}, frozen=flag)
    norms, skipped_norms = match_norms(model, state, strict)
    check_can_hold(model, [name for name, (_, held) in norms.items() if held], model.modules())
    names = all_names(model)
    result = Frozen("load", skipped=tuple(skipped + skipped_norms))
    result.on_restore(partial(announce, model, params.values()))
    optimizers = check_optimizers(optimizer, False, "keep")
    removed = check_removed(state["removed"], params, optimizers)
    _apply_flags(result, params, set(state["frozen"]), names)
    for name, (module, held) in norms.items():
        set_statistics(result, model, name, module, held)
        was = statistics.notes(module)  # all that is known where freezekit was older when the state was taken
        batch = name in state["batch"] if "batch" in state else was["batch"] and not held
        learns = name in state["learns"] if "learns" in state else was["learns"] and held
        set_note(result, module, batch=batch, learns=learns)
    for one, entries in zip(optimizers, removed, strict=True):
        place = optim.Membership.of(one, params.values())
        if isinstance(one, LBFGS):  # one history over all: it fits no other set of parameters
            place.forgotten = optim.reset(one, ())
        result.on_restore(place.restore)
        _apply_removed(one, params, entries)
        result.removed += tuple(entries)
    announce(model, params.values())
    note_freeze(model)
    return result


def _apply_flags(
    result: Frozen, params: dict[str, nn.Parameter], frozen: set[str], names: dict[int, tuple[str, ...]]
) -> None:
    changed: list[nn.Parameter] = []
    dropped: list[nn.Parameter] = []
    for name, param in params.items():
        keep_param(result, param, param.requires_grad)
        if param.requires_grad == (name in frozen):
            param.requires_grad = name not in frozen
            changed.append(param)
        if name in frozen and param.grad is not None:
            param.grad = None
            dropped.append(param)
    result.params = tuple(name for p in changed for name in names[id(p)])
    result.grads = names_of(dropped, names)


def _apply_removed(optimizer: Optimizer, params: dict[str, nn.Parameter], removed: dict[str, Any]) -> None:
    """Bring every parameter of ``params`` in or out of its group, as ``removed`` says, with the state kept for it."""
    record = optim.removed_from(optimizer)
    optim.learn_names(optimizer, params)
    optim.put_back(optimizer, [p for name, p in params.items() if name not in removed])
    optim.take_out(optimizer, [params[name] for name in removed])
    for name, entry in sorted(removed.items(), key=lambda item: item[1]["position"]):
        param = params[name]
        if param not in record.group:
            optim.remember_absent(optimizer, param, entry["group"], entry["position"])
        if entry["state"]:
            record.state[param] = optim.placed(param, optimizer.param_groups[entry["group"]], entry["state"])
        else:
            record.state.pop(param, None)


VERSION = 1
Part = TypeVar("Part", nn.Parameter, nn.Module)


def check_form(state: object) -> None:
    wanted = {"frozen": list, "trainable": list, "statistics": dict}
    if not isinstance(state, dict):
        raise ValueError(f"state must be the dict that freeze_state returns, got {type(state).__name__}")
    missing = [key for key in ("version", *wanted, "removed") if key not in state]
    if missing:
        raise ValueError(f"state: not from freeze_state, it has no {', '.join(map(repr, missing))}")
    if state["version"] != VERSION:
        raise ValueError(f"state: version {shown(state['version'])}, and this freezekit reads version {VERSION}")
    for key, kind in wanted.items():
        if not isinstance(state[key], kind) or not all(isinstance(name, str) for name in state[key]):
            raise ValueError(f"state: {key!r} must be a {kind.__name__} of names, got {shown(state[key])}")
    if not all(isinstance(held, bool) for held in state["statistics"].values()):
        raise ValueError(f"state: 'statistics' must map names to bools, got {shown(state['statistics'])}")
    for key in ("batch", "learns"):  # which older states have not
        listed = state.get(key, [])
        if not isinstance(listed, list) or not all(isinstance(n, str) and n in state["statistics"] for n in listed):
            raise ValueError(f"state: {key!r} must be a list of names in 'statistics', got {shown(listed)}")
    twice = set(state["frozen"]) & set(state["trainable"])
    if twice:
        raise ValueError(f"state: both frozen and trainable: {', '.join(sorted(twice))}")
    removed = state["removed"]
    if removed is not None:
        if not isinstance(removed, list) or not all(isinstance(entries, dict) for entries in removed):
            raise ValueError(f"state: 'removed' must be a list of dicts or None, got {shown(removed)}")
        for entries in removed:
            for name, entry in entries.items():
                _check_entry(name, entry)
                if name not in state["frozen"] and name not in state["trainable"]:
                    raise ValueError(f"state: 'removed' names {name!r}, which is neither frozen nor trainable")


def _check_entry(name: object, entry: Any) -> None:
    whole = isinstance(entry, dict) and entry.keys() == {"group", "position", "state"}
    if not (whole and isinstance(name, str) and isinstance(entry["state"], dict)):
        raise ValueError(f"state: 'removed' entry {name!r} must hold group, position and state, got {shown(entry)}")
    for key in ("group", "position"):
        if not isinstance(entry[key], int) or entry[key] < 0:
            raise ValueError(f"state: {key} of removed {name!r} must be an index, got {shown(entry[key])}")


def as_inside(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """``state`` by the names of ``model``; older versions of freezekit took those of DDP or torch.compile around it."""
    names = [*state["frozen"], *state["trainable"], *state["statistics"]]
    for wrapper in ("module", "_orig_mod"):
        prefix = f"{wrapper}."
        if names and wrapper not in model._modules and all(name.startswith(prefix) for name in names):
            return as_inside({key: _without(prefix, part) for key, part in state.items()}, model)
    return state


def _without(prefix: str, part: Any) -> Any:
    """A part of a state with the names in it, those of ``removed`` too, without ``prefix``."""
    if isinstance(part, dict):
        return {name.removeprefix(prefix): value for name, value in part.items()}
    if isinstance(part, list):
        return [_without(prefix, each) for each in part]
    return part.removeprefix(prefix) if isinstance(part, str) else part


def match_params(model: nn.Module, state: dict[str, Any], strict: bool) -> tuple[dict[str, nn.Parameter], list[str]]:
    """Parameters that both sides know, by name, and the names that only one side knows."""
    every = dict(model.named_parameters(remove_duplicate=False))
    return _matched([*state["frozen"], *state["trainable"]], every, ("", ""), strict)


def match_norms(
    model: nn.Module, state: dict[str, Any], strict: bool
) -> tuple[dict[str, tuple[nn.Module, bool]], list[str]]:
    """Layers with running statistics that both sides know, with whether they were frozen; and the names of the rest."""
    every = {n: m for n, m in model.named_modules(remove_duplicate=False) if statistics.has_statistics(m)}
    saved: dict[str, bool] = state["statistics"]
    both, rest = _matched(list(saved), every, ("layer with running statistics ", "the statistics of "), strict)
    return {name: (module, saved[name]) for name, module in both.items()}, rest


def _matched(
    saved: list[str], every: dict[str, Part], kind: tuple[str, str], strict: bool
) -> tuple[dict[str, Part], list[str]]:
    """What of ``every``, by each of its names, was saved; and the names that only one side knows.

    Args:
        kind: for errors, what stands before a name that the model lacks, and before one that the state lacks.
    """
    unknown = [name for name in saved if name not in every]
    covered = {id(every[name]) for name in saved if name in every}
    firsts = {id(part): name for name, part in reversed(every.items())}
    left = [name for name, part in every.items() if id(part) not in covered and firsts[id(part)] == name]
    if strict and (unknown or left):
        parts = [f"model has no {kind[0]}{name!r}{_near(name, every)}" for name in unknown[:5]]
        parts += [f"state says nothing of {kind[1]}{name!r}" for name in left[:5]]
        raise ValueError(f"state: does not fit the model: {'; '.join(parts)}; strict=False takes what fits")
    return {name: every[name] for name in saved if name in every}, unknown + left


def _near(name: str, names: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, names, n=2)
    return f" (near: {', '.join(map(repr, near))})" if near else ""


def check_removed(
    removed: list[dict[str, Any]] | None, params: dict[str, nn.Parameter], optimizers: tuple[Optimizer, ...]
) -> list[dict[str, Any]]:
    """Per optimizer, the entries of ``removed`` that the model knows, once the optimizer is seen to fit them."""
    if not optimizers:
        if removed and any(removed):
            count = sum(map(len, removed))
            raise ValueError(f"optimizer: state has {count} parameters out of their optimizer; pass optimizer=")
        return []
    if removed is None or len(removed) != len(optimizers):
        taken = "none" if removed is None else str(len(removed))
        raise ValueError(
            f"optimizer: state was taken with {taken} and {len(optimizers)} given; pass to load_freeze_state the same "
            "optimizers as to freeze_state, in their order"
        )
    known = [{name: entry for name, entry in entries.items() if name in params} for entries in removed]
    for optimizer, entries in zip(optimizers, known, strict=True):
        groups = optim.group_of(optimizer)
        for name, entry in entries.items():
            _check_group(name, entry["group"], groups.get(id(params[name])), len(optimizer.param_groups))
    return known


def _check_group(name: str, saved: int, here: int | None, count: int) -> None:
    if (here is None and saved < count) or here == saved:
        return
    found = f"has it in group {here}" if here is not None else f"has {count} groups"
    raise ValueError(
        f"optimizer: {name!r} belongs to group {saved} in state, and the optimizer {found}; build the optimizer with "
        "the groups it had when the state was taken"
    )
