"""A side in a process of its own: what it measures comes back, and a hang or a crash costs only its own rows."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import child as processes
from bench import compare, options, sections, sides
from bench.child import READY, Child, Lost, measure_there
from bench.environment import Peaks
from bench.report import Printout
from bench.sections import kernels
from bench.settings import Settings
from tests.bench import lost as lost_processes
from tests.bench.lost import crash, crash_at_once, hang

PATIENCE = 300.0  # seconds, which no test waits for


def settings_of(*more: str) -> Settings:
    return options.parse(["--device", "cpu", "--layers", "tiny", "--repeat", "1", *more]).settings


def take_four_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than the losses after which a side's process is not started again."""
    assert Child.MOST_LOSSES == 3
    cases = sections.SECTIONS["layers"]
    monkeypatch.setitem(sections.SECTIONS, "layers", lambda settings: cases(settings)[:4])


def spoiled() -> str:
    """What a kernel does that leaves an error to all later calls of its process."""
    processes._error_that_stays = lambda: "CUDA error: an illegal memory access was encountered"
    return "the case's own rows"


def test_rows_come_back() -> None:
    child, settings = Child(), settings_of()
    make = sections.SECTIONS["layers"](settings)[0]
    for _ in range(2):
        rows = child.ask(partial(measure_there, make, settings, Peaks(1.0, 1.0)), PATIENCE)
        assert [row.side for row in rows] == ["stock", "freezekit"]
        assert all(row.seconds is not None for row in rows)
    child.close()


def test_lost_processes_speak_as_others_do() -> None:
    assert lost_processes.READY == READY


def test_a_hang_ends_after_its_limit() -> None:
    child = Child(hang)
    start = time.monotonic()
    with pytest.raises(Lost, match="no answer in 0.2 s"):
        child.ask(os.getpid, 0.2)
    assert time.monotonic() - start < 120
    assert not child._process.is_alive()


def test_after_an_error_that_stays_the_next_work_meets_a_new_process() -> None:
    child = Child()
    first = child.ask(os.getpid, PATIENCE)
    assert child.ask(os.getpid, PATIENCE) == first
    assert child.ask(spoiled, PATIENCE) == "the case's own rows"
    assert child.ask(os.getpid, PATIENCE) != first
    child.close()


@pytest.mark.parametrize(("what", "code"), [(crash, 7), (crash_at_once, 8)])
def test_a_crash_is_told_with_its_exit_code(what, code: int) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Lost, match=f"ended with exit code {code}"):
        Child(what).ask(os.getpid, PATIENCE)


def test_it_is_started_again_but_not_for_ever() -> None:
    child = Child(crash)
    for _ in range(Child.MOST_LOSSES):
        with pytest.raises(Lost, match="ended"):
            child.ask(os.getpid, PATIENCE)
    with pytest.raises(Lost, match="lost 3 times"):
        child.ask(os.getpid, PATIENCE)


def refused() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nand more")


def test_work_that_fails_costs_itself_and_no_process() -> None:
    child = Child()
    first = child.ask(os.getpid, PATIENCE)
    for _ in range(Child.MOST_LOSSES + 1):
        with pytest.raises(Lost, match=r"^OutOfMemoryError: CUDA out of memory\.$"):
            child.ask(refused, PATIENCE)
    assert child.ask(os.getpid, PATIENCE) == first
    child.close()


def test_memory_that_is_free_is_given_to_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = sides.Side("freezekit_channels_last", lambda module: module, channels_last=True, hopper=True)
    monkeypatch.setitem(sides.SIDES, lost.name, lost)
    take_four_layers(monkeypatch)
    done: list[str] = []

    def ask(self: Child, *_: object) -> object:
        done.append("ask")
        raise Lost("gone")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    monkeypatch.setattr(Child, "start", lambda self: None)
    monkeypatch.setattr(Child, "ask", ask)
    compare.Run(replace(settings_of(), sides=("stock", lost.name)), Printout(Console(quiet=True)), None).go(["layers"])
    assert done == ["empty", "ask"] * 4


def test_what_is_known_is_written_before_a_process_may_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lost = sides.Side("freezekit_channels_last", lambda module: module, channels_last=True, hopper=True)
    monkeypatch.setitem(sides.SIDES, lost.name, lost)
    take_four_layers(monkeypatch)
    settings, file = replace(settings_of(), sides=("stock", lost.name)), tmp_path / "compare.json"
    seen = []

    def look(self: Child, *_: object) -> object:
        seen.append([row["side"] for row in json.loads(file.read_text())["rows"]])
        raise Lost("gone")

    monkeypatch.setattr(Child, "start", lambda self: None)
    monkeypatch.setattr(Child, "ask", look)
    compare.Run(settings, Printout(Console(quiet=True)), None, file).go(["layers"])
    assert seen == [["stock"] * 4 + [lost.name] * i for i in range(4)]


def test_a_run_goes_on_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = sides.Side("freezekit_channels_last", lambda module: module, channels_last=True, hopper=True)
    monkeypatch.setitem(sides.SIDES, lost.name, lost)
    take_four_layers(monkeypatch)
    settings = replace(settings_of(), sides=("stock", "stock_channels_last", lost.name))
    run = compare.Run(settings, Printout(Console(quiet=True)), None)
    assert run.here == ("stock", "stock_channels_last")
    run.children = {lost.name: Child(crash)}
    run.go(["layers"])
    assert len(run.rows) == 4 * 3
    assert {bool(row.failure) for row in run.rows if row.side == lost.name} == {True}
    assert {row.failure for row in run.rows if row.side != lost.name} == {""}
    assert run.failures == 4


def test_a_hang_costs_half_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = sides.Side("freezekit_channels_last", lambda module: module, channels_last=True, hopper=True)
    monkeypatch.setitem(sides.SIDES, lost.name, lost)
    take_four_layers(monkeypatch)
    limits = []

    def hang_for(self: Child, work: object, seconds: float) -> object:
        limits.append(seconds)
        raise Lost("no answer")

    monkeypatch.setattr(Child, "start", lambda self: None)
    monkeypatch.setattr(Child, "ask", hang_for)
    run = compare.Run(replace(settings_of(), sides=("stock", lost.name)), Printout(Console(quiet=True)), 1e6)
    run.go(["layers"])
    assert len(limits) == 4
    assert all(0 < limit <= 1e6 / 2 for limit in limits)


def test_the_forum_s_tables_are_made_apart_where_kernels_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides.Side, "is_apart", lambda side, device: side.name == kernels.OWN)
    monkeypatch.setattr(Child, "start", lambda self: None)
    monkeypatch.setattr(Child, "ask", lambda self, work, seconds: work())
    run = compare.Run(settings_of(), Printout(Console(quiet=True)), None)
    run.go(["kernels"])
    assert [(made.side, made.failure) for made in run.kernels] == [("stock", ""), ("freezekit", "")] * 2

    def gone(self: Child, *_: object) -> object:
        raise Lost("the side's process ended with exit code -6")

    monkeypatch.setattr(Child, "ask", gone)
    run = compare.Run(settings_of(), Printout(Console(quiet=True)), None)
    run.go(["kernels"])
    assert run.failures == 4
    assert {made.failure for made in run.kernels} == {"the side's process ended with exit code -6"}
