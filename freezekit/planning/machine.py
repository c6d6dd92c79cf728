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
        flops: floating-point operations a second of a matrix product.
        bandwidth: bytes a second, read and written, of a copy.
    """

    flops: float
    bandwidth: float

    @staticmethod
    def measure(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
        """Times one matrix product and one copy on `device`: about 0.2 s."""
        device = torch.device(device)
        a = torch.randn(1024, 1024, device=device).to(dtype)
        b = torch.randn(2**24, device=device)
        out = torch.empty_like(b)
        product, copy = seconds(lambda: a @ a, device), seconds(lambda: out.copy_(b), device)
        return Machine(flops=2 * 1024**3 / product, bandwidth=2 * b.nbytes / copy)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of a few runs: what the machine can do when nobody else wants it."""
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
