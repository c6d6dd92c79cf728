"""The kernel table: one row for each kernel (or operator, on a CPU), in the columns that Nsight Systems made common.

And what changed from one profile to another.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from freezekit._showing import Shown
from freezekit.profiling.events import PHASES

COLUMNS = (
    "Time (%)",
    "Total Time (ns)",
    "Instances",
    "Avg (ns)",
    "Med (ns)",
    "Min (ns)",
    "Max (ns)",
    "StdDev (ns)",
    "Name",
)


@dataclass(frozen=True)
class KernelRow:
    """All calls of one kernel; times in nanoseconds.

    Attributes:
        time_percent: share of the table's total time.
        stddev: of the sample (n - 1); 0 for a single call.
        phases: which parts of a convolution it computes, of PHASES ("fprop", "dgrad", "wgrad", "db",
            "epilogue"); () for anything else.
    """

    time_percent: float
    total: int
    instances: int
    average: float
    median: float
    minimum: int
    maximum: int
    stddev: float
    name: str
    phases: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, with its phases behind it where it has any."""
        return f"{self.name} [{', '.join(self.phases)}]" if self.phases else self.name

    def cells(self) -> tuple[str, ...]:
        """One text for each of COLUMNS."""
        return (
            f"{self.time_percent:.1f}",
            f"{self.total}",
            f"{self.instances}",
            f"{self.average:.1f}",
            f"{self.median:.1f}",
            f"{self.minimum}",
            f"{self.maximum}",
            f"{self.stddev:.1f}",
            self.label,
        )


def aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines' cells in columns, right-aligned but for the last one."""
    *numbers, _ = (max(map(len, column)) for column in zip(*lines))
    return ["  ".join([*map(str.rjust, line, numbers), line[-1]]) for line in lines]


@dataclass(frozen=True)
class KernelTable:
    """Rows by falling total time; prints as the table, iterates over its rows."""

    rows: tuple[KernelRow, ...]

    @property
    def total(self) -> int:
        """Nanoseconds in all rows."""
        return sum(row.total for row in self.rows)

    def __iter__(self) -> Iterator[KernelRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [COLUMNS, *(row.cells() for row in self.rows)]
        rule = tuple("-" * max(map(len, column)) for column in zip(*lines))
        return "\n".join(aligned([COLUMNS, rule, *lines[1:]]))

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, ready for JSON."""
        return [asdict(row) for row in self.rows]


def tabulate(calls: Iterable[tuple[str, tuple[str, ...], int]]) -> KernelTable:
    """Groups calls, each (name, phases, nanoseconds), into a table.

    >>> print(tabulate([("wgrad_kernel", ("wgrad",), 30), ("wgrad_kernel", ("wgrad",), 50), ("fill", (), 20)]))
    Time (%)  Total Time (ns)  Instances  Avg (ns)  Med (ns)  Min (ns)  Max (ns)  StdDev (ns)  Name
    --------  ---------------  ---------  --------  --------  --------  --------  -----------  --------------------
        80.0               80          2      40.0      40.0        30        50         14.1  wgrad_kernel [wgrad]
        20.0               20          1      20.0      20.0        20        20          0.0  fill
    """
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for name, phases, nanoseconds in calls:
        groups.setdefault((name, phases), []).append(nanoseconds)
    whole = sum(sum(times) for times in groups.values())
    rows = [
        KernelRow(
            time_percent=100 * sum(times) / whole if whole else 0.0,
            total=sum(times),
            instances=len(times),
            average=statistics.fmean(times),
            median=statistics.median(times),
            minimum=min(times),
            maximum=max(times),
            stddev=statistics.stdev(times) if len(times) > 1 else 0.0,
            name=name,
            phases=phases,
        )
        for (name, phases), times in groups.items()
    ]
    return KernelTable(tuple(sorted(rows, key=lambda row: (-row.total, row.label))))


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
        return json.loads(json.dumps(asdict(self)))


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
                name, (a.instances if a else 0, b.instances if b else 0), (a.total if a else 0, b.total if b else 0)
            )
        )
    changes.sort(key=lambda c: (-max(c.nanoseconds), c.name))
    phases = {p: (before_counts[p], after_counts[p]) for p in PHASES if before_counts[p] or after_counts[p]}
    return ProfileDiff(phases, tuple(changes))
