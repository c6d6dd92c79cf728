"""Freezing that survives a restart: what is frozen, by name, as plain data that goes into a checkpoint."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from freezekit.freezing import norm as statistics
from freezekit.freezing import optim
from freezekit.freezing.api import all_names, names_of, restore_param
from freezekit.freezing.result import Frozen

VERSION = 1


def freeze_state(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """What is frozen in ``model``, by name: plain data for ``torch.save`` and ``torch.load(weights_only=True)``.

    Args:
        optimizer: pass it where ``freeze(remove=True)`` was used: which parameters were taken out of it, their places,
            and the state that is kept for them are part of no ``optimizer.state_dict()``.

    Returns:
        ``version``; ``frozen`` and ``trainable`` (names of parameters, each once); ``statistics`` (name of each held
        layer -> the mode it returns to); ``removed`` (None without an optimizer, else name -> ``group``, ``position``
        and ``state``).

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> model[0].weight.requires_grad = False
    >>> freeze_state(model)["frozen"]
    ['0.weight']
    """
    named = dict(model.named_parameters())
    state: dict[str, Any] = {
        "version": VERSION,
        "frozen": [name for name, p in named.items() if not p.requires_grad],
        "trainable": [name for name, p in named.items() if p.requires_grad],
        "statistics": {n: m.__dict__["train"].mode for n, m in model.named_modules() if statistics.is_held(m)},
        "removed": None,
    }
    if optimizer is not None:
        optim.check_optimizer(optimizer, False, "keep")
        record = optim.removed_from(optimizer)
        state["removed"] = {
            name: {
                "group": record.group[p],
                "position": next(i for i, q in enumerate(record.order[record.group[p]]) if q is p),
                "state": dict(record.state.get(p, {})),
            }
            for name, p in named.items()
            if p in record.group
        }
    return state


def load_freeze_state(
    model: nn.Module, state: dict[str, Any], optimizer: Optimizer | None = None, strict: bool = True
) -> Frozen:
    """Freeze in ``model`` what was frozen when ``state`` was taken, and unfreeze the rest.

    The order for a resume: build model and optimizer as for a fresh start, load the model's ``state_dict``, call this
    with the optimizer, then ``optimizer.load_state_dict``: by then its groups have the sizes they had at the save.

    Args:
        state: from `freeze_state`.
        optimizer: needed when ``state`` was taken with one: parameters that were out of it are taken out again.
        strict: False leaves names that only one side knows as they are, and lists them in ``.skipped``.

    Returns:
        what changed; in a ``with`` statement it is undone at the end of the block.

    Raises:
        ValueError: ``state`` is not a freeze state, or does not fit the model or optimizer. Nothing is changed then.
    """
    _check_form(state)
    params, skipped = _match_params(model, state, strict)
    norms, skipped_norms = _match_norms(model, state, strict)
    names = all_names(model)
    result = Frozen("load", skipped=tuple(skipped + skipped_norms))
    removed = None
    if state["removed"] is not None:
        removed = _check_removed(state["removed"], params, optimizer)
    elif optimizer is not None:
        raise ValueError("optimizer: state was taken without one; take it with freeze_state(model, optimizer)")
    _apply_flags(result, params, set(state["frozen"]), names)
    for name, module in model.named_modules():
        if statistics.has_statistics(module):
            _apply_norm(result, name, module, norms.get(name))
    if optimizer is not None and removed is not None:
        was = optim.Membership.of(optimizer, params.values())
        _apply_removed(optimizer, params, removed)
        result.removed = tuple(removed)
        result.on_restore(was.restore)
    return result


def _check_form(state: object) -> None:
    wanted = {"frozen": list, "trainable": list, "statistics": dict}
    if not isinstance(state, dict):
        raise ValueError(f"state: expected the dict that freeze_state returns, got {type(state).__name__}")
    missing = [key for key in ("version", *wanted, "removed") if key not in state]
    if missing:
        raise ValueError(f"state: not from freeze_state, it has no {', '.join(map(repr, missing))}")
    if state["version"] != VERSION:
        raise ValueError(f"state: version {state['version']!r}, and this freezekit reads version {VERSION}")
    for key, kind in wanted.items():
        if not isinstance(state[key], kind) or not all(isinstance(name, str) for name in state[key]):
            raise ValueError(f"state: {key!r} must be a {kind.__name__} of names, got {state[key]!r:.100}")
    if not all(isinstance(mode, bool) for mode in state["statistics"].values()):
        raise ValueError(f"state: 'statistics' must map names to bools, got {state['statistics']!r:.100}")
    twice = set(state["frozen"]) & set(state["trainable"])
    if twice:
        raise ValueError(f"state: both frozen and trainable: {', '.join(sorted(twice))}")
    removed = state["removed"]
    if removed is not None:
        if not isinstance(removed, dict):
            raise ValueError(f"state: 'removed' must be a dict or None, got {type(removed).__name__}")
        for name, entry in removed.items():
            _check_entry(name, entry)


def _check_entry(name: object, entry: Any) -> None:
    whole = isinstance(entry, dict) and entry.keys() == {"group", "position", "state"}
    if not (whole and isinstance(name, str) and isinstance(entry["state"], dict)):
        raise ValueError(f"state: 'removed' entry {name!r} must hold group, position and state, got {entry!r:.100}")
    for key in ("group", "position"):
        if not isinstance(entry[key], int) or entry[key] < 0:
            raise ValueError(f"state: {key} of removed {name!r} must be an index, got {entry[key]!r}")


def _match_params(model: nn.Module, state: dict[str, Any], strict: bool) -> tuple[dict[str, nn.Parameter], list[str]]:
    """Parameters that both sides know, by name, and the names that only one side knows."""
    every = dict(model.named_parameters(remove_duplicate=False))
    firsts = dict(model.named_parameters())
    saved = [*state["frozen"], *state["trainable"]]
    unknown = [name for name in saved if name not in every]
    covered = {id(every[name]) for name in saved if name in every}
    left = [name for name, p in firsts.items() if id(p) not in covered]
    if strict and (unknown or left):
        parts = [f"model has no {name!r}{_near(name, every)}" for name in unknown[:5]]
        parts += [f"state says nothing of {name!r}" for name in left[:5]]
        raise ValueError(f"state: does not fit the model: {'; '.join(parts)}; strict=False takes what fits")
    return {name: every[name] for name in saved if name in every}, unknown + left


def _near(name: str, names: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, names, n=2)
    return f" (near: {', '.join(map(repr, near))})" if near else ""


def _match_norms(model: nn.Module, state: dict[str, Any], strict: bool) -> tuple[dict[str, bool], list[str]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = [
        name for name in state["statistics"] if name not in modules or not statistics.has_statistics(modules[name])
    ]
    if strict and unknown:
        raise ValueError(
            f"state: no layer with running statistics named {', '.join(map(repr, unknown[:5]))} in the model"
        )
    return {name: mode for name, mode in state["statistics"].items() if name not in unknown}, unknown


def _check_removed(
    removed: dict[str, Any], params: dict[str, nn.Parameter], optimizer: Optimizer | None
) -> dict[str, Any]:
    """The entries of ``removed`` that the model knows, once the optimizer is seen to fit them."""
    if optimizer is None:
        if removed:
            raise ValueError(f"optimizer: state has {len(removed)} parameters out of its optimizer; pass optimizer=")
        return {}
    optim.check_optimizer(optimizer, False, "keep")
    groups = optim.group_of(optimizer)
    kept = {name: entry for name, entry in removed.items() if name in params}
    for name, entry in kept.items():
        here = groups.get(id(params[name]), entry["group"])
        if here != entry["group"] or here >= len(optimizer.param_groups):
            raise ValueError(
                f"optimizer: {name!r} belongs to group {entry['group']} in state, and the optimizer "
                + (f"has it in group {here}" if here != entry["group"] else f"has {len(optimizer.param_groups)} groups")
                + "; build the optimizer with the groups it had when the state was taken"
            )
    return kept


def _apply_flags(
    result: Frozen, params: dict[str, nn.Parameter], frozen: set[str], names: dict[int, tuple[str, ...]]
) -> None:
    changed: list[nn.Parameter] = []
    dropped: list[nn.Parameter] = []
    for name, param in params.items():
        result.on_restore(partial(restore_param, param, param.requires_grad, param.grad))
        if param.requires_grad == (name in frozen):
            param.requires_grad_(name not in frozen)
            changed.append(param)
        if name in frozen and param.grad is not None:
            param.grad = None
            dropped.append(param)
    result.params = tuple(name for p in changed for name in names[id(p)])
    result.grads = names_of(dropped, names)


def _apply_norm(result: Frozen, name: str, module: nn.Module, mode: bool | None) -> None:
    """Hold ``module`` and have it return to ``mode``; None releases it."""
    held = statistics.is_held(module)
    if mode is None and held:
        statistics.release(module)
        result.on_restore(partial(statistics.hold, module))
    elif mode is not None:
        statistics.hold(module)
        if not held:
            result.on_restore(partial(statistics.release, module))
        module.__dict__["train"].mode = mode
    if held != (mode is not None):
        result.norms = (*result.norms, name)


def _apply_removed(optimizer: Optimizer, params: dict[str, nn.Parameter], removed: dict[str, Any]) -> None:
    """Bring every parameter of ``params`` in or out of its group, as ``removed`` says, with the state kept for it."""
    record = optim.removed_from(optimizer)
    optim.put_back(optimizer, [p for name, p in params.items() if name not in removed])
    optim.take_out(optimizer, [params[name] for name in removed], "keep")
    for name, entry in sorted(removed.items(), key=lambda item: item[1]["position"]):
        param = params[name]
        if param not in record.group:
            optim.remember_absent(optimizer, param, entry["group"], entry["position"])
        if entry["state"]:
            record.state[param] = optim.placed(param, entry["state"])
        else:
            record.state.pop(param, None)
