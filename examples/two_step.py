"""Freezing a layer takes two steps. What does each of them do, alone and together?

Step one: ``requires_grad = False``. Step two: keep the parameters out of the optimizer. One table, measured when it is
printed: the middle one of three convolutions is frozen after some training, in each of four ways and then by
``freezekit.freeze``. Run ``python examples/two_step.py``; it takes under a minute on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import Backward, backward_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import freezekit as fk
from freezekit.freezing import freeze

Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD+momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16)])


def make_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 3, 8, 8), torch.randn(4, 16, 8, 8)


def step_one(model: nn.Sequential) -> None:
    """Autograd: no gradient for these parameters from now on. A ``.grad`` that is there already stays."""
    model[1].requires_grad_(False)


def step_two(model: nn.Sequential, optimizer: Optimizer) -> None:
    """The optimizer: forget these parameters, and their state with them."""
    gone = set(model[1].parameters())
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in gone]
    for p in gone:
        optimizer.state.pop(p, None)


def both(model: nn.Sequential, optimizer: Optimizer) -> None:
    step_one(model)
    step_two(model, optimizer)


Way = Callable[[nn.Sequential, Optimizer], object]
WAYS: dict[str, Way] = {
    "neither": lambda model, optimizer: None,
    "only step one": lambda model, optimizer: step_one(model),
    "only step two": step_two,
    "both": both,
    "freeze(...)": lambda model, optimizer: freeze(model, "1", optimizer=optimizer),
}


@dataclass
class Setup:
    """A model that has trained for five steps with an optimizer, and was then frozen in one of the ways."""

    model: nn.Sequential
    optimizer: Optimizer
    set_to_none: bool

    @classmethod
    def after(cls, way: Way, optimizer: str, set_to_none: bool, convert: bool = False) -> Setup:
        model = make_model()
        if convert:
            fk.convert(model)
        self = cls(model, OPTIMIZERS[optimizer](list(model.parameters())), set_to_none)
        for _ in range(5):
            self.train_step()
        way(model, self.optimizer)
        return self

    def fresh_loss(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        x, y = make_batch()
        return (self.model(x) - y).square().mean()

    def train_step(self) -> None:
        self.fresh_loss().backward()
        self.optimizer.step()

    def moved(self, steps: int = 20) -> float:
        """Largest change of the middle layer's weight over some steps."""
        before = copy.deepcopy(self.model[1].weight.detach())
        for _ in range(steps):
            self.train_step()
        return float((self.model[1].weight.detach() - before).abs().max())

    def backward(self) -> Backward:
        """What the backward pass of a step in the middle of training runs."""
        self.train_step()
        return backward_of(self.fresh_loss)

    def kept(self) -> int:
        return fk.explain(self.model, make_batch()[0]).bytes_kept


def measure() -> list[dict[str, object]]:
    """A row for each way of freezing and each kind of ``zero_grad``."""
    rows: list[dict[str, object]] = []
    for name, way in WAYS.items():
        for set_to_none in (False, True):
            stock = Setup.after(way, "SGD", set_to_none)
            converted = Setup.after(way, "SGD", set_to_none, convert=True)
            ran, ran_converted = stock.backward(), converted.backward()
            row: dict[str, object] = {
                "way": name,
                "zero_grad": "None" if set_to_none else "zeros",
                "wgrad": ran.wgrad,
                "wgrad_freezekit": ran_converted.wgrad,
                "dgrad": ran.dgrad,
                "dgrad_freezekit": ran_converted.dgrad,
                "accumulate": ran.accumulate,
                "additions": ran.additions,
                "kept": stock.kept(),
                "kept_freezekit": converted.kept(),
            }
            row |= {o: Setup.after(way, o, set_to_none).moved() for o in OPTIMIZERS}
            rows.append(row)
    return rows


def show(rows: list[dict[str, object]], console: Console) -> None:
    table = Table(title="Freezing the middle one of three convolutions after five steps", title_justify="left")
    for column in ("freeze by", "zero_grad\nleaves", "wgrad", "dgrad", "AccumulateGrad", "additions\nto .grad",
                   "KiB kept\ntorch", "KiB kept\nfreezekit", *(f"moved by\n{o}" for o in OPTIMIZERS)):  # fmt: skip
        table.add_column(column, justify="left" if column == "freeze by" else "right", no_wrap=True)
    for r in rows:
        shown = [f"{float(str(r[o])):.0e}" if r[o] else "0" for o in OPTIMIZERS]
        kib = [f"{int(str(r[k])) / 1024:.0f}" for k in ("kept", "kept_freezekit")]
        counts = [str(r[k]) for k in ("wgrad", "dgrad", "accumulate", "additions")]
        table.add_row(str(r["way"]), str(r["zero_grad"]), *counts, *kib, *shown, end_section=r["zero_grad"] == "None")
    console.print(table)
    console.print(
        "1. Step one takes away the middle layer's wgrad; its dgrad still runs, for the layer before it learns.\n"
        "2. Step two by itself keeps the weight still, whatever the optimizer.\n"
        "3. Without step one the gradient is computed all the same, and accumulated into .grad: by a node for each of\n"
        "   weight and bias, and by one more kernel each where .grad is there already.\n"
        "4. With only step one, zeros in .grad let momentum, Adam and AdamW go on moving the weight; None does not.\n"
        "freeze(...) is both in one call: it drops .grad, so the optimizer may keep the parameters and skips them.",
        highlight=False,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    show(measure(), Console(width=160))
