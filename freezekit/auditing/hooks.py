"""Hooks that set part of a gradient to zero, in place of freezing it: told by what they do to one without zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from freezekit._twin import all_kept

from .report import Finding, about
from .steps import moved_at_zero
from .subject import Subject

# How often hooks are called. What a hook sets to zero for another reason than a mask (a threshold, dropout, all but the
# largest few) depends on the values or on chance, and is not the same each time.
_CALLS = 8


def _on_gradient(p: Tensor) -> list[Any]:
    return list((p._backward_hooks or {}).values())


def _once_accumulated(p: Tensor) -> list[Any]:
    return list((p._post_accumulate_grad_hooks or {}).values())


def _before_steps(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What runs before its step, freezekit's own hooks aside."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()  # what wraps one may lack it
    return [hook for hook in hooks if not (getattr(hook, "__module__", None) or "").startswith("freezekit.")]


def _gradients(p: Tensor) -> Iterator[Tensor]:
    """Gradients without zeros: each element is positive and negative, and among the largest and the smallest."""
    generator = torch.Generator().manual_seed(0)
    shape = (*p.shape, 2) if p.is_complex() else p.shape
    while True:
        sizes = torch.rand(shape, generator=generator) + 0.1
        signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
        for one in (sizes * signs, -sizes * signs, (1.2 - sizes) * signs, (sizes - 1.2) * signs):
            yield torch.empty_like(p).copy_(torch.view_as_complex(one) if p.is_complex() else one)


class Masks:
    """What hooks set to zero of gradients, whatever their values are.

    Hooks are called as a backward pass and a step call them, on gradients made for it, and what they write to is put
    back. Those of processes that work together are not: they may wait for each other.

    Attributes:
        zeros: ``id`` of a parameter -> which elements of its gradient are set to zero.
        skipped: hooks that were not called, or failed -> why.
    """

    def __init__(self, subject: Subject) -> None:
        self.zeros: dict[int, Tensor] = {}
        self.skipped: dict[str, str] = {}
        members = {id(p): (name, optimizer, p) for optimizer, _, name, p in subject.members() if _has_gradients(p)}
        self._left = {
            key: (name, p)
            for key, (name, optimizer, p) in members.items()
            if _before_steps(optimizer) or _on_gradient(p) or _once_accumulated(p)
        }
        if not self._left:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._skip(list(self._left), "they may wait for other processes")
            return
        self._optimizers = [optimizer for optimizer in subject.optimizers if _before_steps(optimizer)]
        params = [p for _, p in self._left.values()]
        hooks = [hook for p in params for hook in (*_on_gradient(p), *_once_accumulated(p))]
        hooks += [hook for optimizer in self._optimizers for hook in _before_steps(optimizer)]
        before = [p.grad for p in params]
        with all_kept([*hooks, *subject.optimizers], {p.device for p in params}), torch.no_grad():
            try:
                self._run()
            finally:
                for p, grad in zip(params, before):
                    p.grad = grad

    def _run(self) -> None:
        given = {key: _gradients(p) for key, (_, p) in self._left.items()}
        for call in range(_CALLS):
            for key, (_, p) in list(self._left.items()):
                try:
                    _accumulate(p, next(given[key]))
                except Exception as error:  # whatever a hook raises
                    self._skip([key], f"one raised {type(error).__name__}: {error}")
            for optimizer in self._optimizers:
                try:
                    for hook in _before_steps(optimizer):
                        hook(optimizer, (), {})
                except Exception as error:  # as above
                    self._skip(list(self._left), f"one raised {type(error).__name__}: {error}")
            for key, (_, p) in list(self._left.items()):
                zeros = _zeros_of(p)
                if zeros is None or (call and not torch.equal(zeros, self.zeros[key])):
                    self.zeros.pop(key, None)
                    del self._left[key]
                else:
                    self.zeros[key] = zeros
            if not self._left:
                return

    def _skip(self, keys: list[int], why: str) -> None:
        names = [self._left.pop(key)[0] for key in keys]
        for key in keys:
            self.zeros.pop(key, None)
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.skipped[f"what hooks do to the gradient of {names[0]}{more}"] = why


def _has_gradients(p: nn.Parameter) -> bool:
    """Whether it learns, and its values are all of this process and of one dense tensor."""
    dense = p.layout is torch.strided and not (p.is_meta or is_lazy(p) or is_traceable_wrapper_subclass(p))
    return p.requires_grad and dense and p.numel() > 0


def _accumulate(p: nn.Parameter, grad: Tensor) -> None:
    """Sets ``p.grad`` as a backward pass does, hooks included."""
    for hook in _on_gradient(p):
        made = hook(grad)
        grad = grad if made is None else made
    p.grad = grad
    for hook in _once_accumulated(p):
        hook(p)


def _zeros_of(p: nn.Parameter) -> Tensor | None:
    """Which elements of ``p.grad`` are zero; None for none, and where there is no such gradient any more."""
    grad = p.grad
    if grad is None or grad.layout is not torch.strided:
        return None
    zeros = grad == 0
    return zeros if bool(zeros.any()) else None


def check_masked(subject: Subject, masks: Masks) -> Iterator[Finding]:
    """Parameters whose gradient a hook masks, in part or as a whole: momentum and decay move them all the same."""
    found = []
    for optimizer, i, name, p in subject.members():
        zeros, group = masks.zeros.get(id(p)), optimizer.param_groups[i]
        if zeros is not None and name not in found:
            moved = moved_at_zero(optimizer, group, p)
            if bool(group.get("weight_decay")) if moved is None else bool((moved & zeros).any()):
                found.append(name)
    if found:
        yield about(
            found,
            "masked-gradient",
            "warning",
            f"{len(found)} parameter(s) have a hook, of their own or before the step, that sets some or all of their "
            "gradient to zero, and their optimizer moves such elements, by decay or momentum: they are not frozen",
            "freeze part of a tensor by a parametrization (see docs/two_step.md), or set weight_decay=0 and momentum=0",
        )
