"""Refused calls leave nothing behind: no tensor, no object of Python's, no reference to what they were given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Calls every malformed call a few times, and prints what that left behind. The first two rounds fill torch's caches.
REFUSE = """
import gc, json, os, sys, tempfile, warnings
import torch
import freezekit as fk
from freezekit.functional import conv2d
from tests.dropin import hostile, malformed, test_bad_input
from tests.dropin.public_calls import CALLS
from tests.dropin.test_public_errors import model

warnings.simplefilter("ignore")
torch.set_num_threads(1)
os.chdir(tempfile.mkdtemp())
ROUNDS = 8
GIVEN = [malformed.X, malformed.W, malformed.B, hostile.X, hostile.W, hostile.G, hostile.ONES]
raw = [(op, arguments) for op, arguments in hostile.cases(0)][::3]

def refusals():
    for bad in test_bad_input.TABLE:
        yield lambda bad=bad: bad.call(conv2d)
    for bad in CALLS:
        net = model()
        yield lambda bad=bad, net=net: bad.call(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for op, arguments in raw:
        yield lambda op=op, arguments=arguments: getattr(torch.ops.freezekit, op)(**hostile.own(op, arguments))

def refuse():
    refused = 0
    for call in refusals():
        try:
            call()
        except Exception:
            refused += 1
    return refused

def state():
    gc.collect()
    rss = int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
    tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    references = sum(sys.getrefcount(t) + t._use_count() for t in GIVEN)
    return dict(blocks=sys.getallocatedblocks(), kib=rss, tensors=tensors, references=references)

for _ in range(2):
    refused = refuse()
before = state()
for _ in range(ROUNDS):
    refuse()
after = state()
print(json.dumps({"refused": refused * ROUNDS, **{name: after[name] - before[name] for name in before}}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_refused_calls_leave_nothing_behind() -> None:
    run = subprocess.run([sys.executable, "-c", REFUSE], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    left = json.loads(run.stdout.strip().splitlines()[-1])
    assert left["refused"] > 3000, left
    assert left["tensors"] == left["references"] == 0, left
    # One object a refusal would be as many blocks as refusals, one output of conv2d 3.4 KiB each.
    assert left["blocks"] < left["refused"] / 20, left
    assert left["kib"] < 2 * left["refused"], left
