"""Tables for people: rows appear as they are measured, in fixed columns that fit 120 characters."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.markup import escape

from bench.rows import Row
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


Cell = Callable[[Row], str]

# Head, width, text.
_DETAIL: list[tuple[str, int, Cell]] = [
    ("side", -23, lambda r: r.side),
    ("ms", 8, lambda r: milliseconds(r.seconds.median)),
    ("±", 4, lambda r: f"{r.seconds.relative * 100:.0f}%"),
    ("ratio to stock", 14, lambda r: percent(r.ratio) if r.ratio else "-"),
    ("TFLOP/s", 8, lambda r: number(r.tflops)),
    ("GB/s", 7, lambda r: number(r.gbs)),
    ("roof", 5, lambda r: "-" if r.roofline is None else f"{r.roofline * 100:.0f}%"),
    ("kept MiB", 8, lambda r: mebibytes(r.bytes_kept)),
    ("peak MiB", 8, lambda r: mebibytes(r.peak_bytes)),
    ("kernels", 7, lambda r: number(r.kernels)),
]


class Report:
    """Prints rows, a group of sides at a time, with a head wherever the section or group changes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._open: tuple[str, str] | None = None
        self._last = ""

    def line(self, text: str = "", style: str = "") -> None:
        """Prints one line as it is, never wrapped."""
        self.console.print(f"[{style}]{escape(text)}[/]" if style else escape(text), soft_wrap=True, highlight=False)

    def heading(self, text: str) -> None:
        """Opens a section."""
        self.line()
        self.line(text, "bold")

    def show(self, rows: Sequence[Row]) -> None:
        """Prints what one case gave: on one line for two sides, on a line a side for more."""
        two = len(rows) == 2 and rows[1].ratio is not None
        first = rows[0]
        if self._open != (first.section, first.group):
            self._open = (first.section, first.group)
            self._last = ""
            self.heading(f"{first.section}: {first.group}")
            self.line(_two_head(rows) if two else _head(_DETAIL), "dim")
        place = f"{first.case} {first.detail}"
        if two:
            self.line(_two_sides(rows, place if place != self._last else ""), _style(rows[1]))
        else:
            self.line(f"{place} · {first.regime} · {first.part}", "bold")
            for row in rows:
                self.line(_cells(_DETAIL, row), _style(row))
        self._last = place

    def summarise(self, rows: Iterable[Row]) -> None:
        """What layers add up to: geometric mean of ratios, time and bytes of the whole network."""
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            if row.section == "layers":
                groups.setdefault((row.group, row.regime, row.part), []).append(row)
        for (group, regime, part), members in groups.items():
            self.heading(f"all layers of {group}, {regime}, {part} (each as often as it occurs)")
            for side in dict.fromkeys(row.side for row in members):
                self.line("  " + _total(side, [row for row in members if row.side == side]))


def _total(side: str, rows: list[Row]) -> str:
    text = f"{side:23} {milliseconds(sum(row.count * row.seconds.median for row in rows)):>8} ms"
    kept = [row.count * row.bytes_kept for row in rows if row.bytes_kept is not None]
    if kept:
        text += f"   kept {mebibytes(sum(kept)):>6} MiB"
    ratios = [row.ratio.median for row in rows if row.ratio]
    if ratios and side != "stock":
        text += f"   ratio to stock, geometric mean {statistics.geometric_mean(ratios):.3f}"
    return text


def _head(columns: list[tuple[str, int, Cell]]) -> str:
    return "  " + " ".join(name.ljust(-width) if width < 0 else name.rjust(width) for name, width, _ in columns)


def _cells(columns: list[tuple[str, int, Cell]], row: Row) -> str:
    texts = [(cell(row), width) for _, width, cell in columns]
    return "  " + " ".join(text.ljust(-width) if width < 0 else text.rjust(width) for text, width in texts)


def _two_widths(rows: Sequence[Row]) -> tuple[int, int]:
    """Of the place and the regime; layers have longer places, training steps longer regimes."""
    return (46, 15) if rows[0].section == "layers" else (30, 24)


def _two_head(rows: Sequence[Row]) -> str:
    place, regime = _two_widths(rows)
    columns = f"{'ms':>16} {'ratio':>12} "
    if rows[0].tflops is not None:
        columns += f"{'TFLOP/s':>8} {'kept MiB':>17}"
    else:
        columns += f"{'kept MiB':>18} {'peak MiB':>15}"
    sides = f"{rows[0].side} -> {rows[1].side}"
    return f"{sides:{place}} {'regime':{regime}} {columns}"


def _two_sides(rows: Sequence[Row], label: str) -> str:
    stock, ours = rows
    place, regime = _two_widths(rows)
    assert ours.ratio is not None
    times = f"{milliseconds(stock.seconds.median)} -> {milliseconds(ours.seconds.median)}"
    kept = f"{mebibytes(stock.bytes_kept)} -> {mebibytes(ours.bytes_kept)}"
    peak = f"{mebibytes(stock.peak_bytes)} -> {mebibytes(ours.peak_bytes)}"
    name = {"step": stock.regime, "fprop": f"fprop {stock.regime}"}.get(stock.part, stock.part)
    text = f"{label:{place}} {name:{regime}} {times:>16} {percent(ours.ratio):>12} "
    return text + (f"{number(ours.tflops):>8} {kept:>17}" if ours.tflops is not None else f"{kept:>18} {peak:>15}")


def _style(row: Row) -> str:
    """Colour only what differs from stock by more than its own spread."""
    if row.ratio is None or row.side == "stock":
        return ""
    if row.ratio.low > 1.03:
        return "red"
    return "green" if row.ratio.high < 0.97 else ""
