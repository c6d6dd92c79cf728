"""Turns a model's layers into freezekit's, in place, and back, and tells what it did and what it left alone."""

from freezekit.conversion.report import LayerReport, conversion_report
from freezekit.conversion.swap import SWAPS, convert, revert

__all__ = ["SWAPS", "LayerReport", "conversion_report", "convert", "revert"]
