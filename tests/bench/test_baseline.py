"""Two runs compared: noise is no change, and bytes have no noise."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench import baseline
from bench.document import NotThisSchema
from bench.measure import Measured
from bench.report import Printout
from bench.timing import Spread
from tests.bench.test_document import ROW, VALID

OURS = replace(ROW, side="freezekit", ratio=Spread(1.0, 0.98, 1.02), bytes_kept=0, peak_bytes=100)


def found(after: object) -> list[tuple[str, bool]]:
    return [(change.what, change.worse) for change in baseline.changes([OURS], [after])]  # type: ignore[list-item]


@pytest.mark.parametrize("ratio", [Spread(1.01, 0.99, 1.03), Spread(1.06, 1.04, 1.08), Spread(0.94, 0.9, 0.96)])
def test_what_the_spread_explains_is_noise(ratio: Spread) -> None:
    assert found(replace(OURS, ratio=ratio)) == []


def test_what_it_does_not_explain_is_a_change() -> None:
    assert found(replace(OURS, ratio=Spread(1.2, 1.15, 1.25))) == [("ratio to stock 1.000 -> 1.200 (+20%)", True)]
    assert found(replace(OURS, ratio=Spread(0.5, 0.4, 0.6))) == [("ratio to stock 1.000 -> 0.500 (-50%)", False)]


def test_few_rounds_claim_little_and_many_much() -> None:
    def pair(rounds: int, ratio: float) -> list[baseline.Difference]:
        before = replace(OURS, rounds=rounds)
        return baseline.changes([before], [replace(before, ratio=Spread(ratio, ratio - 0.02, ratio + 0.02))])

    assert not pair(3, 1.3)
    assert not pair(15, 1.05)
    assert pair(15, 1.1)
    assert pair(200, 1.03)


def test_a_thousand_pairs_of_equal_runs() -> None:
    order = random.Random(0)

    def run(rounds: int) -> Measured:
        values = [order.gauss(1.0, 0.05) for _ in range(rounds)]
        return replace(OURS, rounds=rounds, ratio=Spread.of(values))

    for rounds in (3, 5, 9, 15, 50):
        assert sum(bool(baseline.changes([run(rounds)], [run(rounds)])) for _ in range(1000)) <= 5, rounds


def test_a_change_below_two_percent_is_too_small_to_name() -> None:
    narrow = replace(OURS, ratio=Spread(1.0, 1.0, 1.0))
    assert baseline.changes([narrow], [replace(OURS, ratio=Spread(1.021, 1.021, 1.021))])
    assert baseline.changes([narrow], [replace(OURS, ratio=Spread(1.019, 1.019, 1.019))]) == []


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
    baseline.show(Printout(console), path, [replace(OURS, bytes_kept=1 << 20), ROW])
    text = console.export_text()
    assert "abc, 2026-01-01" in text
    assert "worse   layers: tiny dense 8x12x12, frozen, step, freezekit: bytes kept 0 -> 1 MiB" in text
    assert "1 of 2 measurements are in both runs; 1 changed beyond noise" in text


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text("{}")
    with pytest.raises(NotThisSchema, match="'version' is a required property"):
        baseline.show(Printout(Console(quiet=True)), path, [])
