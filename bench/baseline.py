"""Compares a run with an earlier one and flags what changed beyond noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench import document
from bench.report import Report, mebibytes
from bench.rows import Row
from bench.timing import Spread


@dataclass(frozen=True)
class Change:
    """What became of one measurement."""

    row: Row
    what: str
    worse: bool


def changes(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """Measurements of both runs that differ beyond noise.

    Time is compared as the ratio to stock of the same run, which another machine or a busier hour moves less than
    time itself; it has changed if the two runs' quartile ranges do not meet and the medians differ by over 2 %.
    Bytes are exact: any difference is a change.
    """
    old = {row.key: row for row in before}
    found = []
    for row in after:
        earlier = old.get(row.key)
        if earlier is None:
            continue
        if row.side != "stock" and row.ratio is not None and earlier.ratio is not None:
            factor = row.ratio.median / earlier.ratio.median
            if _apart(row.ratio, earlier.ratio) and abs(factor - 1) > 0.02:
                text = f"ratio to stock {earlier.ratio.median:.3f} -> {row.ratio.median:.3f} ({factor - 1:+.0%})"
                found.append(Change(row, text, factor > 1))
        for name in ("bytes_kept", "peak_bytes"):
            was, now = getattr(earlier, name), getattr(row, name)
            if was is not None and now is not None and was != now:
                text = f"{name.replace('_', ' ')} {mebibytes(was)} -> {mebibytes(now)} MiB"
                found.append(Change(row, text, now > was))
    return found


def show(report: Report, path: Path, rows: list[Row]) -> None:
    """Prints what changed since the run in `path`.

    Raises:
        NotThisSchema: if the file is no such document.
    """
    earlier = document.read(path)
    before = [Row.from_dict(data) for data in earlier["rows"]]
    report.heading(f"against {path}: {earlier['environment']['commit']}, {earlier['environment']['date']}")
    known = {row.key for row in before}
    shared = sum(row.key in known for row in rows)
    found = changes(before, rows)
    for change in found:
        row = change.row
        place = f"{row.section}: {row.group} {row.case} {row.detail}, {row.regime}, {row.part}, {row.side}"
        report.line(f"{'worse ' if change.worse else 'better'}  {place}: {change.what}", _colour(change))
    report.line(f"{shared} of {len(rows)} measurements are in both runs; {len(found)} changed beyond noise")


def _apart(a: Spread, b: Spread) -> bool:
    return a.low > b.high or b.low > a.high


def _colour(change: Change) -> str:
    return "red" if change.worse else "green"
