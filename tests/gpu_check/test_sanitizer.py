"""The sanitizer's step with a stand-in for compute-sanitizer: what each answer of the real one would come to."""

from __future__ import annotations

import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.conformance import drivers, place
from tools.gpu_check import sanitizer
from tools.gpu_check.step import NOT_RUN

FAKE = """#!/bin/sh
# compute-sanitizer --tool TOOL --error-exitcode 99 PROGRAM ...
[ "$1 $3 $4" = "--tool --error-exitcode 99" ] || exit 2
echo "$2 on $5 $7"
case "$5" in *faults) exit {control};; *) {program};; esac
"""


def fake(folder: Path, control: str, program: str) -> str:
    path = folder / "compute-sanitizer"
    path.write_text(FAKE.format(control=control, program=program))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "names", lambda: list(drivers.SOURCES))
    monkeypatch.setattr(drivers, "build", lambda name: Path("/nowhere") / name)
    monkeypatch.setattr(sanitizer, "build_faults", lambda: Path("/nowhere/faults"))


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("control", "program", "code", "said"),
    [
        ("99", "exit 0", 0, "memcheck clean, racecheck clean, synccheck clean, initcheck clean"),
        ("99", "exit 99", 4, "memcheck found, racecheck found, synccheck found, initcheck found"),
        ("99", "exit 1", 4, "memcheck found, racecheck found, synccheck found, initcheck found"),
        ("0", "exit 0", NOT_RUN, "memcheck not run, racecheck not run, synccheck not run, initcheck not run"),
        (
            "$([ $2 = racecheck ] && echo 0 || echo 99)",
            "[ $2 = initcheck ] && exit 99 || exit 0",
            1,
            "memcheck clean, racecheck not run, synccheck clean, initcheck found",
        ),
        (
            "$([ $2 = racecheck ] && echo 0 || echo 99)",
            "exit 0",
            NOT_RUN,
            "memcheck clean, racecheck not run, synccheck clean, initcheck clean",
        ),
        (
            "99",
            "[ $2 = memcheck ] && sleep 5; exit 0",
            NOT_RUN,
            "memcheck not run, racecheck clean, synccheck clean, initcheck clean",
        ),
    ],
)
def test_answers(
    control: str,
    program: str,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: fake(tmp_path, control, program))
    # A tool that hangs at its first of three programs has a third of what is left.
    until = time.monotonic() + (6 if "sleep" in program else 600)
    assert sanitizer.main(["--until", str(until)]) == code
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1] == said
    assert "initcheck on /nowhere/hopper unwritten" in out or "initcheck clean" not in said


def test_no_sanitizer_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: None)
    assert sanitizer.main([]) == NOT_RUN
    assert "neither on PATH" in capsys.readouterr().out


def test_a_tool_that_does_not_end(tmp_path: Path) -> None:
    program = fake(tmp_path, "0", "sleep 5")
    assert sanitizer.watch(program, "memcheck", ["other"], 0.2) == (None, "did not end within 0.2 s")


@pytest.mark.usefixtures("built")
def test_rows_are_told_as_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a tool that finds something in the second program, the first is known by then."""
    program = fake(tmp_path, "99", 'case "$5" in *small) exit 99;; *) exit 0;; esac')
    programs = {name: Path("/nowhere") / name for name in drivers.SOURCES}
    assert sanitizer.check(program, "memcheck", Path("/nowhere/faults"), programs, time.monotonic() + 600) == "found"
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("---")]
    assert told == [
        "--- memcheck, convolutions: clean, exit code 0",
        "--- memcheck, small: found, exit code 99",
    ]


@pytest.mark.skipif(drivers.find_nvcc() is None, reason="needs nvcc")
def test_nothing_is_built_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    made = drivers.build("convolutions"), sanitizer.build_faults()
    run = subprocess.run
    compilers = ("g++", place.find_nvcc())

    def refuse(command: list[str], *arguments: object, **settings: object) -> object:
        assert command[0] not in compilers or "--dryrun" in command, command
        return run(command, *arguments, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", refuse)
    assert (drivers.build("hopper"), sanitizer.build_faults()) == made, "of the same sources"


def test_what_is_built_is_for_the_device_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_available() or place.architectures() == place.ARCHS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, arch in (((9, 0), "90a"), ((8, 6), "86"), ((12, 0), "120")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert place.code_flags() == [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        assert ("hopper" in drivers.names()) == (arch == "90a")


@pytest.mark.skipif(drivers.find_nvcc() is None, reason="needs nvcc")
def test_the_planted_faults_compile() -> None:
    assert subprocess.run([sanitizer.build_faults()]).returncode == 2, "asked for nothing"
