"""Tables fit where they are shown, and say all that was measured where there is room."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from bench.report import LEGEND, Printout
from bench.timing import Spread
from tests.bench.test_document import ROW

ROWS = [
    replace(ROW, tflops=0.1, gbs=12.3, roofline=0.5, bytes_kept=1 << 20, peak_bytes=3 << 20, kernels=12, side=side)
    for side in ("stock", "stock_channels_last")
]


def shown(width: int, terminal: bool) -> list[str]:
    console = Console(record=True, width=width, force_terminal=terminal, file=io.StringIO())
    Printout(console, ("stock", "stock_channels_last")).show(ROWS)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("width", [70, 80, 100])
def test_a_narrow_terminal_loses_columns_and_breaks_no_line(width: int) -> None:
    lines = shown(width, True)
    assert max(map(len, lines)) <= width
    (head,) = (line for line in lines if line.startswith("  side"))
    assert all(column in head for column in ("ms", "±", "ratio to stock", "kept MiB"))
    assert ("GB/s" in head) == (width == 100)


def test_a_file_and_a_wide_terminal_get_every_column() -> None:
    for lines in (shown(80, False), shown(120, True)):
        (head,) = (line for line in lines if line.startswith("  side"))
        for column in ("TFLOP/s", "GB/s", "roof", "peak MiB", "kernels"):
            assert column in head
    assert max(map(len, shown(120, True))) <= 120


def test_columns_are_explained_before_the_first() -> None:
    lines = shown(120, False)
    assert " ".join(lines).index(LEGEND[:20]) < " ".join(lines).index("  side")


def test_a_ratio_beyond_its_spread_is_coloured() -> None:
    console = Console(record=True, width=120)
    report = Printout(console)
    report.show([ROW, replace(ROW, side="freezekit", ratio=Spread(1.2, 1.1, 1.3))])
    report.show([ROW, replace(ROW, side="freezekit", ratio=Spread(1.2, 1.0, 1.3))])
    text = [line for line in console.export_text(styles=True).splitlines() if "freezekit" in line]
    assert ["\x1b[31m" in line for line in text] == [True, False]
