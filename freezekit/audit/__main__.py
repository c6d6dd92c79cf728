"""``python -m freezekit.audit module:factory``: audit from a shell.

Exit status: 0 no error found, 1 an error found (with ``--strict`` a warning too), 2 the factory could not be used.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from freezekit.audit import Report, audit

OK, FOUND, UNUSABLE = 0, 1, 2


class FactoryError(Exception):
    """The factory could not be found, failed, or returned something else than it should."""


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


def build(spec: str) -> tuple[Any, ...]:
    """Call the factory; its result as ``(model,)``, ``(model, optimizer)`` or ``(model, optimizer, inputs)``."""
    factory = load(spec)
    try:
        made = factory()
    except Exception as e:
        raise FactoryError(f"{spec} raised {type(e).__name__}: {e}") from e
    made = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(made) <= 3 or not isinstance(made[0], nn.Module):
        kinds = ", ".join(type(m).__name__ for m in made)
        raise FactoryError(f"{spec} must return model, (model, optimizer) or (model, optimizer, inputs), got ({kinds})")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m freezekit.audit", description=__doc__)
    parser.add_argument("factory", help="module:callable that returns model, (model, optimizer[, inputs])")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for a warning too")
    options = parser.parse_args(argv)
    try:
        report: Report = audit(*build(options.factory))
    except (FactoryError, TypeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return UNUSABLE
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        report.print()
    failed = report.errors or (options.strict and report.warnings)
    return FOUND if failed else OK


if __name__ == "__main__":
    sys.exit(main())
