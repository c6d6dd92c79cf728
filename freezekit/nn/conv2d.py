"""`nn.Conv2d` for layers that are frozen now, sometimes or never."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from freezekit import _C, functional

_quick = _C.quick.conv2d


def padded(conv: nn.modules.conv._ConvNd, input: Tensor) -> tuple[Tensor, Any]:
    """`input` with the padding that is not zeros, and the padding that is left to the convolution."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    return functional.pad(input, conv._reversed_padding_repeated_twice, conv.padding_mode), 0


class FreezableConv2d(nn.Conv2d):
    """An `nn.Conv2d` that, while its weight is frozen, keeps no input and runs no wgrad.

    Frozen is `weight.requires_grad == False`, nothing else. Constructor, attributes, state_dict, hooks and errors are
    those of `nn.Conv2d`; input is (N, C, H, W) or (C, H, W). Reflecting and replicating padding modes keep no input
    either.

    >>> import torch, freezekit as fk
    >>> conv = fk.FreezableConv2d(3, 8, 3, padding=1).requires_grad_(False)
    >>> x = torch.randn(2, 3, 16, 16, requires_grad=True)
    >>> conv(x).sum().backward()
    >>> x.grad.shape, conv.weight.grad
    (torch.Size([2, 3, 16, 16]), None)
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = padded(self, input)
        # functional.conv2d asks this first, too; the way there takes more than a hundredth of a small layer's step.
        if not is_dynamo_compiling():
            y = _quick(input, weight, bias, self.stride, padding, self.dilation, self.groups)
            if y is not None:
                return y
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d) -> FreezableConv2d:
        """A layer that shares parameters, hooks and settings with `conv`, which stays as it is.

        Args:
            conv: an `nn.Conv2d`, not of a subclass: a subclass's own behaviour would be lost.

        Raises:
            TypeError: if `conv` is anything else.

        >>> from torch import nn
        >>> stock = nn.Conv2d(3, 8, 3)
        >>> FreezableConv2d.from_conv2d(stock).weight is stock.weight
        True
        """
        if type(conv) is not nn.Conv2d:
            raise TypeError(f"conv must be exactly an nn.Conv2d, got {type(conv).__name__}")
        layer = cls.__new__(cls)
        # One level deep: parameters and hooks are shared, the dictionaries that hold them are not.
        layer.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in conv.__dict__.items()})
        return layer
