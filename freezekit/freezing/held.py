"""The tensors that are frozen in a model, what `guard` remembers of each, and why a step would move it."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from freezekit._storages import sparse_parts, storages_of
from freezekit.freezing.bits import checksums, local
from freezekit.freezing.norm import held_statistics, is_held


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module | None]]:
    """Name and tensor of every parameter with ``requires_grad=False``; the same of every statistic, and its held norm.

    Of those that have data.
    """
    params = [(name, param, None) for name, param in model.named_parameters() if not param.requires_grad]
    for name, tensor, norm in (*params, *held_statistics(model)):
        if not is_lazy(tensor) and not tensor.is_meta:
            yield name, tensor, norm


class Record:
    """A frozen tensor and the value to hold it to; ``value`` is a copy, where one is wanted.

    It belongs to the tensor, not to a name: ``name`` is the last one known, for messages. ``norm`` is the held layer
    that a statistic is in.
    """

    def __init__(
        self, name: str, tensor: torch.Tensor, norm: nn.Module | None, checksum: int, value: torch.Tensor | None
    ) -> None:
        self.name, self.tensor, self.norm = name, tensor, norm
        self.form, self.checksum, self.value = form(tensor), checksum, value
        self.settle()

    def settle(self) -> None:
        """Note the address and version at which the tensor has its value, and its memory."""
        self.is_known_to_have_moved = False
        self.identity = identity(self.tensor)
        self.memory = [StorageWeakRef(storage) for storage in storages_of(local(self.tensor))]

    def what(self) -> tuple[object, ...]:
        """What it holds, and under which name."""
        return self.name, self.form, self.checksum

    def touched(self) -> bool:
        """Whether it may have changed. Writes through ``.data`` and fused steps change neither address nor version."""
        return self.is_known_to_have_moved or identity(self.tensor) != self.identity

    def thawed(self) -> bool:
        """Whether this very tensor was made trainable, or its norm released."""
        return self.tensor.requires_grad if self.norm is None else not is_held(self.norm)

    def put_back(self, value: torch.Tensor) -> bool:
        """Give the tensor ``value`` again: in its memory, or in new memory where ``.data`` was set to somebody's.

        Returns whether that could be done: not where a shard has other memory.
        """
        here = local(self.tensor)
        # An address alone would not tell: what is allocated after a tensor was freed gets the same.
        memory = [storage._cdata for storage in storages_of(here)] == [storage.cdata for storage in self.memory]
        if memory and identity(self.tensor)[0] == self.identity[0]:
            with torch.no_grad():
                here.copy_(value)
            return True
        if here is self.tensor:
            here.data = value.to(here.device, copy=True)
        return here is self.tensor


def form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def identity(tensor: torch.Tensor) -> tuple[int | tuple[int, ...], int]:
    """Address and version: equal as long as no in-place operation and no ``.data =`` happened to ``tensor``."""
    here = local(tensor)
    strided = here.layout is torch.strided
    address = here.data_ptr() if strided else tuple(part.data_ptr() for part in sparse_parts(here))
    return address, -1 if here.is_inference() else tensor._version


def record_all(found: dict[int, tuple[str, torch.Tensor, nn.Module | None]], with_value: bool) -> dict[int, Record]:
    """A record of each tensor as it is now."""
    sums = checksums([tensor for _, tensor, _ in found.values()])
    return {
        key: Record(name, tensor, norm, checksum, local(tensor).detach().clone() if with_value else None)
        for (key, (name, tensor, norm)), checksum in zip(found.items(), sums, strict=True)
    }


@dataclass
class AtRisk:
    """A frozen parameter that the coming step may write to, and what is needed to undo that."""

    record: Record
    group: dict[str, Any]
    value: torch.Tensor
    state: dict[str, Any] | None


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


def put_state(optimizer: Optimizer, param: torch.Tensor, saved: dict[str, Any] | None) -> None:
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


def step_kind(group: dict[str, Any]) -> str:
    """How the group is stepped: "fused", "foreach" or "single-tensor"; torch's default is foreach on accelerators."""
    if group.get("fused"):
        return "fused"
    foreach = group.get("foreach")
    if foreach is None and "foreach" in group:
        foreach = not group.get("differentiable") and all(p.device.type != "cpu" for p in group["params"])
    return "foreach" if foreach else "single-tensor"


def any_nonzero(tensor: torch.Tensor) -> bool:
    """Whether an element is not zero; NaN is not zero."""
    if tensor.is_sparse:
        tensor = tensor._values()
    return bool((tensor != 0).any())


def momenta(optimizer: Optimizer, param: torch.Tensor) -> list[str]:
    """What of the optimizer's state moves ``param`` at zero gradient: momentum. Second moments do not."""
    state = optimizer.state.get(param, {})
    kept = {key: state.get(key) for key in ("momentum_buffer", "exp_avg")}  # of SGD, RMSprop and Muon; of the Adams
    return [key for key, value in kept.items() if isinstance(value, torch.Tensor) and any_nonzero(value)]


def causes(optimizer: Optimizer, group: dict[str, Any], param: torch.Tensor) -> list[str]:
    """What would move ``param``, whose ``grad`` is not None, in the next step; empty when nothing is known to."""
    lr = group.get("lr")
    if param.grad is None or (lr is not None and not isinstance(optimizer, LBFGS) and float(lr) == 0.0):
        return []
    found = []
    if any_nonzero(param.grad):
        found.append("its .grad is stale: it was left from before the freeze, or written since")
    zero = "" if found else " at a gradient of zeros"
    found += [f"momentum ({key}) moves it{zero}" for key in momenta(optimizer, param)]
    for key in ("weight_decay", "lambd"):
        if group.get(key):
            found.append(f"weight decay ({key}={float(group[key]):g}) moves it{zero}")
    return found


def describe(optimizer: Optimizer, risk: AtRisk) -> tuple[str, str]:
    """The name, and one line: the causes, the kind of step, and the cure."""
    name = risk.record.name
    if isinstance(optimizer, LBFGS):
        return name, describe_lbfgs(name)
    reasons = causes(optimizer, risk.group, risk.record.tensor)
    why = "; ".join(reasons) or "the optimizer wrote to it for a reason that guard does not know"
    step = f"in a {step_kind(risk.group)} step of {type(optimizer).__name__}"
    if reasons:
        cure = f"freeze(model, {name!r}, optimizer=optimizer), which drops .grad so that the step skips it"
    else:
        cure = f"freeze(model, {name!r}, optimizer=optimizer, remove=True), which takes it out of the optimizer"
    return name, f"{why}, {step}. Cure: {cure}"


def describe_lbfgs(name: str) -> str:
    """The line of a parameter that an LBFGS has, whatever its gradient."""
    cure = f"freeze(model, {name!r}, optimizer=optimizer, remove=True, state='reset')"
    return f"LBFGS writes to every parameter it holds, along one history over all. Cure: {cure}"
