"""Stock and enabled calls of the same function, and what they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import freezekit as fk

AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta")


def tables() -> dict[str, str]:
    """The dispatch tables of every operator that has a stand-in."""
    return {name: torch._C._dispatch_dump_table(f"aten::{name}") for name in fk._C.enable.operators()}


def first(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    return results[0] if isinstance(results, tuple) else results


def gradients(call: Callable[..., Any], *inputs: Tensor) -> list[Tensor | None]:
    """The first result of call(*inputs), and the gradients of the leaves among them that require one."""
    torch.manual_seed(0)
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    y = first(call(*leaves))
    seed = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=seed).to(y.dtype)
    wanted = [x for x in leaves if x.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy, allow_unused=True)]


def tolerance(stock: Tensor) -> dict[str, Any]:
    """Sums in another order differ by roundings of their terms, which may be as large as the largest result."""
    if not (stock.dtype.is_floating_point or stock.dtype.is_complex) or not stock.numel():
        return dict(rtol=0, atol=0)
    eps = torch.finfo(stock.dtype).eps
    largest = stock.abs().nan_to_num(0, 0, 0).max().item()
    return dict(rtol=16 * eps, atol=eps * max(64.0, largest), equal_nan=True)
