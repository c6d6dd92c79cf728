"""Results that are kept in a larger storage than they fill, most since a CPU's kernels resize what they had allocated.

Without data torch allocates what the result fills. A sweep over torch's own samples of operators found these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def store(operator: Any, args: Any, result: Any) -> None:
    """Gives results without data the storages that they have on a CPU."""
    if operator not in _ELEMENTS or not (operator in _WINDOWS or args[0].device.type == "cpu"):
        return
    for tensor, elements in _ELEMENTS[operator](args, result):
        storage, size = tensor.untyped_storage(), elements * tensor.element_size()
        if tensor.numel() and storage.nbytes() < size:
            storage.resize_(size)


def _blocks(args: Any, result: Tensor) -> list[tuple[Tensor, int]]:
    """A sum of blocks is made in what was allocated for the blocks."""
    return [(result, args[0].numel())]


def _losses(args: Any, result: Tensor) -> list[tuple[Tensor, int]]:
    """A mean or a sum of losses is made in what was allocated for the losses."""
    return [(result, torch.broadcast_shapes(args[0].shape, args[1].shape).numel())]


def _scattered(args: Any, result: Tensor) -> list[tuple[Tensor, int]]:
    """What is written to is the copy of a whole storage, where the copy has the strides of its original."""
    x = args[0]
    return [(result, x.untyped_storage().nbytes() // x.element_size())] if result.stride() == x.stride() else []


def _bags(args: Any, result: tuple[Tensor, ...]) -> list[tuple[Tensor, int]]:
    """The bag of each index has room for one more, and the sizes of bags for each offset, the last included."""
    _, indices, offsets, *_ = args
    return [(result[1], indices.numel() + 1), (result[2], offsets.numel())]


def _window(args: Any, result: Tensor) -> list[tuple[Tensor, int]]:
    """A periodic window is one longer, without its last value; a cache of torch's forgets that."""
    periodic = next((arg for arg in args if isinstance(arg, bool)), True)
    return [(result, args[0] + 1)] if periodic and args[0] > 1 else []


_WINDOWS = (aten.bartlett_window, aten.blackman_window, aten.hamming_window, aten.hann_window, aten.kaiser_window)
_ELEMENTS: dict[Any, Callable[[Any, Any], list[tuple[Tensor, int]]]] = {
    aten.col2im: _blocks,
    aten.mse_loss: _losses,
    aten.smooth_l1_loss: _losses,
    aten.soft_margin_loss: _losses,
    aten.binary_cross_entropy: _losses,
    aten.select_scatter: _scattered,
    aten.slice_scatter: _scattered,
    aten.diagonal_scatter: _scattered,
    aten._embedding_bag: _bags,
    aten._embedding_bag_forward_only: _bags,
    **dict.fromkeys(_WINDOWS, _window),
}
