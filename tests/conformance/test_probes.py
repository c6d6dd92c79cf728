"""The probes are right: emulated they give what the PTX ISA says, and a wrong result shows."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.emulator.probe import settings

from . import __main__ as command
from . import golden, place, registry
from .probe import Arrays, Probe, differences, digest

PROBES = registry.probes()
EMULATED = [probe for probe in PROBES if probe.emulated]
by_name = pytest.mark.parametrize("probe", EMULATED, ids=lambda probe: probe.name)


def run(probe: Probe) -> Arrays:
    return probe.run(place.PLACES["emulated"], probe.inputs())


def spoiled(arrays: Arrays, name: str) -> Arrays:
    """One element of one array is another, by more than any bound."""
    copy = {key: array.copy() for key, array in arrays.items()}
    flat = copy[name].reshape(-1)
    flat[-1] = flat[-1] + 1 if flat.dtype.kind != "f" else np.nan_to_num(flat[-1]) * 2 + 1000
    return copy


@by_name
@pytest.mark.parametrize("cp_async", ["lazy", "eager"])
def test_the_emulator_gives_what_the_manual_says(probe: Probe, cp_async: str) -> None:
    inputs = probe.inputs()
    with settings(cp_async=cp_async):
        actual = run(probe)
    assert differences(actual, probe.expected(inputs), probe.bound(inputs)) == []


@by_name
def test_a_wrong_element_shows(probe: Probe) -> None:
    inputs = probe.inputs()
    right, bound = probe.expected(inputs), probe.bound(inputs)
    assert digest(inputs) == digest(probe.inputs()), "inputs are the same at every call"
    for name in right:
        assert differences(spoiled(right, name), right, bound)
    assert differences({}, right, bound)


@pytest.mark.gpu
def test_the_gpu_gives_what_the_manual_says(capsys: pytest.CaptureFixture[str]) -> None:
    failed = command.main(["--place", "cuda"])
    assert failed == 0, capsys.readouterr().out


@pytest.mark.skipif(place.find_nvcc() is None, reason="needs nvcc")
def test_the_probes_compile_for_gpus() -> None:
    library = place.device_library()
    assert library.exists()
    assert library == place.device_library(), "built once"


def test_names_are_unique() -> None:
    assert len({probe.name for probe in PROBES}) == len(PROBES)


def test_the_command_keeps_what_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "golden.npz"
    assert command.main(["--place", "emulated", "--golden", str(file), "--about", "today"]) == 0
    assert f"{len(EMULATED)} passed, 0 failed" in capsys.readouterr().out
    about, results = golden.load(file)
    assert (about["note"], about["place"]) == ("today", "emulated")
    for probe in EMULATED:
        assert golden.against_golden(probe, run(probe), about, results) == []
    probe = EMULATED[0]
    other = {**results, probe.name: spoiled(results[probe.name], "d")}
    assert "d: 1 of 128 differ" in golden.against_golden(probe, run(probe), about, other)[0]
    stale = {**about, "inputs": {**about["inputs"], probe.name: "other"}}
    assert "not those that" in golden.against_golden(probe, run(probe), stale, results)[0]
    assert "no GPU has given" in golden.against_golden(probe, run(probe), about, {})[0]


def test_failures_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Probe("wrong", dict, lambda launch, of: {"d": np.zeros(2)}, lambda of: {"d": np.ones(2)})
    hopper = Probe("hopper", dict, lambda launch, of: {}, lambda of: {}, needs=90, emulated=False)
    monkeypatch.setattr(registry, "probes", lambda: (wrong, hopper, EMULATED[0]))
    assert command.main(["--place", "emulated"]) == 1
    said = capsys.readouterr().out
    assert "FAILED   wrong: d: 2 of 2 differ, first at (0,): 0.0, expected 1.0" in said
    assert "not run  hopper: the emulator has no such instruction" in said
    assert "1 passed, 1 failed, 1 not run" in said
    assert command.why_not(hopper, "cuda", 80) == "needs sm_90, the device is sm_80"


def test_probes_share_few_processes() -> None:
    shared = command.groups(PROBES)
    assert sorted(p.name for group in shared for p in group) == sorted(p.name for p in PROBES)
    assert len(shared) <= 5
    assert all(p.needs == 80 for p in shared[0])
    assert len([p for p in PROBES if p.needs == 80]) == len(shared[0])


def test_a_probe_that_hangs_or_dies_is_a_failure_and_spoils_no_other(tmp_path: Path) -> None:
    """`--these` finds probes by name: one that nobody knows ends its process before any has run."""
    first, second = EMULATED[:2]
    until = time.monotonic() + 300
    ran = list(command.run_apart([first, second], "emulated", until, tmp_path))
    assert [(probe, failure) for probe, failure, _ in ran] == [(first, ""), (second, "")]
    assert all(np.array_equal(arrays["d"], run(probe)["d"]) for probe, _, arrays in ran)
    unknown = Probe("unknown", dict, first.run, first.expected)
    (_, failure, arrays), (_, after, _) = command.run_apart([unknown, first], "emulated", until, tmp_path)
    assert "KeyError: 'unknown'" in failure
    assert (arrays, after) == ({}, "")


def test_a_hang_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process of its own, as run_apart has it."""
    child = "import tests.conformance.__main__ as c, tests.conformance.registry as r, time, pathlib, sys\n"
    child += "p = c.Probe('hangs', dict, lambda launch, of: time.sleep(60), lambda of: {})\n"
    child += "c.run_these([p], 'emulated', time.monotonic() + 0.4, pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", child, str(tmp_path)], cwd=command.ROOT, timeout=60)
    assert done.returncode == -signal.SIGALRM
    monkeypatch.setattr(command.sys, "executable", "false")
    ((_, failure, _),) = command.run_apart(EMULATED[:1], "emulated", time.monotonic() + 60, tmp_path)
    assert failure == "exit code 1"
    late = list(command.run_apart(EMULATED[:2], "emulated", time.monotonic(), tmp_path))
    assert [failure for _, failure, _ in late] == ["not run: no time was left"] * 2


def test_golden_vectors_are_kept_from_the_first_probe_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def dies(launch: object, of: Arrays) -> Arrays:
        raise KeyboardInterrupt

    file = tmp_path / "golden.npz"
    monkeypatch.setattr(registry, "probes", lambda: (EMULATED[0], Probe("dies", dict, dies, lambda of: {})))
    with pytest.raises(KeyboardInterrupt):
        command.main(["--place", "emulated", "--golden", str(file)])
    assert list(golden.load(file)[1]) == [EMULATED[0].name]


def test_a_full_disk_costs_the_file_and_no_probe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(file: Any, **_: object) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "golden.npz"
    monkeypatch.setattr(registry, "probes", lambda: EMULATED[:2])
    monkeypatch.setattr(golden.np, "savez_compressed", full)
    assert command.main(["--place", "emulated", "--golden", str(file)]) == 1
    assert list(tmp_path.iterdir()) == []
    said = f"2 passed, 0 failed, 0 not run; {file} is not written: No space left on device"
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_a_gpu_that_is_not_there_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--place", "cuda"])
    assert "argument --place: torch sees no CUDA device here" in capsys.readouterr().err
