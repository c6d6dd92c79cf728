"""The optimizer's side of freezing: what it remembers of a parameter, and whether it holds the parameter at all.

With ``remove=False`` a frozen parameter stays in its group and is skipped because its ``grad`` is None: groups,
schedulers and ``state_dict()`` see no change. With ``remove=True`` it leaves group *and* state (state without a group
makes ``state_dict()`` raise KeyError), and `Removed`, an attribute of the optimizer, remembers the way back: the order
of the group as it was, and the state when it is kept. Groups are told apart by index, since ``load_state_dict``
replaces their dictionaries; their options stay in place, so the parameter returns to its own options, as a scheduler
has left them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Optimizer

StatePolicy = Literal["keep", "reset"]
State = dict[torch.Tensor, dict[str, Any]]
ATTRIBUTE = "_freezekit_removed"


@dataclass
class Removed:
    """What `freeze(remove=True)` took out of one optimizer.

    group: parameter -> index of its group.
    order: group index -> the group's parameters in their order before anything was taken out.
    state: parameter -> its optimizer state, where it is kept.
    names: parameter -> its name, for an optimizer that was built from ``named_parameters()``.
    """

    group: dict[nn.Parameter, int] = field(default_factory=dict)
    order: dict[int, list[nn.Parameter]] = field(default_factory=dict)
    state: State = field(default_factory=dict)
    names: dict[nn.Parameter, str] = field(default_factory=dict)


def removed_from(optimizer: Optimizer) -> Removed:
    """The record of ``optimizer``: made at the first call, then always the same."""
    record: Removed = optimizer.__dict__.setdefault(ATTRIBUTE, Removed())
    return record


def group_of(optimizer: Optimizer) -> dict[int, int]:
    """id of each parameter in ``optimizer`` -> index of its group."""
    return {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}


def fresh_state(optimizer: Optimizer, param: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
    """The state that ``optimizer`` gives a parameter it has not met yet.

    Empty for all of torch.optim but Adagrad, which makes its state when it is built and not at the first step.
    """
    if not isinstance(optimizer, Adagrad):
        return {}
    value = group["initial_accumulator_value"]
    device = param.device if group["fused"] else "cpu"
    return {
        "step": torch.tensor(0.0, dtype=torch.float32, device=device),
        "sum": torch.full_like(
            param.detach(), complex(value, value) if param.is_complex() else value, memory_format=torch.preserve_format
        ),
    }


def complete_fused_momentum(optimizer: Optimizer) -> None:
    """Give trainable parameters of fused SGD the momentum buffer that they lack beside others that have one.

    torch's fused step fails on such a group, though a parameter that was frozen from the start, or reset, has none. A
    buffer of zeros steps as a missing one does, where dampening is 0; elsewhere nothing does, and torch's error stays.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if not (group["fused"] and group["momentum"]) or group["dampening"]:
            continue
        params = [p for p in group["params"] if p.requires_grad]
        lacking = [p for p in params if optimizer.state.get(p, {}).get("momentum_buffer") is None]
        if len(lacking) < len(params):
            for param in lacking:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(
                    param.detach(), memory_format=torch.preserve_format
                )


