"""The whole of the command without a GPU, with a fault in every other step: what is known comes home all the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conformance import golden
from tools.gpu_check import __main__ as command
from tools.gpu_check import steps
from tools.gpu_check.step import Step

HANGING_TEST = """
import time
def test_first(): pass
def test_hangs(): time.sleep(600)
"""
WRONG_ROW = """
import json, sys
with open(sys.argv[1], "w") as file:
    json.dump({"rows": [{"layer": "conv1", "error": "differs"}, {"layer": "conv2"}]}, file)
sys.exit("1 of 2 rows differ")
"""


def with_faults(plan: list[Step], folder: Path, tests: Path) -> list[Step]:
    """A build that is too slow, a crash, a test that hangs, a wrong row; the steps between as they are."""
    python = (sys.executable, "-c")
    faults = {
        "build": Step("build", ("sleep", "600"), 0.5),
        "selftest": Step("selftest", (*python, "import os; print('row 1', flush=True); os.abort()"), 20),
        "gpu tests": Step("gpu tests", (sys.executable, "-m", "pytest", "-v", str(tests)), 40),
        "compare": Step("compare", (*python, WRONG_ROW, str(folder / "compare.json")), 20),
        "other tests": Step("other tests", (*python, "print('2 passed')"), 20),
    }
    assert faults.keys() <= {step.name for step in plan}
    return [faults.get(step.name, step) for step in plan]


@pytest.mark.full
def test_faults_in_every_other_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests, folder = tmp_path / "tests", tmp_path / "out"
    tests.mkdir()
    (tests / "test_hanging.py").write_text(HANGING_TEST)
    (tests / "pytest.ini").write_text("[pytest]\n")
    plan: Callable[..., list[Step]] = steps.plan

    def faulty(*arguments: object) -> list[Step]:
        kept = [step for step in plan(*arguments) if step.name != "kernels"]  # tests/conformance runs the drivers
        patient = [
            replace(s, budget=200.0) if s.name == "conformance" else s for s in kept
        ]  # a busy machine is no fault
        return with_faults(patient, folder, tests)

    monkeypatch.setattr(steps, "plan", faulty)
    failed = command.main(["--emulated", "--out", str(folder)])
    summary = {s["step"]: s for s in json.loads((folder / "summary.json").read_text())["steps"]}
    results = {name: s["result"] for name, s in summary.items()}
    assert failed == list(results.values()).count("failed")
    results.pop("machine")  # it fails where something is missing
    assert results == {
        **{"build": "failed", "conformance": "passed", "selftest": "failed", "gpu tests": "failed"},
        **{"sanitizer": "not run", "layers": "not run", "tiles": "not run", "compare": "failed"},
        "other tests": "passed",
    }
    assert summary["build"]["said"].startswith("ended after")
    assert summary["selftest"]["said"] == "exit code -6: row 1"
    assert "1 of 2 rows differ" in summary["compare"]["said"]
    log = (folder / "log.txt").read_text()
    assert "test_first PASSED" in log, "what ran before the test that hangs is known"
    assert len(json.loads((folder / "compare.json").read_text())["rows"]) == 2, "a wrong row is a row"
    assert "mma_bf16_integers" in golden.load(folder / "golden.npz")[1]
    assert "| gpu tests | failed |" in (folder / "summary.md").read_text()
