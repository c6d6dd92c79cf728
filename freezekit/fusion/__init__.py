"""Frozen Conv-BatchNorm-(add)-ReLU as one operator each way, in a model that stays what it was."""

from typing import TypeVar

import torch
from torch import nn

from freezekit._arguments import check_module
from freezekit.fusion.classes import fuse_module, is_ours, original_class, plan_of, unfuse_module
from freezekit.fusion.identity import classes_read
from freezekit.fusion.plan import make_plan
from freezekit.fusion.report import BlockReport, fusion_report

__all__ = ["BlockReport", "fuse", "fusion_report", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """Lets every frozen Conv -> BatchNorm -> (+ residual) -> ReLU of `model` run as one operator, in place.

    The source of each module's forward is read, and the layers of blocks in it are replaced by an attempt to run them
    as one operator; nothing else of it is touched. At each call a block looks whether its layers are frozen: weights
    and biases with ``requires_grad=False``, batch norms in eval mode, no hooks on any of them. If so it runs as one
    operator that keeps one bit per element; if not, the forward's own statements run. So `freeze` and
    `unfreeze` need no other call.

    Names, parameters, buffers, state_dict, hooks and isinstance stay as they are; only ``type(module)`` of the
    rewritten containers is a subclass of what it was. A deepcopy is fused, a pickle is not: it holds the stock classes.

    Nothing is kept of a weight: each call reads the parameters as they are then.

    Args:
        model: any module; fusing twice, or after layers were changed, is fine.

    Returns:
        The same object. `fusion_report` says what is fused, `unfuse` undoes it.

    Raises:
        TypeError: if `model` is not an nn.Module.

    >>> import torch
    >>> from torch import nn
    >>> import freezekit as fk
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
    >>> x = torch.randn(1, 3, 8, 8, requires_grad=True)
    >>> expected = model(x)
    >>> torch.testing.assert_close(fuse(model)(x), expected)
    >>> model(x).grad_fn.name()
    'FreezekitFrozenConv2dBackward'
    """
    check_module(model)
    looked_at = classes_read(model)
    for module in list(model.modules()):
        if not _may_rewrite(module):
            if "forward" in module.__dict__:
                unfuse_module(module)  # it was given that since
            continue
        if id(module) in looked_at:
            unfuse_module(module)
            continue
        plan = make_plan(module, original_class(module))
        if plan.blocks:
            fuse_module(module, plan)
        else:
            unfuse_module(module)
    return model


def unfuse(model: Model) -> Model:
    """Undoes `fuse`: every module has the class that it had.

    >>> from torch import nn
    >>> import freezekit as fk
    >>> model = unfuse(fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())))
    >>> type(model) is nn.Sequential
    True
    """
    check_module(model)
    for module in model.modules():
        unfuse_module(module)
    return model


def _may_rewrite(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    if plan_of(module) is not None and not is_ours(module):
        return False
    return any(True for _ in module.children())
