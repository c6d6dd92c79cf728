"""Checks of tests/distributed for a process that has built no DDP wrapper yet; started by torchrun.

The checks run in the order of the file: the last one builds the first wrapper.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from freezekit.distributed import StaleWrapperError
from freezekit.freezing import freeze, unfreeze
from tests.distributed.harness import raises, run


def check_a_frozen_model_can_be_scripted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    freeze(model, norm="freeze")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.jit.script(model)(x), model(x))


def check_a_wrapper_built_after_freezing_is_watched() -> None:
    for change in (lambda model: unfreeze(model, "0"), lambda model: model[0].requires_grad_(True)):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        freeze(model, "0")
        ddp = DDP(model)
        ddp(torch.ones(1, 2)).sum().backward()
        change(model)
        with raises(StaleWrapperError, "0.weight became trainable"):
            ddp(torch.ones(1, 2))


if __name__ == "__main__":
    run(globals())
