"""Layers as functions: as in `torch.nn.functional`, keeping for backward what the gradients asked for read."""

from freezekit.functional.conv import conv2d, conv2d_dgrad, conv2d_wgrad

__all__ = ["conv2d", "conv2d_dgrad", "conv2d_wgrad"]
