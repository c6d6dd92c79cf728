"""The examples run, and what they show is what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
Rows = dict[tuple[str, str], dict[str, Any]]
OPTIMIZERS = ("SGD", "SGD+momentum", "Adam", "AdamW")


def run(code: str) -> str:
    """Run a line of Python in the examples' folder, as a script there would run."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def two_step() -> Rows:
    """The rows of the table, by (way, what zero_grad leaves)."""
    out = run("import json, torch, two_step; torch.set_num_threads(1); print(json.dumps(two_step.measure()))")
    return {(r["way"], r["zero_grad"]): r for r in json.loads(out.splitlines()[-1])}


WAYS = ("neither", "only step one", "only step two", "both", "freeze(...)")
LEFT = ("zeros", "None")


def test_answer_1_step_one_takes_the_wgrad_and_leaves_the_dgrad(
    two_step: Rows,
) -> None:
    for (way, _), row in two_step.items():
        without = way in ("neither", "only step two")
        for library in ("", "_freezekit"):
            assert row["wgrad" + library] == (3 if without else 2), (way, library)
            assert row["dgrad" + library] == 2, (way, library)


def test_answer_2_outside_the_optimizer_nothing_moves(two_step: Rows) -> None:
    for way in ("only step two", "both", "freeze(...)"):
        for left in LEFT:
            assert [two_step[way, left][o] for o in OPTIMIZERS] == [0] * 4, (way, left)
    assert all(two_step["neither", left][o] > 0 for left in LEFT for o in OPTIMIZERS)


def test_answer_3_without_step_one_gradients_are_accumulated(two_step: Rows) -> None:
    for (way, left), row in two_step.items():
        nodes = 6 if way in ("neither", "only step two") else 4
        assert row["accumulate"] == nodes, (way, left)
        if left == "zeros":
            assert row["additions"] == nodes, way
    # The optimizer clears only what it holds: the frozen layer's .grad grows for ever.
    assert two_step["only step two", "None"]["additions"] == 2
    assert two_step["both", "None"]["additions"] == 0


def test_answer_4_zeros_let_running_state_move_a_frozen_weight(two_step: Rows) -> None:
    row = two_step["only step one", "zeros"]
    assert row["SGD"] == 0
    assert all(row[o] > 0 for o in OPTIMIZERS[1:])
    assert all(two_step["only step one", "None"][o] == 0 for o in OPTIMIZERS)


def test_freezekit_keeps_less_of_a_frozen_layer(two_step: Rows) -> None:
    input_of_the_middle = 4 * 16 * 8 * 8 * 4
    for (way, left), row in two_step.items():
        saved = input_of_the_middle if way in ("only step one", "both", "freeze(...)") else 0
        assert row["kept"] - row["kept_freezekit"] == saved, (way, left)


def test_two_step_prints_its_table() -> None:
    row = dict.fromkeys(["wgrad", "dgrad", "accumulate", "additions", "kept", "kept_freezekit", *OPTIMIZERS], 1)
    out = run("import two_step, rich.console; two_step.show("
              f"[{{'way': 'neither', 'zero_grad': 'None', **{row!r}}}], rich.console.Console(width=200))")  # fmt: skip
    assert "AdamW" in out
    assert "neither" in out


def test_finetune_digits() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (freezekit[examples])")
    out = run("import finetune_digits; finetune_digits.main(pretrain_steps=60, steps=6)")
    held = out.rsplit("included: ", 1)[1]
    moved, of, total = held.split()
    assert (moved, of) == ("0", "of")
    assert int(total) > 100
    assert out.count("freezekit") == 3
