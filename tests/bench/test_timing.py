"""The arithmetic of timings, on clocks that are told what to say."""

from __future__ import annotations

import gc
import itertools
from types import SimpleNamespace

import pytest
import torch

from bench.timing import CudaClock, HostClock, Interleaved, Spread, Timeable, interleave


class Scripted:
    """A clock whose machine gets slower with every reading; `cost` tells a step's share."""

    def __init__(self) -> None:
        self.readings = itertools.count(1)
        self.called: list[str] = []

    def __call__(self, step: Timeable, calls: int) -> float:
        name = step()
        assert isinstance(name, str)
        self.called.append(name)
        return next(self.readings) * {"slow": 3.0, "fast": 1.0}[name] / calls


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread(10.0, 8.0, 13.0).relative == 0.25


def test_spread_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        Spread.of([])


def test_each_round_runs_every_step_once() -> None:
    clock = Scripted()
    interleave({"slow": lambda: "slow", "fast": lambda: "fast"}, clock=clock, rounds=6, warmup=0)
    rounds = [set(clock.called[i : i + 2]) for i in range(0, 12, 2)]
    assert rounds == [{"slow", "fast"}] * 6


def test_order_within_rounds_is_shuffled_by_the_seed() -> None:
    def order(seed: int) -> list[str]:
        clock = Scripted()
        interleave({"slow": lambda: "slow", "fast": lambda: "fast"}, clock=clock, rounds=12, seed=seed)
        return clock.called

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert {tuple(order(1)[i : i + 2]) for i in range(0, 24, 2)} == {("slow", "fast"), ("fast", "slow")}


def test_ratio_is_taken_within_rounds() -> None:
    drifting = Interleaved({"ours": [2.0, 20.0, 200.0], "stock": [1.0, 10.0, 100.0]})
    assert drifting.ratio("ours", "stock") == Spread(2.0, 2.0, 2.0)
    assert drifting.time("ours").median == 20.0


def test_warm_up_is_not_timed_and_calls_are_averaged() -> None:
    clock, ran = Scripted(), []

    def step() -> str:
        ran.append(1)
        return "fast"

    timed = interleave({"only": step}, clock=clock, rounds=2, calls=4, warmup=3)
    assert len(ran) == 3 + 2
    assert timed.seconds["only"] == [1 / 4, 2 / 4]


def test_host_clock_calls_as_often_as_told() -> None:
    ran: list[int] = []
    assert HostClock()(lambda: ran.append(1), 7) > 0
    assert len(ran) == 7


def test_collector_rests_meanwhile_and_is_restored_after_an_error() -> None:
    states: list[bool] = []

    def step() -> None:
        states.append(gc.isenabled())
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        interleave({"only": step}, clock=HostClock(), rounds=1, warmup=0)
    assert states == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(("steps", "rounds", "calls"), [({}, 1, 1), ({"a": list}, 0, 1), ({"a": list}, 1, 0)])
def test_nothing_to_time_is_an_error(steps: dict[str, Timeable], rounds: int, calls: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        interleave(steps, clock=HostClock(), rounds=rounds, calls=calls)


class Gpu:
    """A device that works off its queue while the host goes on, in seconds; sleeping takes a nanosecond a cycle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.free = 0.0
        self.waits: list[float] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.host, gpu.free)

            def query(self) -> bool:
                return self.at <= gpu.host

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end: object) -> float:
                return (end.at - self.at) * 1e3  # type: ignore[attr-defined]

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=0))

    def sleep(self, cycles: int) -> None:
        self.waits.append(cycles * 1e-9)
        self.launch(host=5e-6, device=cycles * 1e-9)

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.free = max(self.free, self.host) + device


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("host", [60e-6, 300e-6, 5e-3])
def test_a_gpu_s_clock_does_not_measure_the_host(host: float, cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    clock = CudaClock(torch.device("cpu"), cold)

    def layer() -> None:
        for _ in range(10):
            gpu.launch(host=host / 10, device=2e-6)

    assert [clock(layer, 2) for _ in range(3)] == pytest.approx([20e-6] * 3)
    assert gpu.waits[-1] == pytest.approx(1e-3 if host < 1e-3 else 8e-3, rel=0.01)


def test_a_step_that_synchronises_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    clock = CudaClock(torch.device("cpu"))

    def step() -> None:
        gpu.host = max(gpu.host, gpu.free)
        gpu.launch(host=1e-4, device=1e-3)

    assert clock(step, 1) == pytest.approx(1.1e-3)
    assert gpu.waits[-1] == pytest.approx(clock.LONGEST_WAIT, rel=0.01)
