"""When to freeze what: `FreezeOut` by the clock, `UpdateNorm` by what a layer still does.

Plain objects: ``step()`` after each ``optimizer.step()``, ``state_dict()`` and ``load_state_dict()``, ``plan()`` for a
look at it beforehand. No hooks, no trainer.
"""

from .base import Change, Schedule, compile_entries
from .freezeout import FreezeOut, freeze_times
from .layers import Layer, layers_of
from .timetable import Timetable
from .update_norm import UpdateNorm

__all__ = [
           "Change",
           "FreezeOut",
           "Layer",
           "Schedule",
           "Timetable",
           "UpdateNorm",
           "compile_entries",
           "freeze_times",
           "layers_of",
]  # fmt: skip
