"""A side in a process of its own: what it measures comes back, and a hang or a crash costs only its own rows."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from rich.console import Console

from bench import compare, options, sections, sides
from bench.child import READY, Child, Lost
from bench.environment import Peaks
from bench.measure import MakeCase
from bench.report import Printout
from bench.settings import Settings

PEAKS = Peaks(1.0, 1.0)


def case() -> tuple[MakeCase, Settings]:
    settings = options.parse(["--device", "cpu", "--layers", "tiny", "--repeat", "1"]).settings
    return sections.SECTIONS["layers"](settings)[0], settings


def hang(pipe: Connection) -> None:
    pipe.send(READY)
    pipe.recv()
    time.sleep(600)


def crash(pipe: Connection) -> None:
    pipe.send(READY)
    pipe.recv()
    os._exit(7)


def crash_at_once(pipe: Connection) -> None:
    os._exit(8)


def test_rows_come_back() -> None:
    child = Child()
    for _ in range(2):
        rows = child.measure(*case(), PEAKS)
        assert [row.side for row in rows] == ["stock", "freezekit"]
        assert all(row.seconds is not None for row in rows)
    child.close()


def test_a_hang_ends_after_its_limit() -> None:
    child = Child(hang, limit=0.2)
    start = time.monotonic()
    with pytest.raises(Lost, match="no answer in 0.2 s"):
        child.measure(*case(), PEAKS)
    assert time.monotonic() - start < 120
    assert not child._process.is_alive()


@pytest.mark.parametrize(("what", "code"), [(crash, 7), (crash_at_once, 8)])
def test_a_crash_is_told_with_its_exit_code(what, code: int) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Lost, match=f"ended with exit code {code}"):
        Child(what).measure(*case(), PEAKS)


def test_it_is_started_again_but_not_for_ever() -> None:
    child = Child(crash)
    for _ in range(Child.MOST_LOSSES):
        with pytest.raises(Lost, match="ended"):
            child.measure(*case(), PEAKS)
    with pytest.raises(Lost, match="lost 3 times"):
        child.measure(*case(), PEAKS)


def test_what_is_known_is_written_before_a_process_may_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lost = sides.Side("freezekit_channels_last", lambda module: module, channels_last=True, hopper=True)
    monkeypatch.setitem(sides.SIDES, lost.name, lost)
    settings, file = replace(case()[1], sides=("stock", lost.name)), tmp_path / "compare.json"
    seen = []

    def look(self: Child, *_: object) -> object:
        seen.append([row["side"] for row in json.loads(file.read_text())["rows"]])
        raise Lost("gone")

    monkeypatch.setattr(Child, "measure", look)
    compare.Run(settings, Printout(Console(quiet=True)), None, file).go(["layers"])
    assert [len(rows) for rows in seen] == [2 * i + 1 for i in range(8)]
    assert all(rows[-1] == "stock" for rows in seen)


def test_a_run_goes_on_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = sides.Side("freezekit_channels_last", lambda module: module, channels_last=True, hopper=True)
    monkeypatch.setitem(sides.SIDES, lost.name, lost)
    settings = replace(case()[1], sides=("stock", "stock_channels_last", lost.name))
    run = compare.Run(settings, Printout(Console(quiet=True)), None)
    assert run.settings.sides == ("stock", "stock_channels_last")
    run.children = {lost.name: Child(crash)}
    run.go(["layers"])
    assert len(run.rows) == 8 * 3
    assert {bool(row.failure) for row in run.rows if row.side == lost.name} == {True}
    assert {row.failure for row in run.rows if row.side != lost.name} == {""}
    assert run.failures == 8
