"""One case, from (seed, index): what it is, whether it fails, and the command that repeats it."""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass

from tests.fuzz import calls, sequences

LIFE_EVERY = 10  # one case in ten is a whole life, which takes about as long as the nine calls


def _rng(seed: int, index: int) -> random.Random:
    return random.Random(f"{seed}/{index}")


def describe(seed: int, index: int) -> str:
    if index % LIFE_EVERY == LIFE_EVERY - 1:
        return f"case {index} of seed {seed}: the life of a model, in {sequences.LENGTH} steps"
    return f"case {index} of seed {seed}: {calls.draw(_rng(seed, index))}"


@dataclass(frozen=True)
class Outcome:
    """Of one case: what went wrong and how to repeat it, or how torch itself fails there; both "" if it passed."""

    failure: str = ""
    passed_over: str = ""


def run_case(seed: int, index: int) -> Outcome:
    rng = _rng(seed, index)
    try:
        if index % LIFE_EVERY == LIFE_EVERY - 1:
            sequences.check(rng)
        else:
            calls.check(calls.draw(rng))
    except calls.TorchFails as error:
        return Outcome(passed_over=f"{describe(seed, index)}: torch itself {error}")
    except Exception as error:
        where = "" if isinstance(error, AssertionError) else traceback.format_exc()
        command = f"python -m tests.fuzz --seed {seed} --case {index}"
        return Outcome(f"{describe(seed, index)}\n{where}{error}\nrepeat it with: {command}")
    return Outcome()
