"""What would the next ``optimizer.step()`` do to a frozen tensor? Asked of the optimizer itself, on copies.

A rule such as "momentum and zero gradients move" would have to be written for every optimizer and every option. So a
copy of the frozen tensor, its gradient and its state goes through the optimizer's own ``step``, and is compared. Only
where the step cannot reach anything but copies; other optimizers are looked at.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import optimizer as optim

from freezekit._twin.surroundings import Surroundings
from freezekit.freezing.bits import local, same_bits
from freezekit.freezing.held import copied
from freezekit.freezing.optim import ATTRIBUTE


def why_not_stepped(optimizer: torch.optim.Optimizer) -> str:
    """Why a copy of this optimizer may reach real tensors, so that it is looked at and not stepped; "" if none can.

    What ``step`` works on are groups and state, which are copied. An optimizer that keeps tensors, other optimizers or
    objects of any class in attributes of its own may work on those too.
    """
    for name, value in vars(optimizer).items():
        if not _is_replaced(name) and name != "defaults" and not _is_plain(value):
            return f"{type(optimizer).__name__} keeps a {type(value).__name__} of its own ({name})"
    return ""


def foreign_hooks(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What runs before and after its step, freezekit's own hooks aside."""
    own = [getattr(optimizer, name, {}) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")]
    hooks = (*own, optim._global_optimizer_pre_hooks, optim._global_optimizer_post_hooks)
    return [hook for each in hooks for hook in not_ours(each)]


def not_ours(hooks: dict[int, Any]) -> list[Any]:
    """Hooks that others registered."""
    return [hook for hook in hooks.values() if not (getattr(hook, "__module__", None) or "").startswith("freezekit.")]


def steps_what_has_no_gradient(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step may move a parameter without a gradient, and can be asked; all of torch's own skip those."""
    own = type(optimizer).step.__module__.startswith("torch.optim.")
    return not own and not why_not_stepped(optimizer)


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type, type(None))


def _is_replaced(name: str) -> bool:
    """Whether a copy gets a new value for this attribute, or none: hooks, and freezekit's own notes."""
    return name in ("param_groups", "state", "step", ATTRIBUTE) or name.startswith("_optimizer_")


def _is_plain(value: object) -> bool:
    """Whether a tensor cannot be reached through ``value``."""
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def step_of_copy(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], p: torch.Tensor, grad: torch.Tensor | None
) -> torch.Tensor | None:
    """``p`` after one step of a copy of the optimizer on a copy of ``p`` whose gradient is ``grad``.

    Args:
        optimizer: the optimizer; neither it nor its state changes.
        group: the group of ``optimizer.param_groups`` that holds ``p``.

    Returns:
        The stepped copy, or None when the optimizer cannot be asked: a copy is not safe (`why_not_stepped`), or its
        step cannot run on one tensor alone (L-BFGS needs a closure, for instance).
    """
    if why_not_stepped(optimizer):
        return None
    twin = p.detach().clone()
    twin.grad = None if grad is None else grad.detach().clone()
    # Not copy.copy: Optimizer.__getstate__ drops the attributes that subclasses keep. Hooks stay behind, and so does
    # the wrapper around step that a learning-rate scheduler leaves on the instance.
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update({name: copy.deepcopy(v) for name, v in vars(optimizer).items() if not _is_replaced(name)})
    shadow.__dict__["_optimizer_step_pre_hooks"] = OrderedDict()
    shadow.__dict__["_optimizer_step_post_hooks"] = OrderedDict()
    twins = {id(p): twin}  # which an option of the group may hold as well
    shadow.param_groups = [{**{k: copied(v, twins) for k, v in group.items() if k != "params"}, "params": [twin]}]
    state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
    if p in optimizer.state:
        state[twin] = {k: copied(v, twins) for k, v in optimizer.state[p].items()}
    shadow.state = state
    # What is its own copy may be written to, and so may attributes of the class.
    held = [value for value in optimizer.state.get(p, {}).values() if not isinstance(value, torch.Tensor)]
    surroundings = Surroundings([type(optimizer), *held], data=True)
    try:
        with _no_hooks_of_all():
            type(optimizer).step(shadow)
    except Exception:  # an optimizer of any make, on a copy: whatever it raises means only that it cannot be asked
        return None
    finally:
        surroundings.put_back()
    return twin


@contextmanager
def _no_hooks_of_all() -> Iterator[None]:
    """Disables hooks on all optimizers, so that what counts or logs steps does not see this one."""
    hooks: tuple[dict[int, Any], ...] = (optim._global_optimizer_pre_hooks, optim._global_optimizer_post_hooks)
    saved = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, content in zip(hooks, saved):
            each.update(content)


def would_move(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: torch.Tensor) -> float | None:
    """Largest absolute change that the next step would make to ``p``, found by stepping a copy of it.

    Returns:
        The change (0.0 when ``p`` stays bit for bit as it is; of a distributed tensor, that of this rank's part), or
        None when the optimizer cannot be asked; see `step_of_copy`.
    """
    twin = step_of_copy(optimizer, group, p, p.grad)
    if twin is None:
        return None
    return 0.0 if same_bits(twin, p) else float((local(twin) - local(p.detach())).abs().max())


def moved_at_zero(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: torch.Tensor) -> torch.Tensor | None:
    """Which elements of ``p`` a step moves where all of its gradient is zero: by momentum or decay. None: unknown."""
    twin = step_of_copy(optimizer, group, p, torch.zeros_like(p))
    return None if twin is None else twin != p.detach()
