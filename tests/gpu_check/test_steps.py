"""Steps end within their budgets, and one that fails or hangs keeps no other from running."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import options
from tools.gpu_check import __main__ as command
from tools.gpu_check import build, report, steps
from tools.gpu_check.machine import Host
from tools.gpu_check.step import (
    LOG_BYTES,
    MARGIN,
    NOT_RUN,
    ROOT,
    SPARE,
    Step,
    ended_when_asked,
    run,
    was_asked_to_end,
)

HERE = Host("2026-11-26", "Some GPU", "580.1", "2.11.0", "13.0", "13.0.88", "3.12.3", 16, "abc123")


def script(text: str) -> tuple[str, ...]:
    return sys.executable, "-c", text


def step(name: str, text: str, budget: float = 20) -> Step:
    return Step(name, script(text), budget)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


def test_what_a_command_says_becomes_the_outcome() -> None:
    passed = run(step("a", "print('first'); print('4 passed'); print()"), 60)
    assert (passed.result, passed.said) == ("passed", "4 passed")
    assert passed.log.split() == ["first", "4", "passed"]
    failed = run(step("b", "import sys; print('2 wrong'); sys.exit(2)"), 60)
    assert (failed.result, failed.said) == ("failed", "exit code 2: 2 wrong")
    silent = run(step("c", ""), 60)
    assert (silent.result, silent.said) == ("passed", "it printed nothing")
    refused = run(step("d", f"import sys; print('no such tool'); sys.exit({NOT_RUN})"), 60)
    assert (refused.result, refused.said) == ("not run", "no such tool")
    absent = run(Step("e", ("no-such-program",), 5), 60)
    assert (absent.result, absent.said) == ("failed", "no-such-program: No such file or directory")
    assert run(Step("f", ("false",), 5, "no CUDA device"), 60).said == "no CUDA device"


def test_a_command_runs_in_the_root_and_knows_its_end() -> None:
    """On the clock of all processes, so that what it takes to start is no time on top."""
    start = time.monotonic()
    outcome = run(Step("a", (*script("import os, sys; print(os.getcwd(), sys.argv[1])"), "{until}"), 300), 145.2)
    root, until = outcome.said.split()
    assert root == str(ROOT)
    assert start + 145.2 - SPARE <= float(until) + 1e-3 <= time.monotonic() + 145.2 - SPARE + 2e-3


def test_every_limit_is_a_part_of_what_is_left() -> None:
    """Steps that start or time something are told their end, and no child's limit is a number."""
    plan = steps.plan(Path("out"), emulated=False, about="")
    assert {s.name for s in plan if "{until}" not in s.command} == {"emulator"}
    sources = [*(ROOT / "tools/gpu_check").glob("*.py"), *(ROOT / "tests/conformance").glob("[!t]*.py")]
    sources += [ROOT / "bench/child.py", ROOT / "bench/tiles.py", ROOT / "freezekit/selftest.py"]
    limits = [limit for path in sources for limit in re.findall(r"\btimeout=([^,)]+)", path.read_text())]
    assert len(limits) == 3
    assert not [limit for limit in limits if re.match(r"[\d.]|[A-Z_]+$", limit)]


def test_a_hanging_step_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """A child that ignores being asked to end, as a kernel that never returns does."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    text = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("under way", flush=True)
time.sleep(600)
"""
    start = time.monotonic()
    outcome = run(step("hangs", text, budget=3), 60)
    assert time.monotonic() - start < 20
    assert (outcome.result, outcome.log) == ("failed", "under way\n")
    assert "ended after 3 s, which is its budget; last: under way" in outcome.said
    pid = int((tmp_path / "pid").read_text())
    while is_running(pid):
        assert time.monotonic() - start < 60
        time.sleep(0.1)


