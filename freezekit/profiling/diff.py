"""What changed from one profile to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from freezekit._showing import Shown
from freezekit.profiling.phases import PHASES
from freezekit.profiling.table import KernelTable, aligned


@dataclass(frozen=True)
class KernelDiff:
    """One row of a difference; a side where the kernel did not run has 0 instances and 0 nanoseconds."""

    name: str
    instances: tuple[int, int]
    nanoseconds: tuple[int, int]


@dataclass(frozen=True)
class ProfileDiff(Shown):
    """Two profiles side by side; prints counts first (``wgrad 3 -> 2``), then every kernel.

    Attributes:
        phases: for each of PHASES that ran at all: how often, before and after.
        kernels: by the larger total time of either side, falling.
    """

    phases: dict[str, tuple[int, int]]
    kernels: tuple[KernelDiff, ...]

    def __str__(self) -> str:
        lines = [f"{phase} {before} -> {after}" for phase, (before, after) in self.phases.items()]
        head = ("Instances", "Total Time (ns)", "Name")
        rows = [
            (f"{c.instances[0]} -> {c.instances[1]}", f"{c.nanoseconds[0]} -> {c.nanoseconds[1]}", c.name)
            for c in self.kernels
        ]
        return "\n".join([*lines, *aligned([head, *rows])])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "phases": {phase: list(counts) for phase, counts in self.phases.items()},
            "kernels": [
                {"name": c.name, "instances": list(c.instances), "nanoseconds": list(c.nanoseconds)}
                for c in self.kernels
            ],
        }


def compare(
    before: KernelTable, before_counts: dict[str, int], after: KernelTable, after_counts: dict[str, int]
) -> ProfileDiff:
    """The difference of two tables and of how often each phase ran."""
    old = {row.label: row for row in before}
    new = {row.label: row for row in after}
    changes = []
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        changes.append(
            KernelDiff(
                name,
                (a.instances if a else 0, b.instances if b else 0),
                (a.total if a else 0, b.total if b else 0),
            )
        )
    changes.sort(key=lambda c: (-max(c.nanoseconds), c.name))
    phases = {p: (before_counts[p], after_counts[p]) for p in PHASES if before_counts[p] or after_counts[p]}
    return ProfileDiff(phases, tuple(changes))
