"""The parts of a comparison, one per file: each lists its cases, and `kernels` its tables."""

from collections.abc import Callable

from bench.measure import MakeCase
from bench.sections import layers, models
from bench.settings import Settings

# All but `kernels`, which times nothing and prints what ran.
SECTIONS: dict[str, Callable[[Settings], list[MakeCase]]] = {
    "layers": layers.cases,
    "blocks": models.block_cases,
    "models": models.cases,
    "memory": models.depth_cases,
    "scaling": models.scaling_cases,
}
NAMES = ("kernels", *SECTIONS)
DEFAULT = ("kernels", "layers", "models")
