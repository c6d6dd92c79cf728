"""Layers as functions, as in `torch.nn.functional`, that keep for backward only what the requested gradients read."""

from ._conv2d import conv2d, conv2d_bias_grad, conv2d_dgrad, conv2d_wgrad
from .activation import dropout, gelu, hardswish, hardtanh, leaky_relu, mish, prelu, relu, relu6, silu
from .conv_nd import conv1d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .norm import batch_norm, group_norm, instance_norm, layer_norm
from .pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    pad,
)

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "conv2d_bias_grad",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "dropout",
    "gelu",
    "group_norm",
    "hardswish",
    "hardtanh",
    "instance_norm",
    "layer_norm",
    "leaky_relu",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "mish",
    "pad",
    "prelu",
    "relu",
    "relu6",
    "silu",
]
