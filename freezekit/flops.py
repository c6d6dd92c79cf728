"""What `torch.utils.flop_counter` counts for freezekit's operators: what it counts for torch's.

Its count of a weight gradient ignores groups, and is `groups` times too high; so is the count here. In a double
backward torch computes a grouped weight gradient group by group and counts it right, where freezekit's operator is
counted as in the first order: of a converted, trainable, grouped convolution the count is higher there, for the same
work.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

_ops = torch.ops.freezekit
Shape = Sequence[int]


@register_flop_formula([_ops.conv2d])
def _conv2d(x: Shape, w: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    return conv_flop_count(list(x), list(w), list(out_shape))


@register_flop_formula([_ops.frozen_conv2d, _ops.frozen_conv2d_shared])
def _frozen_conv2d(x: Shape, w: Shape, *args: Any, out_shape: tuple[Shape, Shape], **kwargs: Any) -> int:
    return conv_flop_count(list(x), list(w), list(out_shape[0]))


@register_flop_formula([_ops.convolution])
def _convolution(
    x: Shape,
    w: Shape,
    bias: Shape | None,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    transposed: bool,
    *args: Any,
    out_shape: Shape,
    **kwargs: Any,
) -> int:
    return conv_flop_count(list(x), list(w), list(out_shape), transposed)


@register_flop_formula([_ops.conv2d_dgrad, _ops.frozen_conv2d_dgrad])
def _conv2d_dgrad(dy: Shape, w: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    return conv_flop_count(list(dy), list(w), list(out_shape), transposed=True)


@register_flop_formula([_ops.conv2d_wgrad])
def _conv2d_wgrad(dy: Shape, x: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    # As torch sees it: a convolution of x by dy, channels and batch exchanged, whose result is dw.
    def exchanged(shape: Shape) -> list[int]:
        return [shape[1], shape[0], *shape[2:]]

    return conv_flop_count(exchanged(x), exchanged(dy), exchanged(out_shape))
