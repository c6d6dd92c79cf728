"""Nets, inputs, optimizers and schedulers that the tests of freezing share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Muon, Optimizer, SparseAdam, lr_scheduler

WIDTH = 4


class Tied(nn.Module):
    """Two layers that share one weight, and a parameter that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.there = nn.Linear(WIDTH, WIDTH)
        self.back = nn.Linear(WIDTH, WIDTH)
        self.back.weight = self.there.weight
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(torch.tanh(self.there(x))) * self.scale


class Pixels(nn.Module):
    """A convolution with batch norm on (batch, WIDTH) input seen as 2 x 2 images of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.bn = nn.BatchNorm2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x.view(-1, 1, 2, 2))).flatten(1)


class Sentences(nn.Module):
    """Sparse embeddings alone: what SparseAdam takes."""

    def __init__(self, tables: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(5, WIDTH, sparse=True) for _ in range(tables))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = (x.detach().abs() * 10).long() % 5
        return sum(table(index).mean(1) for table in self.tables)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "matrix": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "bn": lambda: nn.BatchNorm1d(WIDTH),
    "bare_bn": lambda: nn.BatchNorm1d(WIDTH, affine=False, momentum=None),
    "tied": Tied,
    "pixels": Pixels,
    "block": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()),
}


@dataclass(frozen=True)
class Choice:
    """An optimizer of torch.optim and how it is built; ``takes`` says which parameters it can hold."""

    kind: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind.__name__}({', '.join(f'{k}={v}' for k, v in self.options.items())})"

    def takes(self, param: nn.Parameter) -> bool:
        return param.ndim == 2 if self.kind is Muon else True

    def build(self, model: nn.Module) -> Optimizer:
        """Two groups with options of their own, matrices apart from the rest; LBFGS can have only one."""
        params = [p for p in model.parameters() if self.takes(p)]
        if self.kind is LBFGS:
            return LBFGS(params, **self.options)
        groups = [[p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]]
        lr = self.options.get("lr", 0.01)
        given = [{"params": g, "lr": lr * (i + 1)} for i, g in enumerate(groups) if g]
        return self.kind(given, **self.options)


def choices() -> list[Choice]:
    """Every optimizer in torch.optim, found by looking, with each of its implementations on this device."""
    found = []
    for name in sorted(dir(torch.optim)):
        kind = getattr(torch.optim, name)
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)) or kind is Optimizer:
            continue
        accepts = inspect.signature(kind.__init__).parameters
        base = {"lr": 0.05}
        for key, value in (("momentum", 0.9), ("weight_decay", 0.01)):
            if key in accepts:
                base[key] = value
        found.append(Choice(kind, base))
        found += [Choice(kind, {**base, flag: True}) for flag in ("foreach", "fused") if flag in accepts]
        if "maximize" in accepts:
            found.append(Choice(kind, {"lr": 0.01, "maximize": True}))
        if "amsgrad" in accepts:
            found.append(Choice(kind, {"lr": 0.01, "amsgrad": True}))
    return found


def fits(choice: Choice, names: list[str]) -> list[str]:
    """``names`` of layers, with what ``choice`` needs to have something to hold."""
    if choice.kind is Muon and not set(names) & {"linear", "matrix", "tied", "block"}:
        return [*names, "matrix"]
    return names if set(names) - {"bare_bn"} else [*names, "linear"]


def net(choice: Choice, names: list[str], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if choice.kind is SparseAdam:
        return Sentences(len(names))
    return nn.Sequential(*(LAYERS[name]() for name in fits(choice, names)))


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda opt: None,
    "step": lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.5),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, [lambda n, g=g: 1 / (n + 1 + g) for g in range(groups(opt))]),
    "exponential": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=7),
    "onecycle": lambda opt: lr_scheduler.OneCycleLR(
        opt, max_lr=[0.02 * (g + 1) for g in range(groups(opt))], total_steps=200, cycle_momentum=False
    ),
}


def groups(optimizer: Optimizer) -> int:
    return len(optimizer.param_groups)


def batch(seed: int) -> torch.Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed))
