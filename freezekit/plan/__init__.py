"""What freezing would buy, for every depth, before paying for any of it."""

from freezekit.plan.machine import Machine
from freezekit.plan.planner import plan
from freezekit.plan.report import Option, Plan

__all__ = ["Machine", "Option", "Plan", "plan"]
