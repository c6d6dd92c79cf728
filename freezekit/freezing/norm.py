"""Running statistics that hold still: the one thing about freezing that ``requires_grad`` does not cover.

A normalisation layer with running statistics is *held* by an instance attribute ``train`` of class `Hold` that stands
before the class's own method, so that ``model.train()`` reaches it and leaves the layer in eval mode. Why this and not

* a subclass put in by ``__class__``: ``type(m) is nn.BatchNorm2d`` would fail (tools key on it), and it fights with
  the others who swap classes (parametrizations, FSDP2, `convert`) over the order of undoing;
* a forward pre-hook that resets the flag: ``m.training`` would say True between ``train()`` and the forward, and a
  compiled graph would have to replay the write;
* a patched ``nn.Module.train``: that is everybody's.

The attribute lies in the instance's ``__dict__``: no entry in ``state_dict``, ``type`` and ``isinstance`` as before,
copied by ``deepcopy`` and ``pickle`` with its module, and read by no forward, so nothing recompiles.

Whether a layer is held is asked of `is_held` and of nothing else.
"""

from __future__ import annotations

import torch
from torch import nn

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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


def has_statistics(module: nn.Module) -> bool:
    """Whether ``module`` itself carries running statistics (BatchNorm, SyncBatchNorm, InstanceNorm or alike).

    >>> has_statistics(nn.BatchNorm2d(3)), has_statistics(nn.BatchNorm2d(3, track_running_stats=False))
    (True, False)
    """
    buffers = module._buffers
    return buffers.get("running_mean") is not None and buffers.get("running_var") is not None


def is_held(module: nn.Module) -> bool:
    """Whether ``module``'s running statistics are frozen: it uses them, keeps them, and ignores ``train()``."""
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
            for name in STATISTICS:
                buffer = module._buffers.get(name)
                if buffer is not None:
                    found[f"{prefix}.{name}" if prefix else name] = buffer
    return found
