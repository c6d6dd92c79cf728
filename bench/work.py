"""The least that the mathematics of a step needs: arithmetic, and bytes read and written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Work:
    """Floating point operations, and bytes of traffic."""

    flops: float
    traffic: float


def count(step: Callable[[], object]) -> Work:
    """The work of a stock network's step: that of its convolutions and matrix products.

    Each product moves each of its tensors once. What is between them (norms, activations, additions) counts nothing: it
    can be fused, so a lower bound must leave it out. Transposed convolutions are not expected.
    """
    counter = _Counter()
    with counter:
        step()
    return Work(counter.flops, counter.traffic)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.traffic = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            dy, x, w, (dgrad, wgrad, _) = args[0], args[1], args[2], args[-1]
            # torch's own count of a wgrad ignores groups. Each gradient reads two of the three and writes one with the
            # shape of the third.
            self.flops += (dgrad + wgrad) * 2 * dy.numel() * w[0].numel()
            self.traffic += (dgrad + wgrad) * _bytes((dy, x, w))
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.traffic += _bytes((args, result))
        return result


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor))
