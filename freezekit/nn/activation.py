"""Activations and dropout that keep one bit per element; smooth ones, which behind a norm keep nothing."""

from torch import Tensor, fx, nn
from torch.compiler import is_dynamo_compiling

from freezekit import _C, functional
from freezekit.nn._tracers import as_leaf

_quick = _C.quick.gelu


class ReLU(nn.ReLU):
    """An `nn.ReLU` that keeps one bit per element instead of its output. In place where asked.

    >>> import torch, freezekit as fk
    >>> fk.nn.ReLU(inplace=True)(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, self.inplace)


class ReLU6(nn.ReLU6):
    """An `nn.ReLU6` that keeps one bit per element instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.ReLU6()(torch.tensor([-1.0, 2.0, 7.0]))
    tensor([0., 2., 6.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardtanh(input, self.min_val, self.max_val, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """An `nn.LeakyReLU` that keeps one bit per element instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.LeakyReLU(0.5)(torch.tensor([-1.0, 2.0]))
    tensor([-0.5000,  2.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class PReLU(nn.PReLU):
    """An `nn.PReLU` that, while its slope is frozen, keeps one bit per element instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.PReLU(init=0.5).requires_grad_(False)(torch.tensor([-1.0, 2.0]))
    tensor([-0.5000,  2.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.prelu(input, self.weight)


class Hardtanh(nn.Hardtanh):
    """An `nn.Hardtanh` that keeps one bit per element instead of its input.

    >>> import torch, freezekit as fk
    >>> fk.nn.Hardtanh(-1.0, 3.0)(torch.tensor([-2.0, 2.0, 7.0]))
    tensor([-1.,  2.,  3.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardtanh(input, self.min_val, self.max_val, self.inplace)


class Dropout(nn.Dropout):
    """An `nn.Dropout` that keeps one bit per element instead of a mask of the input's dtype.

    The same seed drops the same elements as `nn.Dropout`.

    >>> import torch, freezekit as fk
    >>> x = torch.ones(3)
    >>> fk.nn.Dropout().eval()(x) is x
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy) and (leaf := as_leaf(self, input)) is not None:
            return leaf
        return functional.dropout(input, self.p, self.training, self.inplace)


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
        # functional.gelu takes the formula by name, and so not the quick way.
        if not is_dynamo_compiling():
            y = _quick(input, self.approximate)
            if y is not None:
                return y
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
