"""Pools and pads that keep a byte per output element, or sizes alone."""

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from freezekit import _C, functional

_quick = _C.quick.avg_pool2d


class _MaxPool(nn.modules.pooling._MaxPoolNd):
    def _pool(self, function: Any, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        settings = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices)
        return function(input, *settings)


class MaxPool1d(_MaxPool, nn.MaxPool1d):
    """An `nn.MaxPool1d` that keeps one byte per output element (two for windows over 256) instead of input and indices.

    >>> import torch, freezekit as fk
    >>> fk.nn.MaxPool1d(2)(torch.arange(4.0).view(1, 1, 4))
    tensor([[[1., 3.]]])
    """

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self._pool(functional.max_pool1d, input)


class MaxPool2d(_MaxPool, nn.MaxPool2d):
    """An `nn.MaxPool2d` that keeps one byte per output element (two for windows over 256) instead of input and indices.

    >>> import torch, freezekit as fk
    >>> fk.nn.MaxPool2d(2)(torch.arange(4.0).view(1, 1, 2, 2))
    tensor([[[[3.]]]])
    """

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self._pool(functional.max_pool2d, input)


class MaxPool3d(_MaxPool, nn.MaxPool3d):
    """An `nn.MaxPool3d` that keeps one byte per output element (two for windows over 256) instead of input and indices.

    >>> import torch, freezekit as fk
    >>> fk.nn.MaxPool3d(2)(torch.arange(8.0).view(1, 1, 2, 2, 2)).item()
    7.0
    """

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self._pool(functional.max_pool3d, input)


class AvgPool1d(nn.AvgPool1d):
    """An `nn.AvgPool1d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.AvgPool1d(2)(torch.tensor([[[1.0, 3.0]]]))
    tensor([[[2.]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        settings = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        return functional.avg_pool1d(input, *settings)


class AvgPool2d(nn.AvgPool2d):
    """An `nn.AvgPool2d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.AvgPool2d(2)(torch.ones(1, 1, 2, 2))
    tensor([[[[1.]]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        stride, divisor = self.stride, self.divisor_override
        # functional.avg_pool2d asks this first, too; the way there takes more than a hundredth of a small pool's step.
        if not is_dynamo_compiling():
            y = _quick(input, self.kernel_size, stride, self.padding, self.ceil_mode, self.count_include_pad, divisor)
            if y is not None:
                return y
        settings = (self.kernel_size, stride, self.padding, self.ceil_mode, self.count_include_pad, divisor)
        return functional.avg_pool2d(input, *settings)


class AvgPool3d(nn.AvgPool3d):
    """An `nn.AvgPool3d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.AvgPool3d(2)(torch.ones(1, 1, 2, 2, 2))
    tensor([[[[[1.]]]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        settings = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        return functional.avg_pool3d(input, *settings, self.divisor_override)


class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """An `nn.AdaptiveAvgPool1d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.AdaptiveAvgPool1d(1)(torch.tensor([[[1.0, 3.0]]]))
    tensor([[[2.]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """An `nn.AdaptiveAvgPool2d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.AdaptiveAvgPool2d((2, None))(torch.ones(1, 1, 4, 3)).shape
    torch.Size([1, 1, 2, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """An `nn.AdaptiveAvgPool3d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.AdaptiveAvgPool3d(2)(torch.ones(1, 1, 4, 4, 4)).shape
    torch.Size([1, 1, 2, 2, 2])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool3d(input, self.output_size)


class _ReflectionPad(nn.modules.padding._ReflectionPadNd):
    def forward(self, input: Tensor) -> Tensor:
        return functional.pad(input, self.padding, "reflect")


class ReflectionPad1d(_ReflectionPad, nn.ReflectionPad1d):
    """An `nn.ReflectionPad1d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.ReflectionPad1d(1)(torch.tensor([[[1.0, 2.0, 3.0]]]))
    tensor([[[2., 1., 2., 3., 2.]]])
    """


class ReflectionPad2d(_ReflectionPad, nn.ReflectionPad2d):
    """An `nn.ReflectionPad2d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.ReflectionPad2d(1)(torch.ones(1, 1, 4, 4)).shape
    torch.Size([1, 1, 6, 6])
    """


class ReflectionPad3d(_ReflectionPad, nn.ReflectionPad3d):
    """An `nn.ReflectionPad3d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.ReflectionPad3d(1)(torch.ones(1, 1, 4, 4, 4)).shape
    torch.Size([1, 1, 6, 6, 6])
    """


class _ReplicationPad(nn.modules.padding._ReplicationPadNd):
    def forward(self, input: Tensor) -> Tensor:
        return functional.pad(input, self.padding, "replicate")


class ReplicationPad1d(_ReplicationPad, nn.ReplicationPad1d):
    """An `nn.ReplicationPad1d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.ReplicationPad1d(1)(torch.tensor([[[1.0, 2.0]]]))
    tensor([[[1., 1., 2., 2.]]])
    """


class ReplicationPad2d(_ReplicationPad, nn.ReplicationPad2d):
    """An `nn.ReplicationPad2d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.ReplicationPad2d(1)(torch.ones(1, 1, 4, 4)).shape
    torch.Size([1, 1, 6, 6])
    """


class ReplicationPad3d(_ReplicationPad, nn.ReplicationPad3d):
    """An `nn.ReplicationPad3d` that keeps sizes instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.ReplicationPad3d(1)(torch.ones(1, 1, 4, 4, 4)).shape
    torch.Size([1, 1, 6, 6, 6])
    """
