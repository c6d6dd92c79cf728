"""What is left of a check: a row to paste, a table to read, numbers to load; and nobody else's files touched."""

from __future__ import annotations

import ast
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from bench import document
from tools.gpu_check import __main__ as command
from tools.gpu_check import machine, report, steps
from tools.gpu_check.step import ROOT, Outcome, Step

HERE = machine.Host("2026-11-26", "Some GPU", "580.1", "2.11.0", "13.0", "13.0.88", "3.12.3", 16, "abc123")
OUTCOMES = [
    Outcome("build", "passed", 61.26, "done", "compiled\n"),
    Outcome("kernels", "failed", 3.0, "exit code 1: a | b", "wrong value"),
    Outcome("sanitizer", "not run", 0.0, "no such tool"),
]


def test_the_row_fits_the_table_of_the_docs() -> None:
    row = report.row(HERE, OUTCOMES, "make gpu-check")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    table = (report.Path(__file__).parents[2] / "docs" / "hardware.md").read_text()
    heading = next(line for line in table.splitlines() if line.startswith("| date |"))
    assert len(cells) == heading.count("|") - 1
    assert cells[:6] == ["2026-11-26", "Some GPU", "580.1", "2.11.0 / 13.0", "abc123", "`make gpu-check`"]
    assert cells[6] == "1 of 3 steps passed; kernels failed: exit code 1: a / b; sanitizer not run: no such tool"


def test_a_row_without_a_device_says_that_it_is_no_proof() -> None:
    here = replace(HERE, device="")
    row = report.row(here, OUTCOMES, "make gpu-check EMULATED=1")
    assert "| no CUDA device |" in row
    assert "emulated, which says nothing of hardware: 1 of 3 steps passed" in row


def test_the_files(tmp_path: Path) -> None:
    report.write(tmp_path, HERE, OUTCOMES, "make gpu-check")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["machine"]["device"] == "Some GPU"
    assert summary["steps"][0] == {"step": "build", "result": "passed", "seconds": 61.3, "said": "done"}
    text = (tmp_path / "summary.md").read_text()
    assert report.row(HERE, OUTCOMES, "make gpu-check") in text
    assert "| kernels | failed | 3 | exit code 1: a / b |" in text
    assert "===== kernels: failed\nwrong value\n" in (tmp_path / "log.txt").read_text()


def test_only_results_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    assert report.empty(folder)
    report.write(folder, HERE, OUTCOMES, "make gpu-check")
    assert report.empty(folder)
    assert list(folder.iterdir()) == []
    (folder / "thesis.tex").touch()
    (folder / "log.txt").touch()
    assert not report.empty(folder)
    assert len(list(folder.iterdir())) == 2
    assert not report.empty(folder / "thesis.tex")


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(HERE, device="")
    monkeypatch.setattr(machine, "read", lambda *_: here)


@pytest.mark.usefixtures("no_device")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path / "out")]) == 1
    assert "no CUDA device here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_device")
def test_the_exit_code_counts_failed_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [Step("a", ("false",), 5), Step("b", ("true",), 5), Step("c", ("false",), 5), Step("d", ("true",), 5, "why")]
    monkeypatch.setattr(steps, "plan", lambda *_: plan)
    assert command.main(["--emulated", "--out", str(tmp_path / "out")]) == 2
    assert command.main(["--emulated", "--out", str(tmp_path / "out"), "--only", "b,d"]) == 0
    with pytest.raises(SystemExit):
        command.main(["--emulated", "--out", str(tmp_path / "out"), "--only", "b,x"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(SystemExit):
        command.main(["--emulated", "--out", str(tmp_path / "other")])


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("more", [["--seconds", "0"], ["--only", "sanitizer"]])
def test_where_no_step_ran_nothing_has_passed(tmp_path: Path, more: list[str]) -> None:
    folder = tmp_path / "out"
    assert command.main(["--emulated", "--out", str(folder), *more]) == 1
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    assert {step["result"] for step in steps} == {"not run"}


def test_this_machine_is_described() -> None:
    here = machine.read("abc", 300)
    assert here.commit == "abc"
    assert here.torch.startswith("2.")
    assert here.cores >= 1


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "MODULES", ("torch", "no_such_module"))
    monkeypatch.setattr(machine, "PROGRAMS", ("g++", "no-such-program"))
    assert machine.main([]) == 2
    assert "missing: no_such_module, no-such-program" in capsys.readouterr().out


def imported(source: Path) -> tuple[set[str], set[str]]:
    """What a module cannot be imported without, and all that it imports."""

    def names(nodes: Iterable[ast.AST]) -> set[str]:
        found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        found += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
        return {name.partition(".")[0] for name in found}

    tree = ast.parse(source.read_text())
    return names(tree.body), names(list(ast.walk(tree)))


def test_no_step_needs_what_the_machine_is_not_asked_for() -> None:
    """Its first step says that nothing is missing."""
    folders = ("bench", "tools", "tests/conformance", "freezekit")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if "test_" not in path.name]
    own = {*sys.stdlib_module_names, "bench", "freezekit", "tests", "tools"}
    for source in sources:
        at_once, all_in_all = imported(source)
        if source.name != "plots.py":  # which no step draws
            assert at_once - own <= set(machine.MODULES), source
        assert all_in_all - own <= {*machine.MODULES, *machine.OPTIONAL, "memsave_torch", "IPython"}, source


def test_a_document_is_written_where_nothing_can_check_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    document.validate({"what": "no schema describes"})


def test_a_first_look_that_hangs_ends_and_gives_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks to end is ignored, as by a process that a driver holds."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    monkeypatch.setattr(machine, "ASK_TORCH", deaf)
    start = time.monotonic()
    here = machine.read("abc", 0.5)
    assert time.monotonic() - start < 60
    assert here.device == "unknown: torch failed, or gave no answer in 0.5 s"
    assert (here.torch, here.arch, here.commit) == ("none", "", "abc")


def test_the_folder_is_there_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "plan", lambda folder, *_: [Step("a", ("test", "-e", f"{folder}/summary.json"), 5)])
    monkeypatch.setattr(machine, "read", lambda *_: HERE)
    assert command.main(["--out", str(tmp_path / "out")]) == 0
