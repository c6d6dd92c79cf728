"""Bytes that networks keep, counted without data."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import nn

from tests.clients.kept import Counted, Network, count, main, summary


def test_a_network_is_counted_in_each_way() -> None:
    network = Network("own", "conv and SiLU", lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU()))
    found = count(network)
    plane = 2 * 64 * 64 * 4  # bytes of one channel
    assert (found.stock, found.converted, found.enabled) == (7 * plane, 4 * plane, 4 * plane)
    assert found.kinds == {"SiLU": 4 * plane}


def test_mean_and_median() -> None:
    counted = [Counted(100, converted, enabled, Counter()) for converted, enabled in ((50, 10), (30, 20))]
    assert summary("own", [*counted, Counted(10, 1, 9, Counter())]) == "| own | 3 | 0.300 | 0.300 | 0.400 | 0.200 |"


def test_a_client_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tests.clients.kept.missing", lambda client: f"{client} is not installed")
    assert main(["--client", "lpips"]) == 1
    assert "lpips is not installed" in capsys.readouterr().err
