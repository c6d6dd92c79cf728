"""Convolutions of one and three dimensions, and transposed ones, for layers that are frozen now, sometimes or never."""

from typing import Any

from torch import Tensor, fx, nn

from freezekit import functional
from freezekit.nn._tracers import as_leaf
from freezekit.nn.conv2d import padded


class FreezableConv1d(nn.Conv1d):
    """An `nn.Conv1d` that, while its weight is frozen, keeps no input and runs no wgrad.

    >>> import torch, freezekit as fk
    >>> fk.nn.FreezableConv1d(3, 8, 3, padding="same")(torch.ones(2, 3, 9)).shape
    torch.Size([2, 8, 9])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = padded(self, input)
        return functional.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class FreezableConv3d(nn.Conv3d):
    """An `nn.Conv3d` that, while its weight is frozen, keeps no input and runs no wgrad.

    >>> import torch, freezekit as fk
    >>> fk.nn.FreezableConv3d(3, 8, 3)(torch.ones(2, 3, 4, 5, 6)).shape
    torch.Size([2, 8, 2, 3, 4])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = padded(self, input)
        return functional.conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class _FreezableConvTranspose(nn.modules.conv._ConvTransposeNd):
    def _transposed(self, function: Any, axes: int, input: Tensor, output_size: list[int] | None) -> Tensor:
        if isinstance(input, fx.Proxy) and (leaf := as_leaf(self, input, output_size)) is not None:
            return leaf
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for ConvTranspose{axes}d")
        more = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            axes,
            self.dilation,  # type: ignore[arg-type]
        )
        return function(input, self.weight, self.bias, self.stride, self.padding, more, self.groups, self.dilation)


class FreezableConvTranspose1d(_FreezableConvTranspose, nn.ConvTranspose1d):
    """An `nn.ConvTranspose1d` that, while its weight is frozen, keeps no input and runs no wgrad.

    >>> import torch, freezekit as fk
    >>> fk.nn.FreezableConvTranspose1d(3, 8, 2, stride=2)(torch.ones(2, 3, 4)).shape
    torch.Size([2, 8, 8])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self._transposed(functional.conv_transpose1d, 1, input, output_size)


class FreezableConvTranspose2d(_FreezableConvTranspose, nn.ConvTranspose2d):
    """An `nn.ConvTranspose2d` that, while its weight is frozen, keeps no input and runs no wgrad.

    >>> import torch, freezekit as fk
    >>> fk.nn.FreezableConvTranspose2d(3, 8, 2, stride=2)(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 8, 8, 8])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self._transposed(functional.conv_transpose2d, 2, input, output_size)


class FreezableConvTranspose3d(_FreezableConvTranspose, nn.ConvTranspose3d):
    """An `nn.ConvTranspose3d` that, while its weight is frozen, keeps no input and runs no wgrad.

    >>> import torch, freezekit as fk
    >>> fk.nn.FreezableConvTranspose3d(3, 8, 2)(torch.ones(2, 3, 4, 4, 4)).shape
    torch.Size([2, 8, 5, 5, 5])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self._transposed(functional.conv_transpose3d, 3, input, output_size)
