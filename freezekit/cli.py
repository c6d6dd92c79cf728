"""The `freezekit` command: info, explain, plan, audit, selftest and profile from a shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from freezekit.audit.__main__ import FactoryError, build

EPILOG = """examples:
  freezekit info
  freezekit explain mymodels:resnet --json > kept.json
  freezekit plan mymodels:resnet --memory 500M --plot plan.png
  freezekit audit mymodels:training_setup

A model is given as module:factory: the factory takes no arguments and returns (model, inputs) or
(model, optimizer, inputs); for audit, inputs may be missing. The module is looked for in the current folder first.

exit codes: 0 done; 1 something was found (audit errors, selftest failures, no plan within budget); 2 wrong usage."""


def load_model(text: str) -> tuple[nn.Module, Any]:
    """Model and inputs from `module:factory`.

    Raises:
        FactoryError: if there is no such factory, or if it returns no inputs.
    """
    model, *rest = build(text)
    rest = [made for made in rest if not isinstance(made, Optimizer)]
    if len(rest) != 1:
        raise FactoryError(f"{text} must return (model, inputs) or (model, optimizer, inputs): inputs are missing")
    return model, rest[0]


def parse_bytes(text: str) -> float:
    """A number of bytes with an optional unit of 1024: K, M or G.

    >>> parse_bytes("1.5M")
    1572864.0
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = (text[:-1], units[text[-1].upper()]) if text and text[-1].upper() in units else (text, 1)
    try:
        value = float(number) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected bytes such as 800M or 1.5G, got {text!r}") from None
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of bytes, got {text!r}")
    return value


def _info(options: argparse.Namespace) -> int:
    from freezekit.info import describe

    print(describe())
    return 0


def _explain(options: argparse.Namespace) -> int:
    from freezekit.explain import explain

    explanation = explain(*load_model(options.model))
    _show(explanation, options)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from freezekit.plan import plan

    made = plan(*load_model(options.model), memory=options.memory, time=options.time)
    _show(made, options)
    budget = options.memory is not None or options.time is not None
    return int(budget and made.choice is None)


def _show(report: Any, options: argparse.Namespace) -> None:
    if options.plot:
        report.plot(options.plot)
    if options.json:
        print(report.to_json())
    else:
        report.print()


def _audit(options: argparse.Namespace) -> int:
    from freezekit.audit.__main__ import main

    return main([options.model, *(["--json"] if options.json else [])])


def _selftest(options: argparse.Namespace) -> int:
    from freezekit.selftest import main

    return min(main(["--backend", options.backend] if options.backend else []), 1)


def _profile(options: argparse.Namespace) -> int:
    import torch

    from freezekit.profiling import profile

    model, inputs = load_model(options.model)
    arguments = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    with profile() as recorded:
        output = model(*arguments)
        (output if isinstance(output, torch.Tensor) else output[0]).mean().backward()
    print(recorded.to_json() if options.json else recorded.kernels())
    if options.trace:
        recorded.to_chrome_trace(options.trace)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    made = argparse.ArgumentParser(
        prog="freezekit",
        description="See what freezing layers buys, and whether what is frozen stays so.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, model: bool) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if model:
            sub.add_argument("model", metavar="module:factory", help="a callable that returns (model, inputs)")
            sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return sub

    command("info", _info, "versions, kernels and devices", model=False)
    explain = command("explain", _explain, "what a training step computes and keeps, layer by layer", model=True)
    explain.add_argument("--plot", type=Path, metavar="PNG", help="draw the kept bytes")
    plan = command("plan", _plan, "what freezing would buy, for every depth", model=True)
    plan.add_argument("--plot", type=Path, metavar="PNG", help="draw memory and time against depth")
    plan.add_argument("--memory", type=parse_bytes, metavar="BYTES", help="budget for what is kept, such as 800M")
    plan.add_argument("--time", type=float, metavar="SECONDS", help="budget for the backward pass")
    command("audit", _audit, "what would still move, run or be kept, and how to mend it", model=True)
    selftest = command("selftest", _selftest, "every kernel against float64, on the device that is here", model=False)
    selftest.add_argument("--backend", choices=("native", "emulated", "aten"))
    profile = command("profile", _profile, "the kernels of one forward and backward pass", model=True)
    profile.add_argument("--trace", type=Path, metavar="JSON", help="write a Chrome trace")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except FactoryError as error:
        print(f"freezekit {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
