"""The forum example: three convolutions, and what their backward pass runs while the middle one learns and when frozen.

discuss.pytorch.org asked whether a frozen layer's gradient is really not computed; the kernel table answers it: two
dgrads and three wgrads while all learn (the input needs no gradient), two and two with the middle layer frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.settings import Settings
from bench.sides import SIDES
from bench.verify import Tolerance, WrongResult, check
from freezekit.profiling import KernelTable, profile

EXPECTED = {"all trainable": {"dgrad": 2, "wgrad": 3}, "middle frozen": {"dgrad": 2, "wgrad": 2}}


@dataclass(frozen=True)
class Profiled:
    """One side's kernel table in one regime, forward and backward pass."""

    regime: str
    side: str
    counts: dict[str, int]
    table: KernelTable

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"regime": self.regime, "side": self.side, "counts": self.counts, "kernels": self.table.to_dicts()}


def example(device: torch.device, dtype: torch.dtype, middle_frozen: bool) -> tuple[nn.Sequential, Tensor]:
    """Three ``Conv2d(3, 3, 3)`` and an input of 1 x 3 x 24 x 24 that needs no gradient."""
    layers = nn.Sequential(*(nn.Conv2d(3, 3, 3, device=device, dtype=dtype) for _ in range(3)))
    layers[1].requires_grad_(not middle_frozen)
    return layers, torch.randn(1, 3, 24, 24, device=device, dtype=dtype)


def run(settings: Settings) -> Iterator[Profiled]:
    """Stock's and freezekit's tables of each regime.

    Raises:
        WrongResult: if freezekit's output or gradients differ from stock's, or its counts from EXPECTED.
    """
    for regime, expected in EXPECTED.items():
        torch.manual_seed(settings.seed)
        stock, x = example(settings.device, settings.dtype, regime == "middle frozen")
        reference: dict[str, Tensor] = {}
        for name in ("stock", "freezekit"):
            model = SIDES[name].build(stock)
            results = _results(model, x)
            reference = reference or results
            # 9 products an input channel, three layers deep; gradients of weights sum over 22 x 22 positions.
            tolerance = Tolerance(settings.dtype, 3 * 22 * 22, settings.tf32).relative
            check(f"forum example, {regime}", name, results, reference, dict.fromkeys(reference, tolerance))
            with profile():  # The first recording pays for the profiler's own start.
                _results(model, x)
            with profile() as recorded:
                model(x).mean().backward()
            counts = recorded.counts()
            found = {phase: counts[phase] for phase in expected}
            if name == "freezekit" and found != expected:
                raise WrongResult(f"forum example, {regime}: freezekit ran {found}, expected {expected}")
            yield Profiled(regime, name, counts, recorded.kernels())


def _results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One step's output and gradients, by name; the gradients are cleared."""
    y = model(x)
    y.mean().backward()
    results = {"y": y.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[name], parameter.grad = parameter.grad, None
    return results
