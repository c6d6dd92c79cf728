"""Normalisation layers that keep what their gradients read.

Whether a batch norm normalises by its running statistics is its `training` flag, as in torch. `freezekit.freeze` holds
that flag (see `freezekit.freezing.is_held`), so a frozen layer goes on using its statistics after `model.train()`.
"""

from torch import Tensor, fx, nn

from freezekit import functional
from freezekit.nn._tracers import as_leaf


class _FreezableBatchNorm(nn.modules.batchnorm._BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy) and (leaf := as_leaf(self, input)) is not None:
            return leaf
        if self.training or self.running_mean is None or self.running_var is None:
            return super().forward(input)  # batch statistics: the formula reads the input
        self._check_input_dim(input)
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        return functional.batch_norm(input, *tensors, False, 0.0, self.eps)


class FreezableBatchNorm1d(_FreezableBatchNorm, nn.BatchNorm1d):
    """An `nn.BatchNorm1d` that, by running statistics and with a frozen weight, keeps nothing of its input.

    >>> import torch, freezekit as fk
    >>> norm = fk.nn.FreezableBatchNorm1d(4).eval().requires_grad_(False)
    >>> norm(torch.ones(2, 4, requires_grad=True)).grad_fn.name()
    'FreezekitBatchNormBackward'
    """


class FreezableBatchNorm2d(_FreezableBatchNorm, nn.BatchNorm2d):
    """An `nn.BatchNorm2d` that, by running statistics and with a frozen weight, keeps nothing of its input.

    >>> import torch, freezekit as fk
    >>> norm = fk.nn.FreezableBatchNorm2d(4).eval().requires_grad_(False)
    >>> norm(torch.ones(2, 4, 3, 3, requires_grad=True)).grad_fn.name()
    'FreezekitBatchNormBackward'
    """


class FreezableBatchNorm3d(_FreezableBatchNorm, nn.BatchNorm3d):
    """An `nn.BatchNorm3d` that, by running statistics and with a frozen weight, keeps nothing of its input.

    >>> import torch, freezekit as fk
    >>> norm = fk.nn.FreezableBatchNorm3d(4).eval().requires_grad_(False)
    >>> norm(torch.ones(2, 4, 3, 3, 3, requires_grad=True)).grad_fn.name()
    'FreezekitBatchNormBackward'
    """


class _FreezableInstanceNorm(nn.modules.instancenorm._InstanceNorm):
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy) and (leaf := as_leaf(self, input)) is not None:
            return leaf
        return super().forward(input)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        own = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        return functional.instance_norm(input, *tensors, own, momentum, self.eps)


class FreezableInstanceNorm1d(_FreezableInstanceNorm, nn.InstanceNorm1d):
    """An `nn.InstanceNorm1d` that, by running statistics and with a frozen weight, keeps nothing of its input.

    >>> import torch, freezekit as fk
    >>> norm = fk.nn.FreezableInstanceNorm1d(4, track_running_stats=True).eval()
    >>> norm(torch.ones(2, 4, 3, requires_grad=True)).grad_fn.name()
    'FreezekitBatchNormBackward'
    """


class FreezableInstanceNorm2d(_FreezableInstanceNorm, nn.InstanceNorm2d):
    """An `nn.InstanceNorm2d` that, by running statistics and with a frozen weight, keeps nothing of its input.

    >>> import torch, freezekit as fk
    >>> norm = fk.nn.FreezableInstanceNorm2d(4, track_running_stats=True).eval()
    >>> norm(torch.ones(2, 4, 3, 3, requires_grad=True)).grad_fn.name()
    'FreezekitBatchNormBackward'
    """


class FreezableInstanceNorm3d(_FreezableInstanceNorm, nn.InstanceNorm3d):
    """An `nn.InstanceNorm3d` that, by running statistics and with a frozen weight, keeps nothing of its input.

    >>> import torch, freezekit as fk
    >>> norm = fk.nn.FreezableInstanceNorm3d(4, track_running_stats=True).eval()
    >>> norm(torch.ones(2, 4, 3, 3, 3, requires_grad=True)).grad_fn.name()
    'FreezekitBatchNormBackward'
    """


class FreezableLayerNorm(nn.LayerNorm):
    """An `nn.LayerNorm` that keeps nothing where its bias alone learns; elsewhere what torch keeps, which it reads.

    >>> import torch, freezekit as fk
    >>> fk.nn.FreezableLayerNorm(2, eps=0.0)(torch.tensor([0.0, 2.0])).tolist()
    [-1.0, 1.0]
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class FreezableGroupNorm(nn.GroupNorm):
    """An `nn.GroupNorm` that keeps nothing where its bias alone learns; elsewhere what torch keeps, which it reads.

    >>> import torch, freezekit as fk
    >>> fk.nn.FreezableGroupNorm(1, 1, eps=0.0)(torch.tensor([[[0.0, 2.0]]])).tolist()
    [[[-1.0, 1.0]]]
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
