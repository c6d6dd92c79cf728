"""What would the next ``optimizer.step()`` do to a frozen tensor? Asked of the optimizer itself, on copies.

A rule such as "momentum and zero gradients move" would have to be written for every optimizer and every option. So a
copy of the frozen tensor, its gradient and its state goes through the optimizer's own ``step``, and is compared.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch

from freezekit.freezing.bits import local, same_bits
from freezekit.freezing.causes import any_nonzero


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def would_move(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: torch.Tensor) -> float | None:
    """Largest absolute change that one step would make to ``p``, found by stepping a copy of it.

    Args:
        optimizer: the optimizer; neither it nor its state changes.
        group: the group of ``optimizer.param_groups`` that holds ``p``.
        p: a tensor with a gradient.

    Returns:
        The change (0.0 when ``p`` stays bit for bit as it is; of a distributed tensor, that of this rank's part), or
        None when the optimizer's step cannot run on one tensor alone (L-BFGS needs a closure, for instance).
    """
    twin = p.detach().clone()
    twin.grad = None if p.grad is None else p.grad.detach().clone()
    # Not copy.copy: Optimizer.__getstate__ drops the attributes that subclasses keep. Hooks stay behind, and so does
    # the wrapper around step that a learning-rate scheduler leaves on the instance.
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update(vars(optimizer))
    shadow.__dict__.pop("step", None)
    shadow.__dict__["_optimizer_step_pre_hooks"] = OrderedDict()
    shadow.__dict__["_optimizer_step_post_hooks"] = OrderedDict()
    shadow.param_groups = [{**{k: _clone(v) for k, v in group.items() if k != "params"}, "params": [twin]}]
    state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
    if p in optimizer.state:
        state[twin] = {k: _clone(v) for k, v in optimizer.state[p].items()}
    shadow.state = state
    try:
        type(optimizer).step(shadow)
    except Exception:  # an optimizer of any make, on a copy: whatever it raises means only that it cannot be asked
        return None
    if same_bits(twin, p):
        return 0.0
    return float((local(twin) - local(p.detach())).abs().max())


def remembers(state: dict[str, Any]) -> bool:
    """Whether an optimizer's state of one tensor holds momentum, which moves the tensor at zero gradient."""
    return any(isinstance(v := state.get(k), torch.Tensor) and any_nonzero(v) for k in ("momentum_buffer", "exp_avg"))
