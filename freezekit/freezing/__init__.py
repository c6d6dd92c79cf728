"""Freezing in one call: autograd's flag, the stale gradient, the running statistics and the optimizer."""

from freezekit.freezing.api import freeze, unfreeze
from freezekit.freezing.checkpoint import freeze_state, load_freeze_state
from freezekit.freezing.norm import NormWarning, is_held
from freezekit.freezing.patterns import PatternError
from freezekit.freezing.pending import GradientWarning
from freezekit.freezing.result import Frozen

__all__ = [
    "Frozen",
    "GradientWarning",
    "NormWarning",
    "PatternError",
    "freeze",
    "freeze_state",
    "is_held",
    "load_freeze_state",
    "unfreeze",
]
