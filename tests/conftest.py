"""What every test shares: the backends under test, and torch settings that keep runs repeatable."""

from __future__ import annotations

import os

import pytest
import torch

# One thread a worker where tests run in parallel: more would only fight for the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

gpu = pytest.param("native", marks=pytest.mark.gpu)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=["aten", "emulated", gpu])
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device): ATen and the emulated kernels on the CPU, the CUDA kernels on a GPU."""
    return request.param, "cuda" if request.param == "native" else "cpu"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
