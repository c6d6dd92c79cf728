"""Layers that keep and compute only what training still needs of them.

Each is an `isinstance` of the layer of `torch.nn` that it replaces, with its constructor, attributes, state_dict and
errors.
"""

from freezekit.nn._tracers import refuse_script
from freezekit.nn.activation import GELU, Dropout, Hardswish, Hardtanh, LeakyReLU, Mish, PReLU, ReLU, ReLU6, SiLU
from freezekit.nn.conv2d import FreezableConv2d
from freezekit.nn.conv_nd import (
    FreezableConv1d,
    FreezableConv3d,
    FreezableConvTranspose1d,
    FreezableConvTranspose2d,
    FreezableConvTranspose3d,
)
from freezekit.nn.norm import (
    FreezableBatchNorm1d,
    FreezableBatchNorm2d,
    FreezableBatchNorm3d,
    FreezableGroupNorm,
    FreezableInstanceNorm1d,
    FreezableInstanceNorm2d,
    FreezableInstanceNorm3d,
    FreezableLayerNorm,
)
from freezekit.nn.pool import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    ReflectionPad1d,
    ReflectionPad2d,
    ReflectionPad3d,
    ReplicationPad1d,
    ReplicationPad2d,
    ReplicationPad3d,
)

__all__ = [
    "GELU",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "Dropout",
    "FreezableBatchNorm1d",
    "FreezableBatchNorm2d",
    "FreezableBatchNorm3d",
    "FreezableConv1d",
    "FreezableConv2d",
    "FreezableConv3d",
    "FreezableConvTranspose1d",
    "FreezableConvTranspose2d",
    "FreezableConvTranspose3d",
    "FreezableGroupNorm",
    "FreezableInstanceNorm1d",
    "FreezableInstanceNorm2d",
    "FreezableInstanceNorm3d",
    "FreezableLayerNorm",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "Mish",
    "PReLU",
    "ReLU",
    "ReLU6",
    "ReflectionPad1d",
    "ReflectionPad2d",
    "ReflectionPad3d",
    "ReplicationPad1d",
    "ReplicationPad2d",
    "ReplicationPad3d",
    "SiLU",
]

for _name in __all__:
    globals()[_name].__prepare_scriptable__ = refuse_script
