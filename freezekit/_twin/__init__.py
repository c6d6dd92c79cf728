"""A copy of a model that is run instead of it: whatever its forward does, the model stays as it is.

Without data every tensor that is reached becomes a fake one, of the same shape, layout, dtype and device: operators
then only work out what they would return, and choose their kernels as on the real device. What cannot be reached, such
as a tensor in another library's cache, is made fake where it is used, and never written to; what a run adds to such a
cache has data in the end. With data every tensor is copied, which takes as much memory again as the model has.
"""

from freezekit._twin.higher_order import CannotWatch, call_higher_order, is_higher_order
from freezekit._twin.roots import has_data, roots_of
from freezekit._twin.switches import random_numbers_kept, switches_kept
from freezekit._twin.twin import Twin, all_kept, is_plain, on_twin
from freezekit._twin.untouched import looking_once

__all__ = [
    "CannotWatch",
    "Twin",
    "all_kept",
    "call_higher_order",
    "has_data",
    "is_higher_order",
    "is_plain",
    "looking_once",
    "on_twin",
    "random_numbers_kept",
    "roots_of",
    "switches_kept",
]
