"""Thousands of wrong calls of the raw operators: each is refused with a text, or taken; none crashes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from freezekit.backends import current_backend
from tests.dropin import hostile

ROOT = Path(__file__).resolve().parents[2]


def operators() -> set[str]:
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name.split("::")[1] for schema in schemas if schema.name.startswith("freezekit::")}


def test_every_raw_operator_is_attacked() -> None:
    assert set(hostile.RIGHT) == operators()
    for op, arguments in hostile.RIGHT.items():
        hostile.read(getattr(torch.ops.freezekit, op)(**hostile.own(op, arguments)))
    assert current_backend() == "auto"


def test_wrong_calls_crash_nothing() -> None:
    """In a process of its own, whose last line of stderr names the operator that ended it, if one did."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.dropin.hostile", "", "600"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    refused, taken = map(int, run.stdout.split())
    assert refused > 1500
    assert taken > 300
