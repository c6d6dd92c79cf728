"""Normalisations that keep what their gradients read: for frozen batch norm, nothing of the input's size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from freezekit.functional._torch import as_torch

_batch_norm = torch.ops.freezekit.batch_norm.default
_layer_norm = torch.ops.freezekit.layer_norm.default
_group_norm = torch.ops.freezekit.group_norm.default


@as_torch(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`; by given statistics and with a frozen weight it keeps nothing of `input`.

    Then y = (x - mean) / sqrt(var + eps) * weight + bias is linear in x, and backward reads weight and variance alone.
    While the weight learns, or with batch statistics, the formula reads the input and it is kept, as in torch.

    Args:
        input: (N, C, ...).
        running_mean, running_var: (C,); None only with `training`.
        weight, bias: (C,), or None.
        training: normalise by the statistics of `input`, and move the running ones.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.

    Raises:
        ValueError, RuntimeError: as torch's.

    >>> import torch, freezekit as fk
    >>> x = torch.ones(2, 3, 4, 4, requires_grad=True)
    >>> mean, var = torch.zeros(3), torch.full((3,), 0.25)
    >>> fk.functional.batch_norm(x, mean, var, eps=0.0).sum().backward()
    >>> x.grad.unique()
    tensor([2.])
    """
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(batch_norm, tensors, *tensors, training=training, momentum=momentum, eps=eps)
    if training or running_mean is None or running_var is None or eps < 0.0:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _batch_norm(input, weight, bias, running_mean, running_var, eps)


@as_torch(F.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`; where the bias alone learns it keeps nothing.

    The gradient of the input reads the input and two statistics a row, frozen weight or not: that is what torch keeps,
    and what this keeps wherever `input` needs a gradient.

    Args:
        input: (..., *normalized_shape).
        normalized_shape: the last sizes, over which to normalise.
        weight, bias: of that shape, or None.
        eps: added to the variance.

    Raises:
        RuntimeError: as torch's.

    >>> import torch, freezekit as fk
    >>> fk.functional.layer_norm(torch.tensor([[0.0, 2.0]]), (2,), eps=0.0)
    tensor([[-1.,  1.]])
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            layer_norm, (input, weight, bias), input, normalized_shape, weight=weight, bias=bias, eps=eps
        )
    if not _bias_alone(input, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return _layer_norm(input, normalized_shape, weight, bias, eps)


@as_torch(F.group_norm)
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm`; where the bias alone learns it keeps nothing.

    Args:
        input: (N, C, ...).
        num_groups: divides C.
        weight, bias: (C,), or None.
        eps: added to the variance.

    Raises:
        RuntimeError: as torch's.

    >>> import torch, freezekit as fk
    >>> fk.functional.group_norm(torch.tensor([[[0.0, 2.0]]]), 1, eps=0.0)
    tensor([[[-1.,  1.]]])
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            group_norm, (input, weight, bias), input, num_groups, weight=weight, bias=bias, eps=eps
        )
    one_value = input.dim() == 2 and input.size(0) * input.size(1) == num_groups
    if not _bias_alone(input, weight, bias) or input.dim() < 2 or one_value:  # the last two are torch's errors
        return F.group_norm(input, num_groups, weight, bias, eps)
    return _group_norm(input, num_groups, weight, bias, eps)


def _bias_alone(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    learns = [t is not None and t.requires_grad for t in (input, weight, bias)]
    return learns == [False, False, True]
