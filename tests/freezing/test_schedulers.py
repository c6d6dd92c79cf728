"""Learning-rate schedulers see the same groups, frozen or not, removed or not, resumed or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as lrs

from freezekit.freezing import freeze, freeze_state, load_freeze_state, unfreeze
from tests.freezing.cases import SCHEDULERS

NAMES = [name for name in SCHEDULERS if name != "none"]


def build() -> tuple[nn.Module, Optimizer]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return model, SGD([{"params": model[0].parameters(), "lr": 0.4}, {"params": model[1].parameters()}], lr=0.1)


def rates(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def learn(model: nn.Module, optimizer: Optimizer, scheduler: lrs.LRScheduler) -> None:
    optimizer.zero_grad()
    loss = model(torch.ones(1, 2)).sum()
    if loss.requires_grad:
        loss.backward()
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rates_are_those_of_a_run_that_never_froze(name: str, remove: bool) -> None:
    model, optimizer = build()
    scheduler = SCHEDULERS[name](optimizer)
    twin = build()
    twin_scheduler = SCHEDULERS[name](twin[1])
    for step in range(8):
        if step == 2:
            freeze(model, "0", optimizer=optimizer, remove=remove)
        if step == 4:
            saved = model.state_dict(), freeze_state(model, optimizer), optimizer.state_dict(), scheduler.state_dict()
            model, optimizer = build()
            scheduler = SCHEDULERS[name](optimizer)
            model.load_state_dict(saved[0])
            load_freeze_state(model, saved[1], optimizer)
            optimizer.load_state_dict(saved[2])
            scheduler.load_state_dict(saved[3])
        if step == 6:
            unfreeze(model, "0", optimizer=optimizer)
        learn(model, optimizer, scheduler)
        learn(*twin, twin_scheduler)
        assert rates(optimizer) == rates(twin[1])
    weight = model[0].weight.clone()
    learn(model, optimizer, scheduler)
    assert not torch.equal(model[0].weight, weight)


def test_why_a_new_group_is_not_the_way() -> None:
    """Unfreezing through ``add_param_group`` meets schedulers that were built for the groups there were."""
    for make, error in (
        (lambda opt: lrs.LambdaLR(opt, [lambda n: 1.0, lambda n: 1.0]), ValueError),
        (lambda opt: lrs.OneCycleLR(opt, max_lr=0.1, total_steps=9), KeyError),
    ):
        model, optimizer = build()
        scheduler = make(optimizer)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        optimizer.step()
        with pytest.raises(error):
            scheduler.step()

        model, optimizer = build()
        scheduler = make(optimizer)
        freeze(model, "1", optimizer=optimizer, remove=True)
        learn(model, optimizer, scheduler)
        unfreeze(model, "1", optimizer=optimizer)
        learn(model, optimizer, scheduler)
