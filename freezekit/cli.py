"""The `freezekit` command: info, explain, plan, audit, selftest and profile from a shell."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from freezekit._inputs import Arguments, arguments, tensors_in
from freezekit.enabling import enabled
from freezekit.profiling import profile

EPILOG = """examples:
  freezekit info
  freezekit info --choices mymodels:resnet
  freezekit explain mymodels:resnet --json > kept.json
  freezekit explain mymodels:detector --enabled
  freezekit plan mymodels:resnet --memory 500M --plot plan.png
  freezekit profile mymodels:resnet --against mymodels:frozen_resnet
  freezekit audit mymodels:training_setup

A model is given as module:factory: the factory takes no arguments and returns (model, inputs) or
(model, optimizer, inputs); for audit, inputs may be missing. The module is looked for in the current folder first:

  # mymodels.py
  def resnet():
      model = fk.convert(torchvision.models.resnet50())
      fk.freeze(model, "layer1", "layer2.*")
      return model, torch.empty(32, 3, 224, 224)

exit codes: 0 done; 1 something was found (audit errors, selftest failures, no plan within budget); 2 wrong usage,
or a model that does not run."""

# What each command's own --help says beyond its one line.
_MORE = {
    "info": """Says whether CUDA kernels were compiled in, for which architectures, and which devices torch sees.
With --choices it runs a training step of the model twice and lists what backend "auto" has decided for it on this GPU:
which kernels were equal to torch's operators and not slower, with the times, and what differed where they were not.
Nothing is decided on a CPU.""",
    "explain": """One row per layer, from a forward pass without data: nothing is computed, and a model too big for the
machine can be explained.

  runs              what a training step runs now: fprop, dgrad, wgrad, db
  kept              bytes that autograd keeps for the layer's backward, parameters aside
  also held         bytes that an earlier row keeps and this one holds too: freezing one of them frees nothing;
                    "made from" a row: the operand is made again in backward from what that row keeps
  kernel            what computes it, and why
  what would ...    what converting, freezing or fusing the layer would take away""",
    "plan": """Freezes the first layers, one more each time, and each named regime: the bytes are exact, times are
predicted from the machine's measured speed. With --memory or --time the shallowest depth that fits is marked.""",
    "audit": """Asks the optimizer, by a step on copies, whether it would move what is frozen; looks for typos, stale
gradients and momenta, wrappers that are out of date, memory kept in vain; says how to mend each.""",
    "selftest": "Every kernel family against float64, each case with its error as a fraction of the bound.",
    "profile": """Runs forward and backward once and lists the kernels (operators on a CPU) by time. In brackets: what
each computes for a convolution: fprop, dgrad, wgrad, db, epilogue.""",
}


class FactoryError(Exception):
    """The factory could not be found, failed, or did not return what it should."""


