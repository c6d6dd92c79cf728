"""Checks of a saved freeze state, alone and against a model and its optimizers, before anything is changed."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from freezekit._arguments import shown
from freezekit.freezing import norm as statistics
from freezekit.freezing import optim

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
