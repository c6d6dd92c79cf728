"""Tables for people: rows appear as they are measured, in fixed columns that fit 120 characters, or the terminal."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.measure import Measured
from bench.timing import Spread

MIB = 1 << 20


def milliseconds(seconds: float) -> str:
    """Three significant digits.

    >>> milliseconds(0.0123456), milliseconds(1.5), milliseconds(2.5e-6)
    ('12.3', '1500', '0.0025')
    """
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def mebibytes(count: int | None) -> str:
    """
    >>> mebibytes(None), mebibytes(0), mebibytes(3 << 19), mebibytes(300 << 20)
    ('-', '0', '1.5', '300')
    >>> mebibytes(100)
    '<0.001'
    """
    if count is None:
        return "-"
    value = count / MIB
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:.0f}" if value >= 100 or not value else f"{value:.3g}"


def percent(spread: Spread) -> str:
    """
    >>> percent(Spread(1.02, 1.0, 1.04))
    '1.020 ±  2%'
    """
    return f"{spread.median:.3f} ± {spread.relative * 100:2.0f}%"


def number(value: float | None) -> str:
    """
    >>> number(None), number(0.12345)
    ('-', '0.123')
    """
    return "-" if value is None else f"{value:.3g}"


class Column(NamedTuple):
    """A head, its width and a row's text; on a narrow terminal the columns of the lowest rank are left out first."""

    head: str
    width: int
    text: Callable[[Measured], str]
    rank: int = 9


LEGEND = (
    "ms, ratio: medians of interleaved rounds, ± half the distance between quartiles; the ratio is to stock in the same"
    " memory format. roof: of what the measured peaks allow, over 100% from a cache. kept: for the backward pass. peak:"
    " most held in a step. kernels: launches, or operators on a CPU."
)

_COLUMNS = (
    Column("ms", 8, lambda r: milliseconds(r.time.median)),
    Column("±", 4, lambda r: f"{r.time.relative * 100:.0f}%"),
    Column("ratio to stock", 14, lambda r: percent(r.ratio) if r.ratio else "-"),
    Column("TFLOP/s", 8, lambda r: number(r.tflops), 1),
    Column("GB/s", 7, lambda r: number(r.gbs), 0),
    Column("roof", 5, lambda r: "-" if r.roofline is None else f"{r.roofline * 100:.0f}%", 2),
    Column("kept MiB", 8, lambda r: mebibytes(r.bytes_kept)),
    Column("peak MiB", 8, lambda r: mebibytes(r.peak_bytes), 4),
    Column("kernels", 7, lambda r: number(r.kernels), 3),
)


class Printout:
    """Prints rows as they are measured, case by case, with a head wherever the section or group changes.

    Args:
        console: where to; a terminal that is too narrow for all columns gets fewer, a file never does.
        sides: the longest name determines the width of the first column.
    """

    def __init__(self, console: Console, sides: Iterable[str] = ()) -> None:
        self.console = console
        self.sides = tuple(sides)
        self._open: tuple[str, str] | None = None

    def line(self, text: str = "", style: str = "") -> None:
        """Prints one line as it is, never wrapped."""
        self.console.print(f"[{style}]{escape(text)}[/]" if style else escape(text), soft_wrap=True, highlight=False)

    def heading(self, text: str) -> None:
        """Opens a section."""
        self.line()
        self.line(text, "bold")

    def show(self, rows: Sequence[Measured]) -> None:
        """Prints the rows of one case, a line for each side."""
        first = rows[0]
        if self._open is None:
            self.line()
            self.console.print(LEGEND, style="dim", highlight=False)
        if self._open != (first.section, first.group):
            self._open = (first.section, first.group)
            self.heading(f"{first.section}: {first.group}")
            self.line(self._line("side", [column.head.rjust(column.width) for column in self._columns]), "dim")
        what = [first.case, first.detail, "·", first.regime, *(["·", first.part] if first.section == "layers" else [])]
        self.line(" ".join(what), "bold")
        for row in rows:
            if row.failure:
                self.line(self._line(row.side, [f"FAILED: {row.failure}"]), "bold red")
                continue
            cells = [column.text(row).rjust(column.width) for column in self._columns]
            self.line(self._line(row.side, cells), _style(row))

    @property
    def _columns(self) -> list[Column]:
        columns = list(_COLUMNS)
        room = self.console.width if self.console.is_terminal else 1000
        while len(self._line("", [" " * column.width for column in columns])) > room and len(columns) > 4:
            columns.remove(min(columns, key=lambda column: column.rank))
        return columns

    def _line(self, side: str, cells: Sequence[str]) -> str:
        return f"  {side:{max(map(len, (*self.sides, 'freezekit')))}} {' '.join(cells)}"

    def summarise(self, rows: Iterable[Measured]) -> None:
        """What the layers of each network add up to: time, bytes, and the geometric mean of the ratios."""
        groups: dict[tuple[str, str, str], list[Measured]] = {}
        for row in rows:
            if row.section == "layers":
                groups.setdefault((row.group, row.regime, row.part), []).append(row)
        for (group, regime, part), members in groups.items():
            self.line()
            title = f"all layers of {group}, {regime}, {part} (each as often as it occurs)"
            table = Table(title=title, title_justify="left", title_style="bold")
            table.add_column("side")
            for name in ("ms", "kept MiB", "ratio to stock, geometric mean"):
                table.add_column(name, justify="right")
            for side in dict.fromkeys(row.side for row in members):
                table.add_row(side, *_totals([row for row in members if row.side == side]))
            self.console.print(table)


def _totals(rows: list[Measured]) -> tuple[str, str, str]:
    failed = sum(bool(row.failure) for row in rows)
    if failed:
        return f"{failed} of {len(rows)} FAILED", "-", "-"
    kept = [row.count * row.bytes_kept for row in rows if row.bytes_kept is not None]
    ratios = [row.ratio.median for row in rows if row.ratio]
    return (
        milliseconds(sum(row.count * row.time.median for row in rows)),
        mebibytes(sum(kept)) if kept else "-",
        f"{statistics.geometric_mean(ratios):.3f}" if ratios else "-",
    )


def _style(row: Measured) -> str:
    """Colour only what differs from stock by more than its own spread."""
    if row.ratio is None or row.side == "stock":
        return ""
    if row.ratio.low > 1.03:
        return "red"
    return "green" if row.ratio.high < 0.97 else ""
