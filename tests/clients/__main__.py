"""Writes the table of docs/clients.md: what each client's networks keep and take, against stock.

    PYTHONPATH=.:build/clients python -m tests.clients docs/clients.md

`make clients` runs it once the tests have passed.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from bench.environment import describe
from bench.packages import missing
from bench.timing import HostClock, interleave, small_heap
from tests.clients.cases import CASES, Case
from tests.clients.harness import WAYS, Compared, compare, runs

ROUNDS = 7
FACTS = ("device", "threads", "torch", "commit", "date")  # of the environment, on the page

PAGE = """\
# Networks of other libraries

What freezekit does for networks of a dozen libraries as their users run them: small, with random weights, frozen but
for what the table says. Written by `python -m tests.clients docs/clients.md`, which `make clients` runs after the tests
of `tests/clients`, on {device}, {threads} thread, torch {torch}, freezekit commit {commit}, {date}.

- **stock keeps**: bytes for the backward pass after a forward pass, parameters not counted.
- **converted** (`fk.convert`), **enabled** (`fk.enabled()`), **fused** (`fk.fuse` of the converted network): bytes
  kept, and time of forward and backward, both as fractions of stock's. Times are medians of {rounds} interleaved rounds
  of small networks, on a machine that others use too: they are reported, and no test asks for them.
- **differs**: the largest difference of an output and of a gradient from stock's in float32, relative to the largest
  element of the same tensor; "=" is bit for bit. Converted and enabled networks have stock's outputs bit for bit; a
  fused block rounds otherwise. Where a gradient of a fused network differs by 1e-3, a ReLU is on the other side of
  zero: in float64, where none is so near, the tests hold all of them to 1e-10.

| network | learns | stock keeps | converted | enabled | fused | converted differs | enabled differs | fused differs |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

## What each client asks of freezekit
`tests/clients/test_situations.py` holds all of this.

- **peft** adapts converted layers as it does stock's, and what it merges into frozen weights is seen at the next call.
  Trainers that choose layers by the name of their class find none in a converted model: use `fk.enabled()`.
- **captum**'s DeepLift finds its rules by exact class, and has none for converted layers; its figures would be others,
  without a word. With `fk.enabled()` they are stock's. Other methods agree either way.
- **torchvision**'s `create_feature_extractor` gives stock's values with `fk.enabled()`.
- **torchattacks** leaves norms that `fk.freeze` holds as they are.
- **Lightning**'s BackboneFinetuning works as on stock; a callback of yours may call `fk.freeze` and `fk.unfreeze`, also
  within a validation, behind which Lightning writes back the modes that it had recorded.
- **fastai**'s `freeze` and `unfreeze`, the checkpointing of **timm** and **diffusers**, and **ultralytics**' `fuse`
  work as on stock.
- `fk.explain` counts every byte of each network in the table, and changes nothing in it.

The packages, of which `requirements-clients.txt` pins all that is imported: {versions}. They are unpacked beside the
environment, without their own dependencies. torchvision's wheel belongs to torch with CUDA: beside a CPU build the
tests bring non-maximum suppression, in Python, for its detectors.
"""


def row(case: Case) -> str:
    """A case's line of the table."""
    side = runs(case, torch.float32)
    differences = compare(side)
    with small_heap():
        kept = {way: run.kept() for way, run in side.items()}
    timed = interleave(
        {way: run.step for way, run in side.items()},
        clock=HostClock(),
        rounds=ROUNDS,
        warmup=1,
        within={way: run.within for way, run in side.items()},
    )
    cells = [f"{case.client}: {case.name}", case.learns, f"{kept['stock'] / 1024:.0f} KiB"]
    cells += [f"{kept[way] / kept['stock']:.3f}, {timed.ratio(way, 'stock').median:.2f}" for way in WAYS]
    return f"| {' | '.join([*cells, *(differing(differences[way]) for way in WAYS)])} |"


def differing(found: Compared) -> str:
    """
    >>> differing(Compared(True, 0.0, 1.5e-6))
    '=, 2e-06'
    """
    values = "=" if found.equal else f"{found.value_error:.0e}"
    return f"{values}, {f'{found.gradient_error:.0e}' if found.gradient_error else '='}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description="Write the table of clients.")
    parser.add_argument("page", type=Path, help="the file to write")
    page = parser.parse_args(argv).page
    if absent := sorted({why for case in CASES if (why := missing(case.client))}):
        print(*absent, sep="\n", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    here = describe(torch.device("cpu"), torch.float32)
    rows = []
    for case in CASES:
        rows.append(row(case))
        print(rows[-1], flush=True)
    clients = dict.fromkeys(case.client for case in CASES)
    versions = ", ".join(f"{client} {version(client)}" for client in clients)
    page.write_text(
        PAGE.format(rows="\n".join(rows), rounds=ROUNDS, versions=versions, **{k: getattr(here, k) for k in FACTS})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
