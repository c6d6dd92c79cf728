"""freezekit: a frozen layer costs only what the chain rule still needs of it."""

from freezekit import _extension

_extension.load()

from freezekit.auditing import AuditError, audit  # noqa: E402
from freezekit.backends import backend, current_backend  # noqa: E402
from freezekit.constants import invalidate, verify_constants  # noqa: E402
from freezekit.conversion import LayerReport, conversion_report, convert, revert  # noqa: E402
from freezekit.distributed import rewrap  # noqa: E402
from freezekit.explanation import Explanation, explain  # noqa: E402
from freezekit.freezing import (  # noqa: E402
    Frozen,
    PatternError,
    freeze,
    freeze_state,
    is_held,
    load_freeze_state,
    unfreeze,
)
from freezekit.functional import conv2d, conv2d_bias_grad, conv2d_dgrad, conv2d_wgrad  # noqa: E402
from freezekit.fusion import BlockReport, fuse, fusion_report, unfuse  # noqa: E402
from freezekit.guarding import FrozenMoved, Guard, guard  # noqa: E402
from freezekit.nn import (  # noqa: E402
    FreezableBatchNorm1d,
    FreezableBatchNorm2d,
    FreezableBatchNorm3d,
    FreezableConv1d,
    FreezableConv2d,
    FreezableConv3d,
    FreezableConvTranspose1d,
    FreezableConvTranspose2d,
    FreezableConvTranspose3d,
    FreezableGroupNorm,
    FreezableLayerNorm,
)
from freezekit.planning import Plan, plan  # noqa: E402
from freezekit.profiling import profile  # noqa: E402
from freezekit.schedules import FreezeOut, UpdateNorm  # noqa: E402
from freezekit.tuning import autotune, clear_choices, load_choices  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AuditError",
    "BlockReport",
    "Explanation",
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
    "FreezableLayerNorm",
    "FreezeOut",
    "Frozen",
    "FrozenMoved",
    "Guard",
    "LayerReport",
    "PatternError",
    "Plan",
    "UpdateNorm",
    "audit",
    "autotune",
    "backend",
    "clear_choices",
    "conv2d",
    "conv2d_bias_grad",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "conversion_report",
    "convert",
    "current_backend",
    "explain",
    "freeze",
    "freeze_state",
    "fuse",
    "fusion_report",
    "guard",
    "invalidate",
    "is_held",
    "load_choices",
    "load_freeze_state",
    "plan",
    "profile",
    "revert",
    "rewrap",
    "unfreeze",
    "unfuse",
    "verify_constants",
]
