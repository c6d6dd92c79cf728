"""The checks of promises: what they report and how they exit. Their figures are no test's business."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import dgrad, overhead, targets
from bench.timing import Interleaved

ONE = [replace(overhead.CASES[0], bound=1e9)]


def test_overhead_reports_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--rounds", "1", "--calls", "1"]) == 0
    text = capsys.readouterr().out
    assert all(case.name in text for case in overhead.CASES)
    assert {case.bound for case in overhead.CASES} == {1.02, 1.05}
    assert all(call.name in text for call in overhead._calls())
    assert {call.bound for call in overhead._calls()} == {1.15, 1.05}
    assert " disabled\n" in text


@pytest.mark.parametrize(("bound", "code"), [(1e9, 0), (0.0, 1)])
def test_overhead_check_decides_the_exit_code(bound: float, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "CASES", [replace(ONE[0], bound=bound)])
    monkeypatch.setattr(overhead.OperatorCall, "bound", 1e9)  # the real ones depend on how fast the machine is
    assert overhead.main(["--rounds", "1", "--calls", "1", "--check"]) == code


def test_overhead_leaves_the_threads_alone() -> None:
    before = torch.get_num_threads()
    overhead.main(["--rounds", "1", "--calls", "1"])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("measured", "code"), [(1.0, 0), (2.0, 1)])
def test_targets_check(
    measured: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "CASES", ONE)
    real = targets.layer_target
    asked = []

    def scripted(name: str, *rest: object) -> targets.Target:
        asked.append(real(name, *rest))  # type: ignore[arg-type]
        return targets.Target(name, 1.5, measured)

    monkeypatch.setattr(targets, "layer_target", scripted)
    monkeypatch.setattr(dgrad, "points", lambda: iter([]))
    assert targets.main(["--layers", "tiny", "--repeat", "1", "--threads", "1", "--check"]) == code
    assert [target.bound for target in asked] == [1.03, 0.6]
    assert all(target.measured > 0 for target in asked)
    assert ("FAILS" in capsys.readouterr().out) == bool(code)


def of(*ratios: float) -> Interleaved:
    """Rounds in which stock takes a second."""
    return Interleaved({"stock": [1.0] * len(ratios), "freezekit": list(ratios)})


@pytest.mark.parametrize(
    ("timed", "code", "counts"),
    [
        (of(0.9, 1.0, 1.02), 0, [1]),
        (of(0.9, 1.0, 1.1), 0, [1, 3]),
        (of(1.02, 1.04, 1.1), 0, [1, 3, 24]),  # by the shortest time
        (of(1.04, 1.04, 1.1), 1, [1, 3, 24]),
    ],
)
def test_every_point_of_the_sweep_counts_and_is_measured_longer_before_it_fails(
    timed: Interleaved,
    code: int,
    counts: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow = dgrad.Point(64, 3, 3, 64, 1, 1)
    rounds: list[int] = []

    def scripted(point: dgrad.Point, count: int, seed: int) -> Interleaved:
        if point != slow:
            return of(0.4, 0.5, 0.6)
        rounds.append(count)
        return timed

    monkeypatch.setattr(dgrad.Point, "timed", scripted)
    assert slow in dgrad.points()
    assert dgrad.main(["--rounds", "3", "--check"]) == code
    said = capsys.readouterr().out
    assert slow.name in said
    assert (f"{slow.name}  above" in said) == bool(code)
    assert f"{len(list(dgrad.points()))} points, {code} above" in said
    assert rounds == counts


def test_half_of_the_sweep_runs_on_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dgrad.Point, "timed", lambda *_: of(1.0))
    assert dgrad.main(["--threads", "2"]) == 0
    said = capsys.readouterr().out
    assert all((point.name in said) == (point.threads == 2) for point in dgrad.points())


def test_a_point_is_timed() -> None:
    assert dgrad.Point(2, 3, 3, 4, 1, 1).timed(1, 0).least("freezekit", "stock") > 0
