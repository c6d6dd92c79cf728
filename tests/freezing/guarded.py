"""A small trained model and its optimizer, as the tests of guard start from."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from tests.freezing.cases import Choice, batch, net


def trained(choice: Choice | None = None) -> tuple[nn.Module, Optimizer]:
    choice = choice or Choice(SGD, {"lr": 0.1, "momentum": 0.9})
    model = net(choice, ["block", "matrix"], seed=0)
    optimizer = choice.build(model)
    learn(model, optimizer)
    return model, optimizer


def backward(model: nn.Module, seed: int = 0) -> None:
    model(batch(seed)).square().sum().backward()


def learn(model: nn.Module, optimizer: Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad(set_to_none=False)
    backward(model, seed)
    optimizer.step()


def values(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return {"model": copy.deepcopy(model.state_dict()), "optimizer": state}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b
