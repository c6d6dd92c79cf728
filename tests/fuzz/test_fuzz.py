"""300 cases of the fuzzer in the suite, and proof that it finds what is wrong and says how to repeat it."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest
import torch

from freezekit.functional import conv2d
from tests.fuzz import calls, sequences
from tests.fuzz.__main__ import main
from tests.fuzz.run import describe, run_case

CASES, PART = 300, 30


@pytest.mark.parametrize("first", range(0, CASES, PART))
def test_cases(first: int) -> None:
    outcomes = [run_case(0, index) for index in range(first, first + PART)]
    failures = [outcome.failure for outcome in outcomes if outcome.failure]
    assert not failures, "\n\n".join(failures)
    assert sum(bool(outcome.passed_over) for outcome in outcomes) <= PART // 10


@pytest.mark.parametrize("index", [590, 9497], ids=["float16", "bfloat16"])
def test_a_call_that_ends_torch_itself_does_not_end_the_fuzzer(index: int) -> None:
    assert run_case(0, index).failure == ""


def test_the_cases_reach_what_they_should() -> None:
    """Valid calls are most, and every dtype, layout, backend, state and mode occurs among them."""
    drawn = [calls.draw(random.Random(f"0/{index}")) for index in range(CASES)]
    for attribute, least in (("dtype", 4), ("backend", 3), ("mode", 3), ("needs", 8), ("layouts", 30)):
        assert len({getattr(call, attribute) for call in drawn}) >= least, attribute
    assert any(call.unbatched for call in drawn)
    assert any(call.input_size[0] == 0 for call in drawn)
    assert sum(isinstance(call.settings["padding"], str) for call in drawn) >= 10
    assert sum(call.settings["groups"] > 1 for call in drawn) >= 50

    def valid(call: calls.Call) -> bool:
        try:
            torch.nn.functional.conv2d(torch.empty(call.input_size), torch.empty(call.weight_size), **call.settings)
        except RuntimeError:
            return False
        return True

    assert 0.7 * CASES < sum(map(valid, drawn)) < CASES


def test_lives_reach_fused_steps() -> None:
    assert sum(sequences.check(random.Random(f"fused/{index}")).fused for index in range(16)) >= 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_that_dies_is_noticed_and_one_that_raises_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    call = next(call for call in (calls.draw(random.Random(i)) for i in range(99)) if call.device == "cpu")
    assert not calls._torch_crashes([], call), "the child raises: there are no tensors"
    monkeypatch.setattr(calls, "_run_stock", lambda made, call: os.kill(os.getpid(), signal.SIGKILL))
    assert calls._torch_crashes([], call)


def test_a_case_follows_from_its_numbers() -> None:
    assert describe(1, 2) == describe(1, 2) != describe(2, 2)


def test_a_wrong_result_is_found_and_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = conv2d

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        y = right(*args, **kwargs)
        return torch.where(y == 2, torch.full_like(y, 3), y)

    monkeypatch.setattr(calls, "conv2d", wrong)
    assert main(["--seed", "5", "--cases", "40"]) == 1
    text = capsys.readouterr().err
    command = text.split("repeat it with: python -m tests.fuzz ")[1].split()
    assert main(command) == 1
    monkeypatch.undo()
    assert main(command) == 0
