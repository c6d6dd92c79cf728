"""What every test shares: the backends under test, and torch settings that keep runs repeatable."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# Tensors of tests are tiny: a second thread costs more than it computes, and test workers want the cores.
torch.set_num_threads(1)

# torch.manual_seed, which is called before each test and each of torch's samples, writes out the whole stack for every
# kind of device that has not started, should seeding fail there one day: milliseconds under pytest.
for device in (torch.cuda, torch.xpu, torch.mtia):
    device.traceback = SimpleNamespace(format_stack=list)

gpu = pytest.param("native", marks=pytest.mark.gpu)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


NVIDIA_LINE = "nvidia"  # a property of tests/truth's tests: what was compared with NVIDIA's sources


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each comparison with NVIDIA's sources."""
    results = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    lines = sorted(line for result in results for name, line in result.user_properties if name == NVIDIA_LINE)
    if lines:
        terminalreporter.section("freezekit and NVIDIA's sources")
        terminalreporter.write_line("\n".join(lines))


def on(backend: Any) -> AbstractContextManager[object]:
    """What to enter for a backend under test, of which "emulated" is none of the users' own."""
    import freezekit as fk  # Here: some tests need no build of it.

    return fk.testing.emulated() if backend == "emulated" else fk.backend(backend)


@pytest.fixture(params=["aten", "emulated", gpu])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """(backend, device): ATen and the emulated kernels on the CPU, the CUDA kernels on a GPU. The test runs on it."""
    with on(request.param):
        yield request.param, "cuda" if request.param == "native" else "cpu"


@pytest.fixture(scope="module", autouse=True)
def collected_once() -> None:
    """Tests that count bytes collect garbage often: spare them the millions of objects that a worker has imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    # The kernels obey it, emulated or not: float32 is float32 here unless a test says otherwise.
    torch.backends.cudnn.allow_tf32 = False
