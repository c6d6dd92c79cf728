"""The tensors that are frozen in a model, what `guard` remembers of each, and why a step would move it."""

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
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

    ``tensor`` is kept so that nothing else can take its address while the record speaks of it. So are ``layer``, the
    module that has it, where it can be seen, and ``beside``, the parameters of that.
    """

    tensor: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    identity: tuple[int, int]
    checksum: int
    value: torch.Tensor | None
    layer: nn.Module | None
    beside: tuple[nn.Parameter, ...]

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


def record_all(model: nn.Module, tensors: dict[str, torch.Tensor], with_value: bool) -> dict[str, Record]:
    """A record of each of these tensors of ``model`` as it is now."""
    records = {}
    layers = layers_with(model) if tensors else {}
    for (name, tensor), checksum in zip(tensors.items(), checksums(list(tensors.values())), strict=True):
        value = local(tensor).detach().clone() if with_value else None
        layer = layers.get(id(tensor))
        form = (tensor.shape, tensor.dtype, identity(tensor), checksum, value)
        records[name] = Record(tensor, *form, layer, () if layer is None else own_parameters(layer))
    return records


def layers_with(model: nn.Module) -> dict[int, nn.Module | None]:
    """``id`` of each tensor of ``model`` -> the module that has it, where it can be seen."""
    modules = dict(model.named_modules(remove_duplicate=False))
    # Not by the tensors' names, which some wrappers make shorter than those of their modules.
    return {
        id(tensor): modules.get(layer_of(path))
        for path, module in modules.items()
        for tensor in (*module._parameters.values(), *module._buffers.values())
    }


def follow(model: nn.Module, records: dict[str, Record], tensors: dict[str, torch.Tensor]) -> dict[str, Record]:
    """``records`` by the names that their tensors have now, where layers changed places: behind one dropped, say."""
    stayed = {name for name, tensor in tensors.items() if name in records and records[name].tensor is tensor}
    known = {id(record.tensor): record for name, record in records.items() if name not in stayed}
    renamed = {
        name: known[id(tensor)] for name, tensor in tensors.items() if name not in stayed and id(tensor) in known
    }
    layers = layers_with(model) if renamed else {}
    renamed = {name: record for name, record in renamed.items() if layers.get(id(record.tensor)) is record.layer}
    moved = {id(record) for record in renamed.values()}
    return {name: record for name, record in records.items() if id(record) not in moved} | renamed


class Watch(Protocol):
    """What `unfreeze` tells of its parameters: a guard."""

    def note_unfrozen(self, params: Iterable[nn.Parameter]) -> None: ...


watches: WeakSet[Watch] = WeakSet()


def layer_of(path: str) -> str:
    """The module at a path, or the one whose parametrization it is part of.

    >>> layer_of("0.1"), layer_of("0.parametrizations.weight.0")
    ('0.1', '0')
    """
    return re.sub(r"(^|\.)parametrizations(\..*)?$", "", path)


def replaced(model: nn.Module, records: dict[str, Record], unfrozen: Collection[int]) -> dict[str, str]:
    """What took the place of frozen tensors and learns or moves, though it was not unfrozen: name -> what happened.

    Args:
        records: of tensors that are not among the frozen ones any more.
        unfrozen: ``id`` of each parameter that `unfreeze` was called for meanwhile.
    """
    names = {id(module): name for name, module in model.named_modules()}
    params = {id(param): name for name, param in model.named_parameters()}
    buffers = {id(buffer) for buffer in model.buffers()}
    found: dict[str, str] = {}
    for name, record in records.items():
        if record.layer is None:
            continue
        if isinstance(record.tensor, nn.Parameter):
            if record.tensor.requires_grad or id(record.tensor) in params or id(record.layer) not in names:
                continue  # unfrozen, or elsewhere, or gone with its layer
            known = {id(param) for param in record.beside} | set(unfrozen)
            for param in own_parameters(record.layer):
                if param.requires_grad and id(param) not in known:
                    new = params[id(param)]
                    if new == name or new not in found:
                        found[new] = f"it trains in place of {name!r}, which is gone"
        elif id(record.layer) not in names and id(record.tensor) in buffers:
            path = next(path for path, module in model.named_modules() if _has(module, record.tensor))
            own = list(model.get_submodule(path).parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                kind = type(model.get_submodule(path)).__name__
                found[name] = f"it is in a {kind} now, which moves its statistics in train mode"
    return found


def own_parameters(layer: nn.Module) -> tuple[nn.Parameter, ...]:
    """The parameters of a module itself, and those of its parametrizations; not those of layers within it."""
    parametrizations = layer._modules["parametrizations"] if is_parametrized(layer) else None
    parts = () if parametrizations is None else parametrizations.parameters()
    return (*layer.parameters(recurse=False), *parts)


def _has(module: nn.Module, buffer: torch.Tensor) -> bool:
    return any(own is buffer for own in module._buffers.values())


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


def momenta(optimizer: Optimizer, param: nn.Parameter) -> list[str]:
    """What of the optimizer's state moves ``param`` at zero gradient: momentum. Second moments do not."""
    state = optimizer.state.get(param, {})
    kept = {key: state.get(key) for key in ("momentum_buffer", "exp_avg")}  # of SGD, RMSprop and Muon; of the Adams
    return [key for key, value in kept.items() if isinstance(value, torch.Tensor) and any_nonzero(value)]


def causes(optimizer: Optimizer, group: dict[str, Any], param: nn.Parameter) -> list[str]:
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


def describe(optimizer: Optimizer, group: dict[str, Any], name: str, reasons: list[str]) -> str:
    """One line: the causes, the kind of step, and the cure."""
    why = "; ".join(reasons) or "the optimizer wrote to it for a reason that guard does not know"
    step = f"in a {step_kind(group)} step of {type(optimizer).__name__}"
    if isinstance(optimizer, LBFGS):
        cure = f"freeze(model, {name!r}, optimizer=optimizer, remove=True, state='reset')"
    elif reasons:
        cure = f"freeze(model, {name!r}, optimizer=optimizer), which drops .grad so that the step skips it"
    else:
        cure = f"freeze(model, {name!r}, optimizer=optimizer, remove=True), which takes it out of the optimizer"
    return f"{why}, {step}. Cure: {cure}"
