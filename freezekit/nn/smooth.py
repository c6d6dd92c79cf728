"""Smooth activations, which behind a group or layer norm keep nothing."""

from __future__ import annotations

from torch import Tensor, nn

from freezekit import functional


class SiLU(nn.SiLU):
    """An `nn.SiLU` that keeps nothing behind a freezable group or layer norm, and its input elsewhere.

    >>> import torch, freezekit as fk
    >>> fk.nn.SiLU()(torch.zeros(2))
    tensor([0., 0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, self.inplace)


class GELU(nn.GELU):
    """An `nn.GELU` that keeps nothing behind a freezable group or layer norm, and its input elsewhere.

    >>> import torch, freezekit as fk
    >>> fk.nn.GELU("tanh")(torch.zeros(2))
    tensor([0., 0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, approximate=self.approximate)


class Hardswish(nn.Hardswish):
    """An `nn.Hardswish` that keeps nothing behind a freezable group or layer norm, and its input elsewhere.

    >>> import torch, freezekit as fk
    >>> fk.nn.Hardswish()(torch.tensor([-3.0, 3.0]))
    tensor([-0., 3.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardswish(input, self.inplace)


class Mish(nn.Mish):
    """An `nn.Mish` that keeps nothing behind a freezable group or layer norm, and its input elsewhere.

    >>> import torch, freezekit as fk
    >>> fk.nn.Mish()(torch.zeros(2))
    tensor([0., 0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.mish(input, self.inplace)