def reset(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> State:
    """Make ``optimizer`` forget the state of ``params``; returns what it forgot."""
    if isinstance(optimizer, LBFGS):  # one history over all
        forgotten = {p: s for p, s in optimizer.state.items() if s}
        optimizer.state.clear()
        return forgotten
    record = removed_from(optimizer)
    inside = group_of(optimizer)
    forgotten = {}
    for param in params:
        old = optimizer.state.pop(param, None) or record.state.pop(param, None)
        if old:
            forgotten[param] = old
        if id(param) in inside:
            fresh = fresh_state(optimizer, param, optimizer.param_groups[inside[id(param)]])
            if fresh:
                optimizer.state[param] = fresh
    return forgotten


def take_out(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Remove ``params`` from their groups, and set aside what state they have; returns those that were in a group."""
    record = removed_from(optimizer)
    inside = group_of(optimizer)
    taken: list[nn.Parameter] = []
    for param in params:
        old = optimizer.state.pop(param, None)
        if old:
            record.state[param] = old
        if id(param) in inside:
            record.group[param] = inside[id(param)]
            taken.append(param)
    leaving = {id(p) for p in taken}
    for index in {record.group[p] for p in taken}:
        _remember_order(optimizer, index)
        _set_members(optimizer, index, [p for p in optimizer.param_groups[index]["params"] if id(p) not in leaving])
    return taken


def _set_members(optimizer: Optimizer, index: int, members: list[nn.Parameter]) -> None:
    """Make ``members`` the parameters of a group, in place: LBFGS holds the list itself, and counts its elements once.

    An optimizer that was built from ``named_parameters()`` has a list of names beside it.
    """
    group = optimizer.param_groups[index]
    if "param_names" in group:
        names = removed_from(optimizer).names
        names.update(zip(group["params"], group["param_names"], strict=True))
        group["param_names"] = [names[p] for p in members]
    group["params"][:] = members
    if isinstance(optimizer, LBFGS):
        optimizer.__dict__["_numel_cache"] = None


def learn_names(optimizer: Optimizer, named: dict[str, nn.Parameter]) -> None:
    """Names for parameters that may enter an optimizer with ``param_names``; those it has given itself stay."""
    names = removed_from(optimizer).names
    for name, param in named.items():
        names.setdefault(param, name)


def orphans(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of ``params`` with state and no group, as a removal by hand leaves them: ``state_dict()`` fails on them."""
    inside = group_of(optimizer)
    return [p for p in params if p in optimizer.state and id(p) not in inside]


def _remember_order(optimizer: Optimizer, index: int) -> None:
    order = removed_from(optimizer).order.setdefault(index, [])
    known = {id(p) for p in order}
    order += [p for p in optimizer.param_groups[index]["params"] if id(p) not in known]


def remember_absent(optimizer: Optimizer, param: nn.Parameter, index: int, position: int) -> None:
    """Record a parameter that ``optimizer`` was built without as taken out of group ``index``, at ``position``."""
    _remember_order(optimizer, index)
    record = removed_from(optimizer)
    record.order[index].insert(position, param)
    record.group[param] = index


def placed(param: nn.Parameter, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """A copy of kept ``state`` on the device of ``param``.

    As in torch's ``load_state_dict``, "step" stays where it is (on the CPU) unless the group is fused or capturable.
    """
    on_device = group.get("fused") or group.get("capturable")

    def place(key: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.clone() if key == "step" and not on_device else value.to(param.device, copy=True)

    return {key: place(key, value) for key, value in state.items()}


def put_back(optimizer: Optimizer, params: Iterable[nn.Parameter], group: int | None = None) -> list[nn.Parameter]:
    """Return ``params`` to the groups they were taken from, at their places, with the state that was kept.

    A parameter that the optimizer never held goes to the end of ``group``; without ``group`` see `strangers`.
    """
    record = removed_from(optimizer)
    inside = group_of(optimizer)
    returned: list[nn.Parameter] = []
    for param in params:
        if id(param) in inside:
            continue
        index = record.group.pop(param, group)
        if index is None:
            continue
        _remember_order(optimizer, index)
        if not any(p is param for p in record.order[index]):
            record.order[index].append(param)
        options = optimizer.param_groups[index]
        present = {id(p) for p in options["params"]} | {id(param)}
        _set_members(optimizer, index, [p for p in record.order[index] if id(p) in present])
        kept = record.state.pop(param, None) or fresh_state(optimizer, param, options)
        if kept:
            optimizer.state[param] = kept
        returned.append(param)
    return returned


def strangers(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of ``params`` that ``optimizer`` neither holds nor gave up by `take_out`: it would never train them."""
    inside = group_of(optimizer)
    record = removed_from(optimizer)
    return [p for p in params if id(p) not in inside and p not in record.group]


@dataclass
class Membership:
    """Where parameters stood in one optimizer before a change, and the way back there."""

    optimizer: Optimizer
    inside: list[nn.Parameter]
    outside: list[nn.Parameter]
    strangers: list[nn.Parameter]
    forgotten: State = field(default_factory=dict)

    @classmethod
    def of(cls, optimizer: Optimizer, params: Iterable[nn.Parameter]) -> Membership:
        params, groups, record = list(params), group_of(optimizer), removed_from(optimizer)
        inside, outside = [p for p in params if id(p) in groups], [p for p in params if p in record.group]
        return cls(optimizer, inside, outside, strangers(optimizer, params))

    def restore(self) -> None:
        """Put every parameter back where it stood, with the state that was forgotten; touch no other."""
        record = removed_from(self.optimizer)
        put_back(self.optimizer, self.inside)
        take_out(self.optimizer, self.outside + self.strangers)
        for param in self.strangers:
            record.group.pop(param, None)
        if isinstance(self.optimizer, LBFGS) and self.forgotten:
            self.optimizer.state.clear()
        groups = group_of(self.optimizer)
        for owner, state in self.forgotten.items():
            (self.optimizer.state if id(owner) in groups else record.state)[owner] = state
