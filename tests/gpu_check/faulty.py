"""A command of gpu-check with a fault in it: `python -m tests.gpu_check.faulty FAULT ARGUMENTS...` of that command.

All else is the command's own: its arguments, its limits, what it starts, prints and writes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bench import compare, sides
from freezekit import selftest
from tests.conformance import __main__ as conformance
from tests.conformance import drivers, registry


def wrong_probe() -> Callable[..., int]:
    """The second of three probes gives something else than is expected of it."""
    first, second, third = registry.probes()[:3]
    expected = second.expected
    second = replace(second, expected=lambda of: {name: array + 1 for name, array in expected(of).items()})
    registry.probes = lambda: (first, second, third)
    return conformance.main


def hanging_driver() -> Callable[..., int]:
    """None of the kernels' drivers ends."""
    script = Path(sys.argv.pop(2))
    drivers.build_emulated = lambda *_: script
    return drivers.main


def crash() -> Callable[..., int]:
    """The third row of the self-test ends its process."""
    run, rows = selftest._run, list[Any]()

    def dying(*arguments: Any) -> Any:
        if len(rows) == 2:
            os.abort()
        rows.append(run(*arguments))
        return rows[-1]

    selftest._run = dying
    return selftest.main


class Doubled(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.module(x) if x.shape[1] == 16 else self.module(x)


def wrong_row() -> Callable[..., int]:
    """One layer in four gives twice what it should."""
    sides.SIDES["freezekit"] = sides.Side("freezekit", Doubled)
    few = ["--section", "layers", "--layers", "tiny", "--repeat", "1"]
    return lambda arguments: compare.main([*arguments, *few])


if __name__ == "__main__":
    faults = {made.__name__: made for made in (wrong_probe, hanging_driver, crash, wrong_row)}
    command = faults[sys.argv[1]]()
    sys.exit(command(sys.argv[2:]))
