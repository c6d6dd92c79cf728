"""Two runs compared: noise is no change, and bytes have no noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench import baseline
from bench.document import NotThisSchema
from bench.report import Report
from bench.timing import Spread
from tests.bench.test_document import ROW, VALID

OURS = replace(ROW, side="freezekit", ratio=Spread(1.0, 0.98, 1.02), bytes_kept=0, peak_bytes=100)


def found(after: object) -> list[tuple[str, bool]]:
    return [(change.what, change.worse) for change in baseline.changes([OURS], [after])]  # type: ignore[list-item]


@pytest.mark.parametrize("ratio", [Spread(1.01, 1.0, 1.03), Spread(1.1, 1.01, 1.2), Spread(0.97, 0.9, 0.99)])
def test_ranges_that_meet_are_noise(ratio: Spread) -> None:
    assert found(replace(OURS, ratio=ratio)) == []


def test_ranges_apart_are_a_change() -> None:
    assert found(replace(OURS, ratio=Spread(1.2, 1.15, 1.3))) == [("ratio to stock 1.000 -> 1.200 (+20%)", True)]
    assert found(replace(OURS, ratio=Spread(0.5, 0.4, 0.6))) == [("ratio to stock 1.000 -> 0.500 (-50%)", False)]


def test_a_change_below_two_percent_is_too_small_to_name() -> None:
    assert found(replace(OURS, ratio=Spread(1.021, 1.0205, 1.03))) == [("ratio to stock 1.000 -> 1.021 (+2%)", True)]
    narrow = replace(OURS, ratio=Spread(1.0, 1.0, 1.0))
    assert baseline.changes([narrow], [replace(OURS, ratio=Spread(1.01, 1.005, 1.015))]) == []


def test_a_byte_is_a_change() -> None:
    assert found(replace(OURS, bytes_kept=1 << 20)) == [("bytes kept 0 -> 1 MiB", True)]
    assert found(replace(OURS, peak_bytes=None)) == []


def test_stock_is_not_compared_with_itself_nor_new_rows_with_anything() -> None:
    assert baseline.changes([ROW], [replace(ROW, ratio=Spread(2.0, 2.0, 2.0))]) == []
    assert baseline.changes([OURS], [replace(OURS, case="another", bytes_kept=5)]) == []


def test_shown_with_the_earlier_runs_commit(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**VALID, "rows": [OURS.to_dict()]}))
    console = Console(record=True, width=200)
    baseline.show(Report(console), path, [replace(OURS, bytes_kept=1 << 20), ROW])
    text = console.export_text()
    assert "abc, 2026-01-01" in text
    assert "worse   layers: tiny dense 8x12x12, frozen, step, freezekit: bytes kept 0 -> 1 MiB" in text
    assert "1 of 2 measurements are in both runs; 1 changed beyond noise" in text


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text("{}")
    with pytest.raises(NotThisSchema, match="lacks version"):
        baseline.show(Report(Console(quiet=True)), path, [])