def test_without_pytest_steps_that_need_none_are_run(tmp_path: Path) -> None:
    (tmp_path / "pytest.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    check = ("-m", "tools.gpu_check", "--emulated", "--only", "machine", "--out", str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, *check], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert [s["step"] for s in json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]] == ["machine"], (
        done.stderr
    )


def test_a_folder_that_cannot_be_made_is_an_error_in_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.machine, "read", lambda *_: HERE)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path / "file" / "out")])
    assert "cannot be made: Not a directory" in capsys.readouterr().err


def test_a_log_is_kept_from_its_end() -> None:
    outcome = run(step("a", "print('x' * 3_000_000); print('done')"), 60)
    assert outcome.said == "done"
    assert len(outcome.log) == LOG_BYTES


def test_every_step_runs_whatever_became_of_those_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = [
        step("broken", "raise SystemExit(3)"),
        step("hangs", "import time; time.sleep(60)", budget=0.5),
        step("fine", "print('right')"),
        step("too late", "import time; time.sleep(60)", budget=60),
        step("never", "print('ran')"),
    ]
    outcomes = command.run_all(plan, tmp_path, HERE, "make gpu-check", 12)
    assert [o.result for o in outcomes] == ["failed", "failed", "passed", "failed", "not run"]
    assert outcomes[-1].said == "no time was left"
    assert sum(o.seconds for o in outcomes) < 25
    assert "passed   fine: right" in capsys.readouterr().out


ENDS = pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=str)


def ended_once(marker: Path, check: subprocess.Popen[str], end: signal.Signals) -> str:
    """What a check prints that is asked to end once the marker has a text."""
    start = time.monotonic()
    while not marker.exists() or not marker.read_text():
        assert check.poll() is None
        assert time.monotonic() - start < 300
        time.sleep(0.05)
    check.send_signal(end)
    return check.communicate(timeout=60)[0]


