"""freezekit: a frozen layer costs only what the chain rule still needs of it.

What most programs need is here; the rest has a module for each concern. `freezekit.functional` and `freezekit.nn` hold
the operators and all layers, of which the convolutions are here too; `freezing`, `conversion`, `fusion`, `schedules`
and `distributed` change a model; `auditing`, `explanation`, `planning` and `profiling` look at one; `backends` and
`tuning` choose the kernels, and `testing` emulates them.
"""

from freezekit import _extension

_extension.load()

from freezekit import distributed, flops, functional, nn, schedules, testing, tuning  # noqa: E402, F401
from freezekit.auditing import audit  # noqa: E402
from freezekit.backends import backend  # noqa: E402
from freezekit.conversion import convert, revert  # noqa: E402
from freezekit.enabling import disable, enable, enabled, is_enabled  # noqa: E402
from freezekit.explanation import explain  # noqa: E402
from freezekit.freezing import freeze, freeze_state, unfreeze  # noqa: E402
from freezekit.fusion import fuse, unfuse  # noqa: E402
from freezekit.guarding import guard  # noqa: E402
from freezekit.nn import (  # noqa: E402
    FreezableConv1d,
    FreezableConv2d,
    FreezableConv3d,
    FreezableConvTranspose1d,
    FreezableConvTranspose2d,
    FreezableConvTranspose3d,
)
from freezekit.planning import plan  # noqa: E402
from freezekit.profiling import profile  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "FreezableConv1d",
    "FreezableConv2d",
    "FreezableConv3d",
    "FreezableConvTranspose1d",
    "FreezableConvTranspose2d",
    "FreezableConvTranspose3d",
    "audit",
    "backend",
    "convert",
    "disable",
    "enable",
    "enabled",
    "explain",
    "freeze",
    "freeze_state",
    "fuse",
    "guard",
    "is_enabled",
    "plan",
    "profile",
    "revert",
    "schedules",
    "unfreeze",
    "unfuse",
]
