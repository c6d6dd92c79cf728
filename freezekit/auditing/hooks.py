"""Hooks that set part of a gradient to zero, in place of freezing it: told by what they do to one without zeros."""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from freezekit._arguments import brief
from freezekit._twin import all_kept

from .report import Finding, about
from .steps import moved_at_zero, not_ours
from .subject import Subject

# How often hooks are called. What a hook sets to zero for another reason than a mask (a threshold, dropout, all but the
# largest few) depends on the values or on chance, and is not the same each time. On few elements chance may repeat.
_CALLS, _CALLS_OF_MANY, _MANY = 8, 4, 64
# So many random numbers are drawn; larger gradients repeat them. A prime, so that no two rows are alike.
_DRAWN = 65521


def _own_hooks(p: Tensor) -> list[dict[int, Any]]:
    """Those on its gradient, and on itself once that is accumulated."""
    return [hooks for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks) if hooks]


def _before_steps(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What runs before its step, freezekit's own hooks aside."""
    return not_ours(getattr(optimizer, "_optimizer_step_pre_hooks", {}))  # what wraps one may lack it


def _gradients(p: Tensor) -> Iterator[Tensor]:
    """Gradients without zeros: in each four, elements are positive and negative, among the largest and the smallest."""
    generator = torch.Generator().manual_seed(0)
    shape = (*p.shape, 2) if p.is_complex() else p.shape
    count = math.prod(shape)
    drawn = min(count, _DRAWN)
    while True:
        sizes = torch.rand(drawn, generator=generator, device="cpu") + 0.1
        signs = torch.randint(0, 2, (drawn,), generator=generator, device="cpu") * 2.0 - 1
        for some in (sizes * signs, sizes * -signs, (1.2 - sizes) * signs, (1.2 - sizes) * -signs):
            one = some.repeat(-(-count // drawn))[:count].view(shape)
            yield torch.empty_like(p).copy_(torch.view_as_complex(one) if p.is_complex() else one)


class Masks:
    """What hooks set to zero of gradients, whatever their values are.

    Backward passes of nothing but a parameter call its hooks, with gradients made for it; those before a step are
    called behind them. What they write to is put back. Processes that work together call none: one may wait for the
    others.

    Attributes:
        zeros: ``id`` of a parameter -> which elements of its gradient are set to zero.
        skipped: hooks that were not called, or failed -> why.
    """

    def __init__(self, subject: Subject) -> None:
        self.zeros: dict[int, Tensor] = {}
        self._failed: dict[str, list[str]] = defaultdict(list)
        self._optimizers = [optimizer for optimizer in subject.optimizers if _before_steps(optimizer)]
        members = {id(p): (name, optimizer, p) for optimizer, _, name, p in subject.members() if _has_gradients(p)}
        self._names = {
            key: name for key, (name, optimizer, p) in members.items() if _before_steps(optimizer) or _own_hooks(p)
        }
        params = [members[key][2] for key in self._names]
        if params and torch.distributed.is_available() and torch.distributed.is_initialized():
            self._skip(params, "they may wait for other processes")
            return
        if not params:
            return
        own = [hooks for p in params for hooks in _own_hooks(p)]
        with all_kept([*own, *subject.optimizers], {p.device for p in params}):
            # Those before a step may look at all gradients; else one at a time takes less memory.
            for group in [params] if self._optimizers else [[p] for p in params]:
                self._run(group)

    @property
    def skipped(self) -> dict[str, str]:
        return {f"what hooks do to the gradient of {brief(names)}": why for why, names in self._failed.items()}

    def _run(self, params: list[nn.Parameter]) -> None:
        """Calls the hooks of some parameters, as long as any of them may be masked."""
        before, given = [p.grad for p in params], {id(p): _gradients(p) for p in params}
        try:
            left = params
            for call in range(_CALLS):
                self._call(left, given)
                masked = [p for p in left if self._is_masked(p, first=call == 0)]
                left = [p for p in masked if call + 1 < _CALLS_OF_MANY or p.numel() < _MANY]
                if not left:
                    return
        finally:
            for p, grad in zip(params, before):
                p.grad = grad

    def _call(self, params: list[nn.Parameter], given: dict[int, Iterator[Tensor]]) -> None:
        for p in params:
            p.grad = None
            try:
                torch.autograd.backward([p], [next(given[id(p)])])
            except Exception as error:  # whatever a hook raises
                p.grad = None
                self._skip([p], f"one raised {type(error).__name__}: {error}")
        for optimizer in self._optimizers:
            try:
                for hook in _before_steps(optimizer):
                    hook(optimizer, (), {})
            except Exception as error:  # as above
                self._skip(params, f"one before a step raised {type(error).__name__}: {error}")
                for p in params:
                    p.grad = None

    def _is_masked(self, p: nn.Parameter, *, first: bool) -> bool:
        """Whether hooks set the same elements to zero as ever."""
        grad, known = p.grad, self.zeros.pop(id(p), None)
        if grad is None or grad.layout is not torch.strided:
            return False
        zeros = grad == 0
        if bool(zeros.any()) and (first or (known is not None and torch.equal(zeros, known))):
            self.zeros[id(p)] = zeros
        return id(p) in self.zeros

    def _skip(self, params: list[nn.Parameter], why: str) -> None:
        names = [self._names[id(p)] for p in params]
        self._failed[why] += [name for name in names if name not in self._failed[why]]


def _has_gradients(p: nn.Parameter) -> bool:
    """Whether it learns, and its values are all of this process and of one dense tensor."""
    dense = p.layout is torch.strided and not (p.is_meta or is_lazy(p) or is_traceable_wrapper_subclass(p))
    return p.requires_grad and dense and p.numel() > 0


def check_masked(subject: Subject, masks: Masks) -> Iterator[Finding]:
    """Parameters whose gradient a hook masks, in part or as a whole: momentum and decay move them all the same."""
    found = []
    for optimizer, i, name, p in subject.members():
        zeros, group = masks.zeros.get(id(p)), optimizer.param_groups[i]
        if zeros is not None and name not in found:
            moved = moved_at_zero(optimizer, group, p)
            if bool(group.get("weight_decay")) if moved is None else bool((moved & zeros).any()):
                found.append(name)
    yield from about(
        found,
        "masked-gradient",
        "warning",
        f"{len(found)} parameter(s) have a hook, of their own or before the step, that sets some or all of their "
        "gradient to zero, and their optimizer moves such elements, by decay or momentum: they are not frozen",
        "freeze part of a tensor by a parametrization (see docs/two_step.md), or set weight_decay=0 and momentum=0",
    )