def load(spec: str) -> Any:
    """The object that ``module:name`` names; ``name`` may have dots.

    Raises:
        FactoryError: no such module, no such name, or not callable.
    """
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise FactoryError(f"expected module:factory, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as e:
        raise FactoryError(f"cannot load {spec!r}: {e}") from e
    if not callable(found):
        raise FactoryError(f"{spec!r} is a {type(found).__name__}, not a callable")
    return found


class Made(NamedTuple):
    """What a factory made; `optimizer` and `inputs` are None where it made none."""

    model: nn.Module
    optimizer: Any = None
    inputs: Any = None


def build(spec: str) -> Made:
    """Call the factory, which returns a model, and an optimizer (or several), and inputs, or one of the two.

    Raises:
        FactoryError: the factory cannot be loaded, raises, or returns something else.
    """
    factory = load(spec)
    try:
        made = factory()
    except Exception as e:
        raise FactoryError(f"{spec} raised {type(e).__name__}: {e}") from e
    made = made if isinstance(made, tuple) else (made,)
    if 1 <= len(made) <= 3 and isinstance(made[0], nn.Module):
        if len(made) == 2 and not _is_optimizer(made[1]):
            return Made(made[0], None, made[1])
        if len(made) < 3 or made[1] is None or _is_optimizer(made[1]):
            return Made(*made)
    kinds = ", ".join(type(m).__name__ for m in made)
    raise FactoryError(
        f"{spec} must return model, (model, optimizer), (model, inputs) or (model, optimizer, inputs), got ({kinds})"
    )


def _is_optimizer(made: Any) -> bool:
    several = made if isinstance(made, (list, tuple)) else (made,)
    return len(several) > 0 and all(isinstance(one, Optimizer) for one in several)


def load_model(text: str) -> tuple[nn.Module, Any]:
    """Model and inputs from `module:factory`.

    Raises:
        FactoryError: if there is no such factory, or if it returns no inputs.
    """
    made = build(text)
    if made.inputs is None:
        raise FactoryError(f"{text} must return (model, inputs) or (model, optimizer, inputs): inputs are missing")
    return made.model, made.inputs


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
    from freezekit.info import describe, info
    from freezekit.tuning import choices

    if options.choices is None:
        print(json.dumps(info(), indent=2) if options.json else describe())
        return 0
    model, inputs = load_model(options.choices)
    for _ in range(2):  # The second step finds what the first has made, such as gradients.
        _step(model, arguments(inputs))
    made = choices()
    if options.json:
        print(json.dumps([{**asdict(choice), "backend": choice.backend} for choice in made], indent=2))
    else:
        print("\n".join(map(str, made)) or "nothing was decided: freezekit's kernels met no GPU here")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from freezekit.explanation import explain

    with _switch(options):
        explanation = explain(*load_model(options.model))
    _show(explanation, options)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from freezekit.planning import plan

    with _switch(options):
        made = plan(*load_model(options.model), memory=options.memory, time=options.time, measure=options.measure)
    _show(made, options)
    budget = options.memory is not None or options.time is not None
    return int(budget and made.choice is None)


def _switch(options: argparse.Namespace) -> AbstractContextManager[object]:
    return enabled() if options.enabled else nullcontext()


def _show(report: Any, options: argparse.Namespace) -> None:
    if options.plot:
        report.plot(options.plot)
    if options.json:
        print(report.to_json())
    else:
        report.print()


def _audit(options: argparse.Namespace) -> int:
    from freezekit.auditing import audit

    report = audit(*build(options.model))
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        report.print()
    return int(bool(report.errors or (options.strict and report.warnings)))


def _selftest(options: argparse.Namespace) -> int:
    from freezekit.selftest import main

    backend = ["--backend", options.backend] if options.backend else []
    hopper = ["--hopper"] if options.hopper else []
    save = ["--save-choices", options.save_choices] if options.save_choices else []
    return min(main([*backend, *hopper, *save]), 1)


def _profile(options: argparse.Namespace) -> int:
    with _switch(options):
        recorded = _record(options.model)
    if options.against is None:
        print(recorded.to_json() if options.json else recorded.kernels())
    else:
        with _switch(options):
            difference = recorded.diff(_record(options.against))
        print(difference.to_json() if options.json else difference)
    if options.trace:
        recorded.to_chrome_trace(options.trace)
    return 0


def _record(text: str) -> profile:
    """One forward and backward pass; the one before it, which pays for what is made once, is not recorded."""
    model, inputs = load_model(text)
    given = arguments(inputs)
    _step(model, given)
    with profile() as recorded:
        _step(model, given)
    return recorded


def _step(model: nn.Module, inputs: Arguments) -> None:
    outputs = [t for t in tensors_in(inputs.call(model)) if t.requires_grad]
    if outputs:  # With everything frozen and no input that learns there is no backward pass.
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


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
        description = f"{text[0].upper()}{text[1:]}.\n\n{_MORE[name]}"
        layout = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=text, description=description, formatter_class=layout)
        sub.set_defaults(run=run)
        if model:
            sub.add_argument("model", metavar="module:factory", help="a callable that returns (model, inputs)")
        if name in ("explain", "plan", "profile"):
            sub.add_argument("--enabled", action="store_true", help="with freezekit's kernels on torch's operators")
        if name != "selftest":
            sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return sub

    about = command("info", _info, "versions, kernels and devices", model=False)
    about.add_argument("--choices", metavar="module:factory", help="what 'auto' decides for this model, and why")
    explain = command("explain", _explain, "what a training step computes and keeps, layer by layer", model=True)
    explain.add_argument("--plot", type=Path, metavar="PNG", help="draw the kept bytes")
    plan = command("plan", _plan, "what freezing would buy, for every depth", model=True)
    plan.add_argument("--plot", type=Path, metavar="PNG", help="draw memory and time against depth")
    plan.add_argument("--memory", type=parse_bytes, metavar="BYTES", help="budget for what is kept, such as 800M")
    plan.add_argument("--time", type=float, metavar="SECONDS", help="budget for the backward pass")
    plan.add_argument("--measure", action="store_true", help="run each option too, and show both")
    audit = command("audit", _audit, "what would still move, run or be kept, and how to mend it", model=True)
    audit.add_argument("--strict", action="store_true", help="exit with 1 for a warning too")
    selftest = command("selftest", _selftest, "every kernel against float64, on the device that is here", model=False)
    selftest.add_argument("--backend", choices=("native", "aten"))
    selftest.add_argument("--hopper", action="store_true", help="the kernels for sm_90a alone")
    selftest.add_argument("--save-choices", metavar="FILE", help="with --hopper: choices that let 'auto' run them")
    step = command("profile", _profile, "the kernels of one forward and backward pass", model=True)
    step.add_argument("--trace", type=Path, metavar="JSON", help="write a Chrome trace")
    step.add_argument("--against", metavar="module:factory", help="another model: show what changes to it")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except FactoryError as error:
        print(f"freezekit {options.command}: {error}", file=sys.stderr)
        return 2
    except (ImportError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError) as error:
        # What torch says about a model and inputs that do not fit, or a file that cannot be written.
        print(f"freezekit {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
