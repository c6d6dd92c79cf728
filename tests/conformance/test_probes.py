"""The probes are right: emulated they give what the PTX ISA says, and a wrong result shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
    flat[-1] = flat[-1] + 1 if flat.dtype.kind != "f" else np.nan_to_num(flat[-1]) * 2 + 1
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
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_the_gpu_gives_what_the_manual_says(probe: Probe, tmp_path: Path) -> None:
    if reason := command.why_not(probe, "cuda", command.describe("cuda")["sm"]):
        pytest.skip(reason)
    failure, arrays = command.run_apart(probe, "cuda", 60, tmp_path)
    assert not failure
    assert arrays


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


def test_a_probe_that_hangs_or_dies_is_a_failure(tmp_path: Path) -> None:
    assert command.run_apart(EMULATED[0], "emulated", 0.01, tmp_path) == ("did not end within 0.01 s", {})
    unknown = Probe("unknown", dict, EMULATED[0].run, EMULATED[0].expected)
    failure, arrays = command.run_apart(unknown, "emulated", 60, tmp_path)
    assert "StopIteration" in failure
    assert arrays == {}
