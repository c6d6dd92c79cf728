"""What later steps run is compiled while the extension is, and costs its step nothing where it cannot be."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conformance import drivers, place
from tools.gpu_check import build, sanitizer

BUILT = (sys.executable, "-c", "")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension is there."""
    monkeypatch.setattr(build, "EXTENSION", BUILT)


@pytest.mark.skipif(drivers.find_nvcc() is None, reason="needs nvcc")
def test_no_later_step_compiles_for_a_gpu(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main(["--place", "cuda"]) == 0
    assert capsys.readouterr().out == "the extension is built\n"
    run, compilers = subprocess.run, ("g++", place.find_nvcc())

    def refuse(command: list[str], *arguments: object, **settings: object) -> object:
        assert command[0] not in compilers or "--dryrun" in command, command
        return run(command, *arguments, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", refuse)
    made: list[Path] = [place.device_library(), sanitizer.build_faults(), *map(drivers.build, drivers.names())]
    assert all(path.exists() for path in made)


def test_what_hangs_or_fails_beside_it_fails_in_its_own_step(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> Path:
        raise RuntimeError("nvcc fatal")

    monkeypatch.setattr(place, "device_library", lambda: time.sleep(600))
    monkeypatch.setattr(sanitizer, "build_faults", refused)
    monkeypatch.setattr(drivers, "names", lambda: [])
    start = time.monotonic()
    assert build.main(["--until", str(start + 3)]) == 0
    assert time.monotonic() - start < 30
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "not compiled yet: planted faults: RuntimeError: nvcc fatal",
        "not compiled yet: probes: it was not ready in time",
        "the extension is built",
    ]


def test_an_extension_that_cannot_be_built_fails_the_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "EXTENSION", (sys.executable, "-c", "raise SystemExit(3)"))
    monkeypatch.setattr(build, "beside", lambda _: {})
    assert build.main([]) == 3
    assert capsys.readouterr().out == "the extension could not be built\n"


def test_without_pytest_the_extension_is_built_all_the_same(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tests.conformance.drivers", "tests.conformance.place"):
        monkeypatch.setitem(sys.modules, name, None)
    assert build.main(["--place", "cuda"]) == 0
    assert "the extension is built" in capsys.readouterr().out
