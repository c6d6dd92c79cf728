"""Networks on data, in processes of their own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.clients import on_data
from tests.clients.kept import Network
from tests.clients.on_data import Row, Side, main, measured, summary

PLANE = 32 * 32 * 4  # bytes of one channel


def network(name: str, call: Callable[[nn.Module, Tensor], Any] = lambda model, x: model(x)) -> Network:
    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.SiLU())  # noqa: E731
    return Network("own", name, make, (2, 3, 32, 32), call)


def scaled_at_random(model: nn.Module, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(time.time_ns())
    return model(x) * torch.rand(8, 1, 1, generator=generator)


def raises(model: nn.Module, x: Tensor) -> Tensor:
    raise ValueError("no such thing\nbut another")


def test_a_network_is_measured() -> None:
    row = measured(network("convs and SiLU"))
    assert (row.failure, row.stock) == ("", 12 * PLANE)
    assert row.sides == {way: Side(8 / 12, True, 0.0) for way in ("converted", "enabled")}
    times = {way: side.time for way, side in row.sides.items()}
    assert all(0 < time < 100 for time in times.values())
    told = [f"0.667, =, =, {time:.3f}" for time in times.values()]
    assert str(row) == f"| own: convs and SiLU | 0.0 MiB | {told[0]} | {told[1]} |"


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (raises, "ValueError: no such thing"),
        (lambda model, x: model(x) * 0, "the gradient of the input is 0 or not finite"),
        (scaled_at_random, "stock is not stock's"),
        (lambda model, x: time.sleep(60), "more than 1 s"),
        (lambda model, x: os._exit(3), "its process ended with 3"),
        (lambda model, x: model(x.expand(2**40, *x.shape[1:])), "RuntimeError"),
    ],
    ids=["raises", "no gradient", "random", "slow", "dies", "memory"],
)
def test_a_failure_is_a_row(call: Callable[[nn.Module, Tensor], Any], why: str) -> None:
    row = measured(network("other", call), seconds=1 if why.startswith("more") else 60)
    assert why in row.failure
    assert not row.sides


def test_two_images_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def measured(network: Network, count: int) -> Row:
        counts.append(count)
        right = count == 2 or network.name == "right"
        return Row("own", network.name, 8, {"converted": Side(0.5, True, 0.0), "enabled": Side(0.5, right, 0.0)})

    monkeypatch.setattr(on_data, "measure_images", measured)
    assert not any(on_data.measure(network(name)).sides["enabled"].is_wrong() for name in ("right", "wrong"))
    assert counts == [1, 1, 2]


def test_what_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_data, "PARAMETERS", 15)
    assert "million parameters" in measured(network("large")).failure


def test_a_difference_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of rows that are there already, to which those that are missing are added."""
    kept = {"converted": Side(0.5, True, 1e-6), "enabled": Side(0.25, True, 0.0)}
    wrong = {"converted": Side(0.5, False, 0.0), "enabled": Side(0.75, True, float("nan"))}
    rows = [Row("own", "right", 8, kept), Row("own", "fails", failure="why"), Row("own", "wrong", 8, wrong)]
    file = tmp_path / "rows.json"
    file.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows))

    def own() -> list[Network]:
        return [network("right"), network("fails"), network("wrong"), network("new")]

    monkeypatch.setattr(on_data, "CLIENTS", (own,))
    monkeypatch.setattr(on_data, "missing", lambda client: "")
    assert main([str(file)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("| own: new |")
    assert "| own | 3 |" in printed
    assert "gradients in 2 of 3, the largest difference 1.0e-06; beyond rounding: own: wrong" in printed
    assert [Row.of(line).name for line in file.read_text().splitlines()] == ["right", "fails", "wrong", "new"]


def test_mean_and_median() -> None:
    scales = {"converted": 1, "enabled": 2}
    sides = [{way: Side(n, True, 0.0, time=n * scale) for way, scale in scales.items()} for n in (0.1, 0.2, 0.6)]
    text = summary([*(Row("own", "", 8, each) for each in sides), Row("own", "", failure="why")])
    assert "| all | 3 | 0.300 | 0.200 | 0.300 | 0.200 | 0.300 | 0.600 |" in text