@ENDS
def test_whoever_takes_the_machine_away_gets_what_is_known(tmp_path: Path, end: signal.Signals) -> None:
    """SIGTERM in the middle of a step, of which nothing is left."""
    folder, pid = tmp_path / "out", tmp_path / "pid"
    slow = f"import os, time; print('half'); open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"""
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from tests.gpu_check.test_steps import HERE, step
from tools.gpu_check import __main__ as command, machine, steps
machine.read = lambda *_: HERE
steps.plan = lambda *_: [step("first", "print('whole')"), step("second", {slow!r}, 600), step("third", "print('ran')")]
sys.exit(command.main(["--out", {str(folder)!r}]))
"""
    check = subprocess.Popen(script(program), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = ended_once(pid, check, end)
    assert check.returncode == 1, "one step failed"
    found = {s["step"]: (s["result"], s["said"]) for s in json.loads((folder / "summary.json").read_text())["steps"]}
    assert found["first"] == ("passed", "whole")
    assert found["second"][0] == "failed"
    assert re.fullmatch(r"asked to end from outside after \d+ s; last: half", found["second"][1])
    assert found["third"] == ("not run", "the check was asked to end from outside")
    assert "===== second: failed\nhalf\n" in (folder / "log.txt").read_text()
    assert f"results in {folder}" in said
    assert not is_running(int(pid.read_text()))


def test_under_nohup_a_terminal_that_closes_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_when_asked():
            signal.raise_signal(signal.SIGHUP)
            assert not was_asked_to_end()
            assert run(step("a", "print('right')"), 60).said == "right"
    finally:
        signal.signal(signal.SIGHUP, before)


PRINTS = """
import sys
from tests.gpu_check.test_steps import HERE, step
from tools.gpu_check import __main__ as command, machine, steps
machine.read = lambda *_: HERE
steps.plan = lambda *_: [step(name, "import time; time.sleep(0.5)") for name in ("first", "second", "third")]
sys.exit(command.main(["--out", sys.argv[1]]))
"""


@pytest.mark.parametrize("reader", ["gone", "full"])
def test_nobody_need_read_what_is_printed(tmp_path: Path, reader: str) -> None:
    """As behind `| head -1`, or into a file on a full disk."""
    folder = tmp_path / "out"
    with open("/dev/full", "w") as full:
        to = subprocess.PIPE if reader == "gone" else full
        check = subprocess.Popen([*script(PRINTS), str(folder)], cwd=ROOT, stdout=to, stderr=subprocess.PIPE, text=True)
    if check.stdout is not None:
        assert "Some GPU" in check.stdout.readline()
        check.stdout.close()
    assert check.stderr is not None
    said = check.stderr.read()
    assert check.wait(60) == 0, said
    assert said == ""
    found = [(s["step"], s["result"]) for s in json.loads((folder / "summary.json").read_text())["steps"]]
    assert found == [("first", "passed"), ("second", "passed"), ("third", "passed")]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_whatever_a_step_prints_is_told_in_the_characters_that_a_terminal_has(tmp_path: Path, encoding: str) -> None:
    """And kept whole, though files have the same few there."""
    says = PRINTS.replace("import time; time.sleep(0.5)", "print(chr(233), chr(0x2192))")
    folder = tmp_path / "out"
    place = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": encoding}
    check = subprocess.run(
        [*script(says), str(folder)], cwd=ROOT, env={**os.environ, **place}, capture_output=True, encoding=encoding
    )
    assert check.returncode == 0, check.stderr
    assert "third: " + "\u00e9 \u2192".encode(encoding, "backslashreplace").decode(encoding) in check.stdout
    assert (folder / "log.txt").read_text(encoding="utf-8").count("\u00e9 \u2192") == 3


@ENDS
def test_so_does_whoever_takes_it_away_at_the_first_look(tmp_path: Path, end: signal.Signals) -> None:
    """Where torch takes its half minute to answer."""
    folder, pid = tmp_path / "out", tmp_path / "pid"
    slow = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"""
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from tools.gpu_check import __main__ as command, machine
machine.ASK_TORCH = {slow!r}
sys.exit(command.main(["--out", {str(folder)!r}]))
"""
    check = subprocess.Popen(script(program), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = ended_once(pid, check, end)
    assert check.returncode == 1, said
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["machine"]["device"] == "unknown: asked to end from outside"
    results = {(s["result"], s["said"]) for s in summary["steps"]}
    assert results == {("not run", "the check was asked to end from outside")}
    assert f"results in {folder}" in said
    assert "Traceback" not in said
    assert not is_running(int(pid.read_text()))


def test_a_full_disk_costs_neither_the_check_nor_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Path.write_text

    def full(path: Path, text: str, encoding: str) -> int:
        if path.name.startswith("summary.json") and '"step": "second"' in text:
            write(path, text[:10], encoding)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, encoding)

    monkeypatch.setattr(Path, "write_text", full)
    outcomes = command.run_all([step("first", ""), step("second", "")], tmp_path, HERE, "make gpu-check", 60)
    assert [o.result for o in outcomes] == ["passed", "passed"]
    assert [s["step"] for s in json.loads((tmp_path / "summary.json").read_text())["steps"]] == ["first"]
    assert "===== first: passed" in (tmp_path / "log.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "summary.json", "summary.md"]
    assert "No space left on device" in capsys.readouterr().out


def test_what_a_step_left_unfinished_is_removed(tmp_path: Path) -> None:
    outcomes = command.run_all(
        [step("ended", f"open({str(tmp_path / 'compare.json.part')!r}, 'w').write('half')")], tmp_path, HERE, "", 60
    )
    assert [o.result for o in outcomes] == ["passed"]
    assert not list(tmp_path.glob("*.part"))
    (tmp_path / "golden.npz.part").touch()
    assert report.empty(tmp_path), "of a check that was ended at once"


def test_results_that_are_too_large_fail(tmp_path: Path) -> None:
    assert report.check_size(tmp_path) == ""
    big = step("big", f"open({str(tmp_path / 'layers.json')!r}, 'wb').truncate(17 << 20)")
    outcomes = command.run_all([big], tmp_path, HERE, "make gpu-check", 60)
    assert [(o.step, o.result) for o in outcomes] == [("big", "passed"), ("size of the results", "failed")]
    assert "at most 16777216 are allowed" in (tmp_path / "summary.md").read_text()
    for i in range(9):
        (tmp_path / f"{i}").touch()
    assert "files of results, at most 8" in report.check_size(tmp_path)


def test_the_budgets_leave_time_for_all_that_needs_a_gpu() -> None:
    plan = steps.plan(Path("out"), emulated=False, about="")
    *needed, emulator, rest = plan
    assert (emulator.name, rest.name) == ("emulator", "other tests")
    assert command.FIRST_LOOK + sum(s.budget for s in needed) <= command.SECONDS < 540
    assert not any(s.not_here for s in plan)
    *without_gpu, rest = steps.plan(Path("out"), emulated=True, about="")
    assert rest.name == "other tests"
    assert command.FIRST_LOOK + sum(s.budget for s in without_gpu if not s.not_here) <= command.SECONDS
    assert len({s.name for s in plan}) == len(plan)


def test_the_plan_covers_all_tests_and_knows_its_files() -> None:
    plan = {s.name: s for s in steps.plan(Path("out"), emulated=True, about="")}
    assert {name for name, s in plan.items() if s.not_here} == {"gpu tests", "sanitizer", "layers", "tiles"}
    paths = [part for part in plan["other tests"].command if part.startswith("tests/")]
    assert paths[-1] == "tests/emulator"
    tests = {p.name for p in (ROOT / "tests").iterdir() if any(p.glob("test_*.py")) or p.name.startswith("test_")}
    assert tests <= {Path(p).name for p in paths}
    written = {Path(part).name for s in plan.values() for part in s.command if part.startswith("out/")}
    assert written | {"summary.json", "summary.md", "log.txt"} == set(report.FILES)
    assert len(report.FILES) <= report.MOST_FILES


def test_the_build_is_for_the_device_alone_and_its_waits_end() -> None:
    plan = {s.name: s for s in steps.plan(Path("out"), emulated=False, about="", arch="90a")}
    assert plan["build"].command[:3] == ("env", "NVCC_APPEND_FLAGS=-DFK_BOUNDED_WAITS", "FREEZEKIT_CUDA_ARCHS=90a")
    emulator = (*plan["build"].command[:3], *build.EXTENSION, "--emulator")
    assert plan["emulator"].command == emulator, "later, for the last step"


def test_without_a_gpu_the_build_compiles_no_kernel_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a plain build does it, which in a tree that is built has nothing to do."""

    def settings() -> tuple[str, ...]:
        command = next(s for s in steps.plan(Path("out"), emulated=True, about="") if s.name == "build").command
        return command[1 : command.index(sys.executable)]

    monkeypatch.setattr(steps, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "freezekit").mkdir()
    info = tmp_path / "freezekit/_build_info.json"
    assert settings() == ("FREEZEKIT_CUDA=0",)
    info.write_text('{"cuda": null, "archs": []}')
    assert settings() == ("FREEZEKIT_CUDA=0",)
    info.write_text('{"cuda": "13.0.88", "archs": ["80", "90a"]}')
    assert settings() == ("FREEZEKIT_CUDA_ARCHS=80;90a",)


