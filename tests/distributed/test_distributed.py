"""Freezing under DDP and FSDP2 on two gloo processes: one torchrun a worker, one test a check."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from freezekit import distributed
from freezekit.distributed.watching import note_freeze
from tests.distributed.harness import names, outcomes

HERE = Path(__file__).parent
WORKERS = ("ddp_worker", "rewrap_worker", "fsdp_worker")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
results = cache(outcomes)


@pytest.mark.parametrize(
    ("worker", "check"),
    [(w, c) for w in WORKERS for c in names(HERE / f"{w}.py")],
    ids=lambda v: v.removeprefix("check_"),
)
def test_on_two_ranks(worker: str, check: str) -> None:
    problem = results(HERE / f"{worker}.py")[check]
    assert not problem, problem


def test_nothing_is_installed_without_a_process_group() -> None:
    model = nn.Linear(2, 2)
    note_freeze(model)
    assert not model._forward_pre_hooks


def test_it_shows_what_users_call_and_no_internals() -> None:
    names = {"StaleWrapperError", "Mismatch", "check", "check_ranks", "mismatch", "reduced", "rewrap", "sync_buffers"}
    assert set(distributed.__all__) == names | {"watch", "wrappers"}
