"""Normalisations that keep what their gradients read: for frozen batch norm, nothing of the input's size."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freezekit import _C
from freezekit.enabling import is_enabled
from freezekit.functional._torch import LEFT_TO_TORCH, are_numbers, are_tensors, as_torch, is_integer

_batch_norm = torch.ops.freezekit.batch_norm.default
_layer_norm = torch.ops.freezekit.layer_norm.default
_group_norm = torch.ops.freezekit.group_norm.default


@as_torch(F.batch_norm, _C.quick.batch_norm)
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
    >>> mean, var = torch.zeros(3), torch.full((3,), 0.125)
    >>> fk.functional.batch_norm(x, mean, var, eps=0.125).sum().backward()
    >>> x.grad.unique()
    tensor([2.])
    """
    fits = isinstance(input, Tensor) and isinstance(running_mean, Tensor) and isinstance(running_var, Tensor)
    # Releases of torch differ in whether they take an eps of 0.
    if training or not fits or not are_tensors(weight, bias) or not are_numbers(eps) or eps <= 0:
        return LEFT_TO_TORCH
    return _batch_norm(input, weight, bias, running_mean, running_var, eps)


@as_torch(F.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm`; by given statistics it is :func:`batch_norm`, and keeps as little.

    Of the vectors that its gradients read it keeps copies, as torch's does.

    Args:
        input: (N, C, L), or with more dimensions at the end.
        running_mean, running_var, weight, bias: (C,), or None.
        use_input_stats: normalise each image by its own statistics; the gradient then reads `input`, which is kept.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.

    Raises:
        ValueError, RuntimeError: as torch's.

    >>> import torch, freezekit as fk
    >>> mean, var = torch.zeros(1), torch.full((1,), 0.125)
    >>> fk.functional.instance_norm(torch.ones(1, 1, 2), mean, var, use_input_stats=False, eps=0.125)
    tensor([[[2., 2.]]])
    """
    # Of an empty batch, and with such an eps, torch's two norms say different things.
    alike = isinstance(input, Tensor) and input.layout == torch.strided and input.dim() >= 3 and input.numel() > 0
    if use_input_stats or not alike or not are_numbers(eps) or eps <= 0:
        return LEFT_TO_TORCH
    # As torch's, which views the channels of all images as those of one: whatever the input's layout, contiguous. And
    # with copies of what its gradients read, for each image: nobody's write before a backward pass matters.
    mean, var, scale = ((t.clone() if isinstance(t, Tensor) else t) for t in (running_mean, running_var, weight))
    return batch_norm(input.contiguous(), mean, var, scale, bias, False, momentum, eps)


@as_torch(F.layer_norm, _C.quick.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`; where the bias alone learns it keeps nothing.

    The gradient of the input reads the input and two statistics per row, frozen weight or not: that is what torch
    keeps, and what this keeps wherever `input` needs a gradient. A smooth activation behind it then keeps nothing:
    :func:`silu`, :func:`gelu` and the like.

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
    if not _bias_alone(input, weight, bias):
        return _noted(F.layer_norm, input, normalized_shape, weight, bias, eps)
    are_sizes = isinstance(normalized_shape, tuple | list) and all(map(is_integer, normalized_shape))
    if not are_sizes or not are_numbers(eps):
        return LEFT_TO_TORCH
    return _layer_norm(input, normalized_shape, weight, bias, eps)


@as_torch(F.group_norm, _C.quick.group_norm)
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm`; where the bias alone learns it keeps nothing.

    Where it keeps its input, a smooth activation behind it keeps nothing: :func:`silu`, :func:`gelu` and the like.

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
    if not _bias_alone(input, weight, bias):
        return _noted(F.group_norm, input, num_groups, weight, bias, eps)
    if not is_integer(num_groups) or not are_numbers(eps):
        return LEFT_TO_TORCH
    one_value = input.dim() == 2 and input.size(0) * input.size(1) == num_groups
    if input.dim() < 2 or one_value:  # torch refuses them
        return LEFT_TO_TORCH
    return _group_norm(input, num_groups, weight, bias, eps)


def _noted(
    function: Callable[..., Tensor], input: Tensor, of: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """torch's own call; bias and eps are noted for an activation behind it."""
    if torch.compiler.is_compiling() or is_enabled():
        return LEFT_TO_TORCH
    y = function(input, of, weight, bias, eps)
    if isinstance(y, Tensor):
        _C.chains.note_norm(y, bias, eps)
    return y


def _bias_alone(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    learns = [isinstance(t, Tensor) and t.requires_grad for t in (input, weight, bias)]
    return learns == [False, False, True] and isinstance(input, Tensor) and are_tensors(weight)
