"""The checks of promises: what they report and how they exit. Their figures are no test's business."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

import pytest
import torch
from torch import nn

from bench import dgrad, overhead, targets, tiny
from bench.timing import Interleaved

ONE = [replace(overhead.CASES[0], bound=1e9)]


def of(*ratios: float) -> Interleaved:
    """Rounds in which stock takes a second."""
    return Interleaved({"stock": [1.0] * len(ratios), "freezekit": list(ratios)})


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
    monkeypatch.setattr(tiny, "cases", lambda: iter([]))
    assert targets.main(["--layers", "tiny", "--repeat", "1", "--threads", "1", "--check"]) == code
    assert [target.bound for target in asked] == [1.03, 0.6]
    assert all(target.measured and target.measured > 0 for target in asked)
    assert ("FAILS" in capsys.readouterr().out) == bool(code)


def test_what_was_not_run_does_not_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    why = "timm is not installed: run `make clients`"
    monkeypatch.setattr(overhead, "CASES", ONE)
    monkeypatch.setattr(targets, "layer_target", lambda name, *_: targets.Target(name, 1.5, 1.0))
    monkeypatch.setattr(dgrad, "points", lambda: iter([]))
    monkeypatch.setattr(tiny, "missing", lambda library: why if library == "timm" else "")
    monkeypatch.setattr(tiny.TinyNetwork, "timed", lambda *_: of(1.0))
    assert targets.main(["--repeat", "1", "--threads", "1"]) == 0
    assert targets.main(["--repeat", "1", "--threads", "1", "--check"]) == 1
    said = capsys.readouterr().out
    for network in tiny.cases():
        told = f"not run               tiny  {network.name}: {why}"
        assert (told in said) == (network.library == "timm")
        assert (f"holds  1.000 <= 1.02  tiny  {network.name}" in said) == (network.library != "timm")


@pytest.mark.parametrize(("timed", "code", "counts"), [(of(1.0), 0, [3]), (of(1.03), 1, [3, 12])])
def test_tiny_networks(
    timed: Interleaved,
    code: int,
    counts: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rounds: list[int] = []

    def scripted(network: tiny.TinyNetwork, count: int, seed: int) -> Interleaved:
        rounds.append(count)
        return timed

    monkeypatch.setattr(tiny, "missing", lambda library: "")
    monkeypatch.setattr(tiny.TinyNetwork, "timed", scripted)
    name = "efficientvit_b0, 32x32, frozen"
    assert tiny.main(["--rounds", "3", "--only", name, "--check"]) == code
    assert rounds == counts
    assert (f"{name}  above" in capsys.readouterr().out) == bool(code)


def test_a_tiny_network_is_timed() -> None:
    class Tiny(tiny.TinyNetwork):
        def make(self) -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 2, 3), nn.SiLU(), nn.Dropout()).eval().requires_grad_(not self.frozen)

    for frozen in (True, False):
        assert Tiny("timm", "own", 8, frozen).timed(1, 0).ratio("freezekit", "stock").median > 0


def test_libraries_that_are_not_there_are_told() -> None:
    assert tiny.missing("no_such_package") == "no_such_package is not installed: run `make clients`"


@pytest.mark.parametrize(
    ("ratios", "code", "counts"),
    [
        ((1.0, 1.02), 0, [6]),
        ((0.9, 1.0, 1.0, 1.0, 1.0, 1.1), 0, [6, 3]),  # one of nine says nothing
        ((1.02, 1.02, 1.02, 1.02, 1.1, 1.1), 0, [6, 3, 21]),
        ((1.02, 1.02, 1.02, 1.1, 1.1, 1.1), 1, [6, 3, 21]),  # open: at most 1.1
        ((1.04,), 1, [6, 3, 21]),
    ],
)
def test_every_point_of_the_sweep_counts_and_is_measured_longer_before_it_fails(
    ratios: tuple[float, ...],
    code: int,
    counts: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow = dgrad.Point(64, 3, 3, 64, 1, 1)
    rounds: list[int] = []

    def scripted(point: dgrad.Point, count: int, seed: int) -> Interleaved:
        if point != slow:
            return of(*[0.5] * count)
        rounds.append(count)
        return of(*islice(cycle(ratios), count))

    monkeypatch.setattr(dgrad.Point, "timed", scripted)
    assert slow in dgrad.points()
    assert dgrad.main(["--rounds", "3", "--check"]) == code
    said = capsys.readouterr().out
    assert slow.name in said
    assert (f"{slow.name}  above" in said) == bool(code)
    assert f"{len(list(dgrad.points()))} points, {code} above" in said
    assert rounds == counts


def test_half_of_the_sweep_runs_on_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dgrad.Point, "timed", lambda *_: of(*[1.0] * 6))
    assert dgrad.main(["--threads", "2"]) == 0
    said = capsys.readouterr().out
    assert all((point.name in said) == (point.threads == 2) for point in dgrad.points())


def test_a_point_is_timed() -> None:
    assert dgrad.Point(2, 3, 3, 4, 1, 1).timed(1, 0).ratio("freezekit", "stock").median > 0