def test_what_was_built_with_other_flags_is_built_again(tmp_path: Path) -> None:
    """What nvcc reads from the environment is in the command: else waits without end would stay in older objects."""
    for name, body in (("nvcc", "echo V13.0.1"), ("ninja", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    flags, folder = "-DFK_BOUNDED_WAITS", tmp_path / "build"
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "NVCC_APPEND_FLAGS": flags,
        "CUDA_HOME": "",
    }
    to = ("--build-temp", str(folder), "--build-lib", str(tmp_path / "lib"))
    command = [sys.executable, "setup.py", "-q", "build_ext", *to]
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode != 0
    rules = (folder / "extension.ninja").read_text()
    assert f"command = NVCC_APPEND_FLAGS={flags} {tmp_path / 'nvcc'} -std=" in rules
    assert rules.index("rule torch\n") < rules.index("rule nvcc\n"), "in one run, and what takes longest begins first"


def test_gpu_tests_are_looked_for_where_they_are() -> None:
    files = steps.gpu_files()
    assert {"tests/proof/test_on_gpu.py", "tests/operators/test_values.py"} <= set(files)
    assert not [file for file in files if file.startswith("tests/conformance")], "steps of their own"
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        names = {node.arg for node in ast.walk(ast.parse(text)) if isinstance(node, ast.arg)}
        has_fixture = "place" in names and not re.search(r'parametrize\(\(?"place"|def place\(', text)
        if path.parent.name != "conformance" and (has_fixture or "marks=pytest.mark" + ".gpu" in text):
            assert str(path.relative_to(ROOT)) in files
    assert len(files) < len(list((ROOT / "tests").rglob("test_*.py"))) / 10, "collecting is part of the step's time"


def test_what_is_asked_of_compare_makes_sense(tmp_path: Path) -> None:
    plan = {s.name: s for s in steps.plan(tmp_path, emulated=True, about="")}
    assert f"faulthandler_timeout={MARGIN - SPARE:g}" in plan["other tests"].command, "a hang shows where"
    for name, dtype in (("layers", torch.bfloat16), ("compare", torch.float32)):
        told = [part.replace("{until}", str(time.monotonic() + 100)) for part in plan[name].command]
        asked = options.parse(told[2:])
        assert asked.settings.dtype == dtype
        assert asked.json == tmp_path / f"{name}.json"
        assert asked.time_limit is not None
        assert 0 < asked.time_limit <= 100


def test_tests_that_would_begin_late_are_counted(tmp_path: Path) -> None:
    body = "def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): __import__('pytest').skip('why')\n"
    (tmp_path / "test_some.py").write_text(body)
    base = [sys.executable, "-m", "pytest", "-q", "-p", "tools.gpu_check.deadline", "--rootdir", str(tmp_path)]
    workers = ["-n", "2"] if "-n" in steps.pytest(dist="load") else []
    said = {}
    for within, more in ((600, []), (0, []), (0, workers)):
        arguments = [*base, *more, "--until", str(time.monotonic() + within), str(tmp_path)]
        done = subprocess.run(
            arguments, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        said[within, bool(more)] = (done.returncode, done.stdout.strip().splitlines()[-1])
    assert said[600, False] == (1, "1 passed, 1 failed, 0 error, 1 skipped, 0 not run for want of time")
    late = (NOT_RUN, "0 passed, 0 failed, 0 error, 0 skipped, 3 not run for want of time")
    assert said[0, False] == said.get((0, True), late) == late


@pytest.mark.parametrize("has_xdist", [False, True])
def test_a_file_that_cannot_be_imported_costs_its_own_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_xdist: bool
) -> None:
    if not has_xdist:
        monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "test_fine.py").write_text("def test_fine(): pass\n")
    outcome = run(Step("tests", steps.pytest(str(tmp_path), dist="load"), 300), 300)
    assert outcome.result == "failed"
    assert outcome.said == "exit code 1: 1 passed, 0 failed, 1 error, 0 skipped, 0 not run for want of time"
    assert "No module named 'no_such_module'" in outcome.log


@pytest.mark.parametrize(("body", "code"), [("__import__('pytest').skip('no GPU')", NOT_RUN), ("pass", 0)])
def test_a_run_that_skips_every_test_is_no_pass(tmp_path: Path, body: str, code: int) -> None:
    (tmp_path / "test_some.py").write_text(f"def test_a(): {body}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.gpu_check.deadline", "--rootdir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stdout
