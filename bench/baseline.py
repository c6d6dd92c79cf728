"""Compares a run with an earlier one and flags what changed beyond noise."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench import document
from bench.measure import Measured
from bench.report import Printout, mebibytes

# Student's t, two-sided, 0.001, by degrees of freedom.
_STUDENT = {1: 637.0, 2: 31.6, 3: 12.9, 4: 8.61, 5: 6.87, 6: 5.96, 8: 5.04, 10: 4.59, 15: 4.07, 20: 3.85, 40: 3.55}


@dataclass(frozen=True)
class Difference:
    """How one row differs from the same row of the earlier run."""

    row: Measured
    what: str
    worse: bool


def changes(before: Iterable[Measured], after: Iterable[Measured]) -> list[Difference]:
    """Rows of both runs that differ by more than noise.

    Times are compared as ratios to stock in the same run: another machine or a busier hour changes those less. A ratio
    has changed if the medians differ by more than 2 % and by more than `noise`. Bytes are exact: any difference is a
    change.
    """
    old = {row.key: row for row in before}
    found = []
    for row in after:
        earlier = old.get(row.key)
        if earlier is None:
            continue
        if row.failure and not earlier.failure:
            found.append(Difference(row, f"fails now: {row.failure}", True))
        if row.side != "stock" and row.ratio is not None and earlier.ratio is not None:
            factor = row.ratio.median / earlier.ratio.median
            if abs(factor - 1) > 0.02 and abs(row.ratio.median - earlier.ratio.median) > noise(earlier, row):
                text = f"ratio to stock {earlier.ratio.median:.3f} -> {row.ratio.median:.3f} ({factor - 1:+.0%})"
                found.append(Difference(row, text, factor > 1))
        for name in ("bytes_kept", "peak_bytes"):
            was, now = getattr(earlier, name), getattr(row, name)
            if was is not None and now is not None and was != now:
                text = f"{name.replace('_', ' ')} {mebibytes(was)} -> {mebibytes(now)} MiB"
                found.append(Difference(row, text, now > was))
    return found


def show(report: Printout, path: Path, rows: list[Measured]) -> None:
    """Prints what changed since the run in `path`.

    Raises:
        NotThisSchema: if the file is not such a document.
    """
    earlier = document.read(path)
    before = [Measured.from_dict(data) for data in earlier["rows"]]
    report.heading(f"against {path}: {earlier['environment']['commit']}, {earlier['environment']['date']}")
    known = {row.key for row in before}
    shared = sum(row.key in known for row in rows)
    found = changes(before, rows)
    for change in found:
        row = change.row
        place = f"{row.section}: {row.group} {row.case} {row.detail}, {row.regime}, {row.part}, {row.side}"
        report.line(
            f"{'worse ' if change.worse else 'better'}  {place}: {change.what}", "red" if change.worse else "green"
        )
    report.line(f"{shared} of {len(rows)} measurements are in both runs; {len(found)} changed beyond noise")


def noise(a: Measured, b: Measured) -> float:
    """How far apart the ratios' medians of two runs of the same thing are in one of a thousand pairs at most.

    A median of n values has the standard error 1.253 sigma / sqrt(n), and sigma is estimated from the quartiles, which
    are 1.349 sigma apart. That estimate is as good as one from 0.37 n values, so Student's t has few degrees of
    freedom: a handful of rounds proves nothing.
    """
    assert a.ratio is not None
    assert b.ratio is not None
    errors = [1.253 / 1.349 * (r.ratio.high - r.ratio.low) / r.rounds**0.5 for r in (a, b) if r.ratio is not None]
    freedom = int(0.37 * (a.rounds + b.rounds - 2))
    reach = [t for degrees, t in _STUDENT.items() if degrees <= max(freedom, 1)][-1]
    return reach * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
