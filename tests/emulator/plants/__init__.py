"""Bugs to plant in the kernels, each with the case that meets it and the one mode that must catch it."""

from __future__ import annotations

from . import depthwise, direct, gemm, groups, hopper, layers, small, wgrad
from .plant import Plant
from .unordered import UNORDERED_SPLIT_K

PLANTS = [
    plant for module in (direct, gemm, hopper, wgrad, depthwise, groups, small, layers) for plant in module.PLANTS
]

__all__ = ["PLANTS", "UNORDERED_SPLIT_K", "Plant"]
