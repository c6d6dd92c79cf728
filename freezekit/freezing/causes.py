"""Why a step of an optimizer moves a frozen parameter, and how to stop it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer


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
