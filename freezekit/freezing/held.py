"""The tensors that are frozen in a model, and what `guard` remembers of each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from freezekit.freezing.bits import checksums, local
from freezekit.freezing.norm import held_buffers


def frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> every parameter with ``requires_grad=False`` and every statistic of a held norm that has data."""
    found: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    found.update(held_buffers(model))
    return {n: t for n, t in found.items() if not is_lazy(t) and not t.is_meta}


def identity(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and version: equal as long as no in-place operation and no ``.data =`` happened to ``tensor``."""
    here = local(tensor)
    address = here.data_ptr() if here.layout == torch.strided else id(here)
    return address, -1 if here.is_inference() else tensor._version


@dataclass
class Record:
    """A frozen tensor as it was when it was first seen frozen; ``value`` is a copy, where one is wanted.

    ``tensor`` is kept so that nothing else can take its address while the record speaks of it.
    """

    tensor: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    identity: tuple[int, int]
    checksum: int
    value: torch.Tensor | None

    def touched(self, now: torch.Tensor) -> bool:
        """Whether ``now`` may differ. Writes through ``.data`` and fused steps change neither address nor version."""
        return identity(now) != self.identity

    def same_form(self, now: torch.Tensor) -> bool:
        return now.shape == self.shape and now.dtype == self.dtype

    def accept(self, now: torch.Tensor) -> None:
        """Follow ``now``, which has the same value, to its new address and version."""
        self.tensor, self.identity = now, identity(now)


@dataclass
class AtRisk:
    """A frozen parameter that the coming step may write to, and what is needed to undo that."""

    name: str
    param: nn.Parameter
    group: dict[str, Any]
    value: torch.Tensor
    state: dict[str, Any] | None
    reasons: list[str]


def record_all(tensors: dict[str, torch.Tensor], with_value: bool) -> dict[str, Record]:
    """A record of each tensor as it is now."""
    records = {}
    for (name, tensor), checksum in zip(tensors.items(), checksums(list(tensors.values())), strict=True):
        value = local(tensor).detach().clone() if with_value else None
        records[name] = Record(tensor, tensor.shape, tensor.dtype, identity(tensor), checksum, value)
    return records


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Put ``value`` back into ``tensor``, in place."""
    with torch.no_grad():
        local(tensor).copy_(value)


def copy_state(optimizer: Optimizer, param: nn.Parameter) -> dict[str, Any] | None:
    """A copy of what ``optimizer`` remembers of ``param``; None when it is nothing."""
    if isinstance(optimizer, LBFGS) or param not in optimizer.state:
        return None
    return {key: copied(value) for key, value in optimizer.state[param].items()}


def copied(value: Any, twins: Mapping[int, torch.Tensor] = MappingProxyType({})) -> Any:
    """A copy of an entry of an optimizer's state, or of an option of a group.

    Args:
        twins: ``id`` of a tensor -> its copy, where there is one already.
    """
    if isinstance(value, torch.Tensor):
        return twins[id(value)] if id(value) in twins else value.detach().clone()
    return copy.deepcopy(value, dict(twins))


def put_state(optimizer: Optimizer, param: nn.Parameter, saved: dict[str, Any] | None) -> None:
    """Undo what a step did to the state of ``param``; tensors in place. LBFGS has no state of one parameter."""
    if isinstance(optimizer, LBFGS):
        return
    if saved is None:
        optimizer.state.pop(param, None)
        return
    live = optimizer.state[param]
    for key in live.keys() - saved.keys():
        del live[key]
    for key, value in saved.items():
        now = live.get(key)
        if isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor) and now.shape == value.shape:
            with torch.no_grad():
                now.copy_(value)
        else:
            live[key] = value
