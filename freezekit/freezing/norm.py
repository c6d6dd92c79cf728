"""Running statistics that hold still: the one thing about freezing that ``requires_grad`` does not cover.

A normalisation layer with running statistics is *held* by an instance attribute ``train`` of class `Hold` that stands
before the class's own method, so that ``model.train()`` reaches it and leaves the layer in eval mode. Why this and not

* a subclass put in by ``__class__``: ``type(m) is nn.BatchNorm2d`` would fail (tools key on it), and it fights with
  the others who swap classes (parametrizations, FSDP2, `convert`) over the order of undoing;
* a forward pre-hook that resets the flag: ``m.training`` would say True between ``train()`` and the forward, and a
  compiled graph would have to replay the write;
* a patched ``nn.Module.train``: that is everybody's.

The attribute lies in the instance's ``__dict__``: no entry in ``state_dict``, ``type`` and ``isinstance`` as before,
copied by ``deepcopy`` and ``pickle`` with its module, and read by no forward, so nothing recompiles. What builds a new
module loses it: convert to SyncBatchNorm first, then freeze. What writes to the buffers themselves is not stopped by
it but seen by `guard`: ``torch.optim.swa_utils.update_bn`` resets the statistics of every batch norm, held or not.

Spectral norm has running statistics too: its singular vectors move at each forward in training, and with them the
weight that the layer uses, however frozen the parameter is. In eval they hold still, so they are held the same way.

Whether a layer is held is asked of `is_held` and of nothing else.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from freezekit._arguments import check_module


class Hold:
    """Stands in for the ``train`` method of one layer and keeps it in eval mode.

    Args:
        module: the layer, with running statistics.

    ``mode`` is the last mode that was asked for; `release` gives it back to the layer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.mode = module.training
        self.before = module.__dict__.get("train")

    def __call__(self, mode: bool = True) -> nn.Module:
        if not isinstance(mode, bool):
            raise ValueError(f"mode: expected a bool, got {mode!r}")
        self.mode = mode
        type(self.module).train(self.module, False)
        return self.module


def statistics_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The running statistics that ``module`` itself carries, by the names of their buffers.

    Means, variances and the counter of BatchNorm, SyncBatchNorm, InstanceNorm and whatever else names its buffers as
    they do; the singular vectors of spectral norm, as a parametrization and as the older hook.
    """
    pairs = [("running_mean", "running_var"), ("_u", "_v")]
    pairs += [(f"{h.name}_u", f"{h.name}_v") for h in module._forward_pre_hooks.values() if isinstance(h, SpectralNorm)]
    found: dict[str, torch.Tensor] = {}
    for pair in pairs:
        buffers = {name: module._buffers.get(name) for name in pair}
        if None not in buffers.values():
            found.update((name, buffer) for name, buffer in buffers.items() if buffer is not None)
    counter = module._buffers.get("num_batches_tracked")
    if "running_mean" in found and counter is not None:
        found["num_batches_tracked"] = counter
    return found


def has_statistics(module: nn.Module) -> bool:
    """Whether ``module`` itself carries running statistics.

    >>> has_statistics(nn.BatchNorm2d(3)), has_statistics(nn.BatchNorm2d(3, track_running_stats=False))
    (True, False)
    """
    return bool(statistics_of(module))


def is_held(module: nn.Module) -> bool:
    """Whether ``module``'s running statistics are frozen: it uses them, keeps them, and ignores ``train()``.

    >>> import freezekit as fk
    >>> norm = nn.BatchNorm2d(4)
    >>> _ = fk.freeze(norm)
    >>> fk.freezing.is_held(norm), norm.train().training
    (True, False)
    """
    check_module(module, "module")
    return isinstance(module.__dict__.get("train"), Hold)


def hold(module: nn.Module) -> None:
    """Freeze the running statistics of ``module``; no effect on one that is held already."""
    if is_held(module):
        return
    holder = Hold(module)
    type(module).train(module, False)
    module.__dict__["train"] = holder


def release(module: nn.Module) -> None:
    """Undo `hold`: the layer takes the mode that was asked for last. No effect on one that is not held."""
    if not is_held(module):
        return
    holder: Hold = module.__dict__.pop("train")
    if holder.before is not None:
        module.__dict__["train"] = holder.before
    module.train(holder.mode)


def held_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The statistics that must not move: dotted name -> buffer of every held layer in ``model``."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        if is_held(module):
            for name, buffer in statistics_of(module).items():
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found
