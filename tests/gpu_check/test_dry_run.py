"""The whole of the command without a GPU, with a fault in almost every step: what is known comes home all the same."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conformance import golden
from tools.gpu_check import __main__ as command
from tools.gpu_check import machine, step, steps
from tools.gpu_check.step import Step

HANGING_TEST = """
import pathlib, pytest, time
def test_first(): pass
def test_second(): assert "right" == "wrong"
def test_hangs():
    pathlib.Path({marker!r}).touch()
    time.sleep(600)
"""


def faulty(step: Step, fault: str, *more: str) -> Step:
    """The step's own command, by way of tests/gpu_check/faulty.py."""
    arguments = step.command[3 if step.command[1] == "-m" else 2 :]
    return replace(step, command=(*steps.python("-m", "tests.gpu_check.faulty", fault), *more, *arguments))


def with_faults(plan: list[Step], marker: Path, tests: Path) -> list[Step]:
    """Six of them; only the build's command is another."""
    tests.mkdir()
    (tests / "pytest.ini").write_text("[pytest]\n")
    (tests / "test_hanging.py").write_text(HANGING_TEST.format(marker=str(marker)))
    (tests / "test_fine.py").write_text("def test_fine(): pass\n")
    driver = tests / "driver"
    driver.write_text("#!/bin/sh\nexec sleep 600\n")
    driver.chmod(0o755)
    slow = f"echo compiling; touch {marker}; exec sleep 600"
    pytest_alone = steps.python("-m", "pytest", "-p", "tools.gpu_check.deadline", *steps.UNTIL)
    made = {made.name: made for made in plan}
    faults = {
        "build": replace(made["build"], command=("sh", "-c", slow)),
        "conformance": faulty(made["conformance"], "wrong_probe"),
        # Drivers have a second together, or none where torch takes longer to import: they fail either way.
        "kernels": replace(faulty(made["kernels"], "hanging_driver", str(driver)), budget=step.SPARE + 4),
        "selftest": faulty(made["selftest"], "crash"),
        "gpu tests": replace(made["gpu tests"], command=(*pytest_alone, str(tests / "test_hanging.py")), not_here=""),
        "compare": faulty(made["compare"], "wrong_row"),
        "other tests": replace(made["other tests"], command=(*pytest_alone, str(tests / "test_fine.py"))),
    }
    patient = [faults.get(one.name, one) for one in plan]  # a busy machine is no fault
    return [one if one.name == "kernels" else replace(one, budget=300.0) for one in patient]


def ended_by(marker: Path) -> type[subprocess.Popen[bytes]]:
    """Processes whose time is up once the marker is there: so the test waits for no limit, and depends on no speed."""

    class Watched(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            end = time.monotonic() + (1e6 if timeout is None else timeout)
            while (code := self.poll()) is None:
                if marker.exists() or time.monotonic() > end:
                    marker.unlink(missing_ok=True)
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                time.sleep(0.02)
            return code

    return Watched


def test_faults_in_almost_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, folder = tmp_path / "hangs", tmp_path / "out"
    plan: Callable[..., list[Step]] = steps.plan
    monkeypatch.setattr(steps, "plan", lambda *given: with_faults(plan(*given), marker, tmp_path / "tests"))
    monkeypatch.setattr(step.subprocess, "Popen", ended_by(marker))
    monkeypatch.setattr(machine, "ASK_TORCH", "import time; time.sleep(600)")
    monkeypatch.setattr(command, "FIRST_LOOK", 0.5)
    failed = command.main(["--emulated", "--out", str(folder), "--seconds", "3000"])
    document = json.loads((folder / "summary.json").read_text())
    assert document["machine"]["device"] == "unknown: torch failed, or gave no answer in 0.5 s"
    summary = {s["step"]: s for s in document["steps"]}
    results = {name: s["result"] for name, s in summary.items()}
    log = (folder / "log.txt").read_text()
    assert failed == list(results.values()).count("failed")
    results.pop("machine")  # it fails where something is missing
    assert results == {
        **{"build": "failed", "conformance": "failed", "kernels": "failed", "selftest": "failed"},
        **{"gpu tests": "failed", "sanitizer": "not run", "layers": "not run", "tiles": "not run"},
        **{"compare": "failed", "other tests": "passed"},
    }, log
    assert summary["build"]["said"].startswith("ended after")
    assert summary["conformance"]["said"] == "exit code 1: 2 passed, 1 failed, 0 not run"
    assert summary["selftest"]["said"].startswith("exit code -6: ")
    assert summary["selftest"]["said"].endswith("  pass")
    assert summary["gpu tests"]["said"].startswith("ended after")
    assert "::test_second (call): AssertionError: assert 'right' == 'wrong'" in log, (
        "what failed before the hang is known"
    )
    rows = json.loads((folder / "compare.json").read_text())["rows"]
    assert {row["case"] for row in rows if row["failure"]} == {"pointwise"}
    assert len({row["case"] for row in rows if not row["failure"]}) == 4, "a wrong row is a row"
    assert len(golden.load(folder / "golden.npz")[1]) == 3
    assert "| gpu tests | failed |" in (folder / "summary.md").read_text()
