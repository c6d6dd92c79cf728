"""See what a training step computes and keeps, before paying for it."""

from freezekit.explanation.report import Explanation, Row, explain

__all__ = ["Explanation", "Row", "explain"]
