"""Runs many checks in one torchrun, since processes are slow to start, and brings each one's outcome back.

A worker module defines functions ``check_*()`` and ends with ``run(globals())``. The test module calls `outcomes` once
and makes a test of each check. Loopback only.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
OUT = "FREEZEKIT_TEST_OUT"


def names(worker: Path) -> list[str]:
    """The checks that a worker defines, found without importing it."""
    return [line.split("(")[0][4:] for line in worker.read_text().splitlines() if line.startswith("def check_")]


def outcomes(worker: Path, ranks: int = 2, timeout: float = 240) -> dict[str, str]:
    """Check -> "" when it passed on every rank, else what each rank raised, or how the run ended without it."""
    loopback = next(n for _, n in socket.if_nameindex() if n.startswith("lo"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.json"
        env = {**os.environ, OUT: str(out), "GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(ROOT)]))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                   "--nproc-per-node", str(ranks), str(worker)]  # fmt: skip
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
        found = json.loads(out.read_text()) if out.exists() else {}
        for name in names(worker):
            found.setdefault(name, f"it did not finish (status {done.returncode}):\n{done.stderr[-4000:]}")
        return found


def run(scope: dict[str, Any]) -> None:
    """Run every check that a worker module defines (not those it imports); rank 0 writes the outcomes after each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    own = {n: f for n, f in scope.items() if getattr(f, "__module__", None) == "__main__"}
    checks: dict[str, Callable[[], None]] = {n: f for n, f in own.items() if n.startswith("check_")}
    for name, check in checks.items():
        problem = ""
        try:
            torch.manual_seed(0)
            check()
        except Exception:
            problem = f"rank {dist.get_rank()}:\n{traceback.format_exc()}"
            # A rank that fails alone is out of step with the others from here on: what it has to say must not be lost.
            print(f"{name}: {problem}", file=sys.stderr, flush=True)
        problems: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        found[name] = "\n".join(p for p in problems if p)
        if dist.get_rank() == 0:
            Path(os.environ[OUT]).write_text(json.dumps(found))
    dist.destroy_process_group()


def same_on_all_ranks(tensors: dict[str, torch.Tensor]) -> None:
    """Assert that every tensor has the same bits on every rank."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, {k: v.detach().cpu() for k, v in tensors.items()})
    for other in every[1:]:
        assert every[0].keys() == other.keys()
        for name, value in every[0].items():
            assert torch.equal(value, other[name]), f"{name} differs between ranks"


def raises(kind: type[Exception], *words: str) -> Any:
    """``pytest.raises`` for a worker: the block must raise ``kind`` with every word in its message."""
    return _Raises(kind, words)


class _Raises:
    def __init__(self, kind: type[Exception], words: tuple[str, ...]) -> None:
        self.kind, self.words = kind, words

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert kind is not None, f"expected {self.kind.__name__}, nothing was raised"
        if not issubclass(kind, self.kind):
            return False
        missing = [w for w in self.words if w not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        return True
