"""Hooks that set part of a gradient to zero, in place of freezing it. They are looked at and never run."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from freezekit._twin.surroundings import content_of, names_of

from .report import Finding, about
from .steps import moved_at_zero
from .subject import Subject


def _function_of(hook: Any) -> FunctionType | None:
    """What runs when a hook is called; None where it is not written in Python."""
    if isinstance(hook, partial):
        return _function_of(hook.func)
    if isinstance(hook, nn.Module):
        return _function_of(hook.forward)
    if isinstance(hook, MethodType):
        hook = hook.__func__
    elif not isinstance(hook, FunctionType):
        hook = type(hook).__call__
    return hook if isinstance(hook, FunctionType) else None


def _held_by(hook: Any) -> Iterator[Any]:
    """What a hook was given, is bound to and names, with the attributes of these that it names; and what lists hold."""
    function = _function_of(hook)
    held: list[Any] = []
    while isinstance(hook, partial):
        held += (*hook.args, *hook.keywords.values())
        hook = hook.func
    held.append(hook.__self__ if isinstance(hook, MethodType | BuiltinMethodType) else hook)
    if function is not None:
        held += names_of(function).values()
        for value in held[:]:
            buffers = value._buffers if isinstance(value, nn.Module) else {}
            attributes = {**vars(value), **buffers} if type(value).__dictoffset__ else {}
            held += [attributes[name] for name in function.__code__.co_names if name in attributes]
    for value in held:
        if isinstance(value, dict):
            yield from (part for _, part in content_of(value))
        elif isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _mask_of(value: Any, p: Tensor) -> Tensor | None:
    """A tensor of zeros and ones in a form that fits a gradient of ``p``: a vector is one along an axis, else None."""
    if not isinstance(value, Tensor) or value.requires_grad or value.layout is not torch.strided or value.is_meta:
        return None
    fits = value.dim() <= p.dim() and all(n in (1, of_p) for n, of_p in zip(reversed(value.shape), reversed(p.shape)))
    if not fits:
        if value.dim() != 1 or value.numel() not in p.shape:
            return None
        value = value.view(-1, *(1 for _ in p.shape[p.shape.index(value.numel()) + 1 :]))  # as the hook gives it axes
    zeros, ones = int((value == 0).sum()), int((value == 1).sum())
    return value if min(zeros, ones) > 0 and zeros + ones == value.numel() else None


# By which part of a tensor is set to a value.
_FILLS = {"fill_", "zero_", "where", *(f"{kind}{end}" for kind in ("index_fill", "masked_fill") for end in ("", "_"))}


def _writes_to_part(hook: Any) -> bool:
    """Whether a hook assigns to a subscript, as of ``gradient[:2] = 0``, or names a function that fills part of one."""
    function = _function_of(hook)
    if function is None:
        return hook in (torch.where, torch.index_fill, torch.masked_fill)
    steps = dis.get_instructions(function)
    return any(step.opname in ("STORE_SUBSCR", "STORE_SLICE") or step.argval in _FILLS for step in steps)


def _masked_parts(optimizer: torch.optim.Optimizer, p: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """What hooks seem to mask of ``p``: of a mask, both of its sides, since either may be the one that is held."""
    if is_traceable_wrapper_subclass(p):  # a distributed tensor: to look at its values is to talk to other processes
        return
    own = [*(p._backward_hooks or {}).values(), *(p._post_accumulate_grad_hooks or {}).values()]
    every = [*own, *getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()]  # what wraps one may lack it
    for value in (value for hook in every for value in _held_by(hook)):
        mask = _mask_of(value, p)
        if mask is not None:
            yield mask == 0, mask != 0
    grad = p.grad
    if grad is not None and grad.layout is torch.strided and any(map(_writes_to_part, own)) and grad.any():
        yield (grad == 0,)


def _is_moved(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: Tensor) -> bool:
    """Whether the optimizer moves what hooks mask of ``p``."""
    parts = list(_masked_parts(optimizer, p))
    if not parts:
        return False
    moved = moved_at_zero(optimizer, group, p)
    if moved is None:
        return bool(group.get("weight_decay"))
    return any(all(bool((moved & side).any()) for side in sides) for sides in parts)


def check_masked(subject: Subject) -> Iterator[Finding]:
    """Parameters whose gradient a hook masks: momentum and decay move the masked part all the same.

    A hook that clips, scales or logs holds no mask. What a module's backward hook does to a gradient is not seen.
    """
    found = [
        name
        for optimizer, i, name, p in subject.members()
        if p.requires_grad and _is_moved(optimizer, optimizer.param_groups[i], p)
    ]
    if found:
        yield about(
            found,
            "masked-gradient",
            "warning",
            f"{len(found)} parameter(s) have a hook that seems to set part of their gradient to zero (it holds a mask "
            "of zeros and ones, or writes to part of a gradient that has zeros), and their optimizer moves such "
            "elements, by weight decay or momentum: they are not frozen",
            "freeze part of a tensor by a parametrization (see docs/two_step.md), or set weight_decay=0 and momentum=0",
        )
