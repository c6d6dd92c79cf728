"""Layers that keep and compute only what training still needs of them."""

from freezekit.nn.conv import FreezableConv2d

__all__ = ["FreezableConv2d"]
