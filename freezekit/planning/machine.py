"""How fast the machine is: what predictions of time are made from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """What predictions of time are made from, measured by `measure`.

    Attributes:
        flops: floating-point operations per second, of a matrix product.
        bandwidth: bytes per second, read and written, of a copy.
    """

    flops: float
    bandwidth: float

    @staticmethod
    def measure(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
        """Times matrix products and copies on `device`: about 0.2 s."""
        device = torch.device(device)
        # On a GPU a single small kernel between two waits would measure the host.
        size, calls = (4096, 10) if device.type == "cuda" else (1024, 1)
        own = torch.Generator(device).manual_seed(0)  # a plan draws no random numbers that others are to draw
        a = torch.randn(size, size, device=device, generator=own).to(dtype)
        b = torch.randn(2**24, device=device, generator=own)
        out = torch.empty_like(b)
        product = seconds(lambda: [a @ a for _ in range(calls)], device) / calls
        copy = seconds(lambda: [out.copy_(b) for _ in range(calls)], device) / calls
        return Machine(flops=2 * size**3 / product, bandwidth=2 * b.nbytes / copy)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of a few runs: what the machine can do when nothing else runs on it."""
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
