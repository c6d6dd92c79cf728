"""What freezing would buy, for every depth, before paying for any of it."""

from freezekit.planning.planner import plan
from freezekit.planning.report import Machine, Option, Plan

__all__ = ["Machine", "Option", "Plan", "plan"]
