"""Which code computes the operators: ATen's libraries, or freezekit's CUDA kernels."""

from __future__ import annotations

from typing import Literal, get_args

from freezekit import _C
from freezekit._arguments import check_flag, shown

Backend = Literal["auto", "native", "aten"]

_current: str = "auto"  # a Backend, or "emulated" within freezekit.testing.emulated
_hopper = False

# What has no kernels of its own and never will: function of freezekit.functional -> layers of freezekit.nn.
# No backend changes what computes it; what freezekit saves is what it keeps, and the gradients that nobody asks for.
WITHOUT_KERNELS: dict[str, tuple[str, ...]] = {
    "conv1d": ("FreezableConv1d",),
    "conv3d": ("FreezableConv3d",),
    "conv_transpose1d": ("FreezableConvTranspose1d",),
    "conv_transpose2d": ("FreezableConvTranspose2d",),
    "conv_transpose3d": ("FreezableConvTranspose3d",),
    "batch_norm": ("FreezableBatchNorm1d", "FreezableBatchNorm2d", "FreezableBatchNorm3d"),
    "instance_norm": ("FreezableInstanceNorm1d", "FreezableInstanceNorm2d", "FreezableInstanceNorm3d"),
    "layer_norm": ("FreezableLayerNorm",),
    "group_norm": ("FreezableGroupNorm",),
    "silu": ("SiLU",),
    "gelu": ("GELU",),
    "hardswish": ("Hardswish",),
    "mish": ("Mish",),
    "max_pool3d": ("MaxPool3d",),
    "avg_pool1d": ("AvgPool1d",),
    "avg_pool2d": ("AvgPool2d",),
    "avg_pool3d": ("AvgPool3d",),
    "adaptive_avg_pool1d": ("AdaptiveAvgPool1d",),
    "adaptive_avg_pool2d": ("AdaptiveAvgPool2d",),
    "adaptive_avg_pool3d": ("AdaptiveAvgPool3d",),
    "pad": (
        *("ReflectionPad1d", "ReflectionPad2d", "ReflectionPad3d"),
        *("ReplicationPad1d", "ReplicationPad2d", "ReplicationPad3d"),
    ),
}


def current_backend() -> str:
    """The backend that calls without a `backend` argument use.

    >>> current_backend()
    'auto'
    """
    return _current


def check_backend(name: str) -> None:
    """Raises ValueError unless `name` is a backend."""
    if name not in get_args(Backend):
        raise ValueError(f"backend must be 'auto', 'native' or 'aten', got {shown(name)}")


def demands_kernels() -> bool:
    """Whether the current backend demands freezekit's own kernels."""
    return _current in ("native", "emulated")


class switched:
    """Context manager: within it, calls without a `backend` argument use the one of this name, which is not checked."""

    def __init__(self, name: str, hopper: bool = False) -> None:
        self.name = name
        self.hopper = hopper
        self._outer: list[tuple[str, bool]] = []

    def __enter__(self) -> switched:
        self._outer.append((_current, _hopper))
        _set(self.name, self.hopper)
        return self

    def __exit__(self, *error: object) -> None:
        _set(*self._outer.pop())


class backend(switched):
    """Context manager: within it, freezekit's operators run on the named backend.

    As with `torch.backends` settings, it holds for the whole process, not for one thread. What a forward pass ran on,
    its backward pass runs on too. Layers without kernels of their own (`freezekit.backends.WITHOUT_KERNELS`) are the
    same under every backend.

    Args:
        name: ``"auto"`` lets freezekit choose; ``"native"`` demands its CUDA kernels (an error where none fits);
            ``"aten"`` demands cuDNN or oneDNN.
        hopper: the kernels for sm_90a run where they can, on a GPU of sm_90. They have never run on a GPU, so they
            are asked for by name. Unlike the backend, this is read when a kernel is launched: a backward pass
            outside of the context runs the kernels of sm_80. ``"auto"`` runs them where choices were loaded that
            ``freezekit selftest --hopper --save-choices`` wrote, whatever is set here.

    Raises:
        ValueError: if `name` is not a backend, or `hopper` is set for one that has no such kernels.
        TypeError: if `hopper` is not a bool.

    >>> import torch, freezekit as fk
    >>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    >>> with fk.backend("aten"):
    ...     print(fk.functional.conv2d(x, w).item())
    9.0
    """

    def __init__(self, name: Backend, *, hopper: bool = False) -> None:
        check_backend(name)
        check_flag("hopper", hopper)
        if hopper and name != "native":
            raise ValueError(f"hopper=True needs backend 'native', got {shown(name)}")
        super().__init__(name, hopper)


def _set(name: str, hopper: bool) -> None:
    global _current, _hopper
    _current, _hopper = name, hopper
    _C.quick.set_backend(name)
    _C.set_hopper(hopper)
