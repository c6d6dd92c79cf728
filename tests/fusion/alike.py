"""A fused model beside the stock one that it was made from: everything that a caller can tell is to be alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from tests.observe import Storages


def tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


def outcome(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """What a call gives, and the gradients of a loss that weighs every element differently."""
    inputs = tree_map(lambda t: t.clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, inputs)
    result = model(*inputs)
    leaves = [t for t in (*tensors(inputs), *model.parameters()) if t.requires_grad]
    outputs = [y for y in tensors(result) if y.requires_grad]
    gradients: tuple[Tensor | None, ...] = ()
    if leaves and outputs:
        weights = [torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype) for y in outputs]
        gradients = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return {
        "values": [y.detach() for y in tensors(result)],
        "structure": tree_flatten(tree_map(lambda v: None if isinstance(v, Tensor) else v, result)),
        "dtypes": [y.dtype for y in tensors(result)],
        "strides": [y.stride() for y in tensors(result)],
        "requires grad": [y.requires_grad for y in tensors(result)],
        "gradients": gradients,
    }


def assert_alike(fused: nn.Module, stock: nn.Module, inputs: Any, tolerance: float = 1e-10) -> None:
    """Holds a fused model against its stock copy on the same inputs."""
    ours, theirs = outcome(fused, inputs), outcome(stock, inputs)
    for name in ("structure", "dtypes", "strides", "requires grad"):
        assert ours[name] == theirs[name], name
    for name in ("values", "gradients"):
        assert len(ours[name]) == len(theirs[name])
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert (mine is None) == (other is None), name
            if mine is not None:
                torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    # A result that stock keeps for backward costs it nothing more; a mask of it is a bit per element.
    bits = sum((y.numel() + 31) // 32 * 4 for y in ours["values"])
    assert kept(fused, inputs) <= kept(stock, inputs) + bits


def kept(model: nn.Module, inputs: Any) -> int:
    """Bytes that nobody but autograd holds after a call, the results aside."""
    with Storages() as storages:
        result = model(*tree_map(lambda t: t * 1 if isinstance(t, Tensor) else t, inputs))
    own = {y.untyped_storage()._cdata: y.untyped_storage().nbytes() for y in tensors(result)}
    return storages.alive - sum(own.values())
