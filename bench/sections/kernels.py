"""The forum example: three convolutions, and what their backward pass runs with the middle one trainable and frozen.

Somebody asked on discuss.pytorch.org whether the gradient of a frozen layer is really not computed. The kernel table
answers: two dgrads and three wgrads while all learn (the input needs no gradient), two and two with the middle frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import describe
from bench.settings import Settings
from bench.sides import SIDES, why_absent
from bench.verify import WrongResult, check, tolerance
from freezekit.profiling import KernelTable, profile

OWN = "freezekit_native"
EXPECTED = {"all trainable": {"dgrad": 2, "wgrad": 3}, "middle frozen": {"dgrad": 2, "wgrad": 2}}


@dataclass(frozen=True)
class Profiled:
    """One side's kernel table in one regime, forward and backward pass, or why there is none."""

    regime: str
    side: str
    counts: dict[str, int]
    table: KernelTable
    failure: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "regime": self.regime,
            "side": self.side,
            "counts": self.counts,
            "kernels": self.table.to_dicts(),
            "failure": self.failure,
        }


def example(device: torch.device, dtype: torch.dtype, middle_frozen: bool) -> tuple[nn.Sequential, Tensor]:
    """Three ``Conv2d(3, 3, 3)`` and an input of 1 x 3 x 24 x 24 that needs no gradient."""
    layers = nn.Sequential(*(nn.Conv2d(3, 3, 3, device=device, dtype=dtype) for _ in range(3)))
    layers[1].requires_grad_(not middle_frozen)
    return layers, torch.randn(1, 3, 24, 24, device=device, dtype=dtype)


def sides(settings: Settings) -> tuple[str, ...]:
    """Whose tables there are: stock's, freezekit's and, on a GPU, those of freezekit's own kernels."""
    return ("stock", "freezekit", *(() if why_absent(OWN, settings.device) else (OWN,)))


def failed(regime: str, name: str, why: str) -> Profiled:
    """A side without a table."""
    return Profiled(regime, name, {}, KernelTable(()), why)


def run(regime: str, settings: Settings) -> list[Profiled]:
    """The tables of a regime.

    A side that fails, gives other results than stock or runs other phases than EXPECTED has its reason in place of a
    table.
    """
    torch.manual_seed(settings.seed)
    stock, x = example(settings.device, settings.dtype, regime == "middle frozen")
    reference: dict[str, Tensor] = {}
    made = []
    for name in sides(settings):
        try:
            made.append(_profiled(regime, name, stock, x, reference, settings))
        except Exception as error:
            made.append(failed(regime, name, describe(error)))
    return made


def _profiled(
    regime: str, name: str, stock: nn.Module, x: Tensor, reference: dict[str, Tensor], settings: Settings
) -> Profiled:
    """One table; stock's results become the reference."""
    side = SIDES[name]
    model = side.build(stock)
    forward = side.forward(model)
    results = _results(model, forward, x)
    if name == "stock":
        reference.update(results)
    # 9 products per input channel, three layers deep; gradients of weights sum over 22 x 22 positions.
    bound = tolerance(settings.dtype, 3 * 22 * 22, settings.tf32)
    check(f"forum example, {regime}", name, results, reference, dict.fromkeys(reference, bound))
    with profile():  # The first recording pays for the profiler's own start.
        _results(model, forward, x)
    with profile() as recorded:
        forward(x).mean().backward()
    counts = recorded.counts()
    found = {phase: counts[phase] for phase in EXPECTED[regime]}
    if name != "stock" and found != EXPECTED[regime]:
        raise WrongResult(f"forum example, {regime}: {name} ran {found}, expected {EXPECTED[regime]}")
    return Profiled(regime, name, counts, recorded.kernels())


def _results(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """One step's output and gradients, by name; the gradients are cleared."""
    y = forward(x)
    y.mean().backward()
    results = {"y": y.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[name], parameter.grad = parameter.grad, None
    return results
