"""Freezing that survives a restart: what is frozen, by name, as plain data that goes into a checkpoint."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from freezekit._arguments import check_flag, check_module
from freezekit.distributed import note_freeze, unwrapped
from freezekit.freezing import norm as statistics
from freezekit.freezing import optim
from freezekit.freezing.api import all_names, names_of, restore_param, set_note, set_statistics
from freezekit.freezing.arguments import check_flags, check_optimizers
from freezekit.freezing.baked import check_can_hold
from freezekit.freezing.flags import announce
from freezekit.freezing.result import Frozen
from freezekit.freezing.saved import VERSION, as_inside, check_form, check_removed, match_norms, match_params
from freezekit.freezing.wrapping import Optimizers


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
        result.on_restore(partial(restore_param, param, param.requires_grad, param.grad))
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
