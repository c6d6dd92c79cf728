"""The emulator gives what a GPU gave, once a GPU has run the probes (`make gpu-check` keeps its golden vectors)."""

from __future__ import annotations

import pytest

from tests.conformance import golden, place, registry
from tests.conformance.probe import Probe


@pytest.mark.skipif(not golden.FILE.exists(), reason="no GPU has made golden vectors yet")
@pytest.mark.parametrize("probe", [p for p in registry.probes() if p.emulated], ids=lambda probe: probe.name)
def test_the_emulator_gives_what_a_gpu_gave(probe: Probe) -> None:
    about, results = golden.load(golden.FILE)
    assert about["place"] == "cuda"
    actual = probe.run(place.PLACES["emulated"], probe.inputs())
    assert golden.against_golden(probe, actual, about, results) == []
