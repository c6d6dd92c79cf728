"""Measures a case: values, gradients and bytes kept of each way to use freezekit, against stock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

import freezekit as fk
from bench.memory import trace
from tests.clients.cases import Case


@dataclass(frozen=True)
class Way:
    """How a network is used: what is done to it first, and what its forward pass runs in."""

    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    within: Callable[[], AbstractContextManager[object]] = nullcontext


STOCK = Way()
WAYS = {
    "converted": Way(fk.convert),
    "enabled": Way(within=fk.enabled),
    "fused": Way(lambda model: fk.fuse(fk.convert(model))),
}


class Run:
    """A case's network in one dtype, used in one way."""

    def __init__(self, case: Case, stock: nn.Module, way: Way) -> None:
        self.call, self.within = case.call, way.within
        self.model = way.prepare(copy.deepcopy(stock))
        x = torch.rand(case.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.x = x.to(next(stock.parameters()).dtype).requires_grad_(case.input_learns)
        learning = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.learning = {**learning, "input": self.x} if case.input_learns else learning

    def outputs(self, x: Tensor) -> list[Tensor]:
        torch.manual_seed(2)  # for dropout, and for what detectors sample
        return [y for y in tree_leaves(self.call(self.model, x)) if isinstance(y, Tensor) and y.is_floating_point()]

    def gradients(self, outputs: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(_loss(outputs), list(self.learning.values()), allow_unused=True)

    def results(self) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        """Outputs, and gradients by name."""
        with self.within():
            outputs = self.outputs(self.x)
        gradients = self.gradients(outputs)  # a backward pass needs no switch
        return [y.detach() for y in outputs], dict(zip(self.learning, gradients, strict=True))

    def kept(self) -> int:
        """Bytes that the graph of the outputs keeps after a forward pass. A loss would keep some of its own."""

        def forward() -> object:
            with self.within():
                return [get_gradient_edge(y) for y in self.outputs(self.x.clone()) if y.requires_grad]

        forward()  # what libraries set up once is not part of what one step keeps
        return trace(self.x.device, forward).kept

    def step(self) -> object:
        """What is timed: forward and backward."""
        return self.gradients(self.outputs(self.x))


def _loss(outputs: Iterable[Tensor]) -> Tensor:
    """A sum in which every element has a weight of its own."""
    learnt = [y for y in outputs if y.requires_grad]
    return torch.stack([(y * torch.linspace(0.5, 1, y.numel()).to(y).view(y.shape)).sum() for y in learnt]).sum()


@dataclass(frozen=True)
class Compared:
    """One way to use freezekit against stock.

    Attributes:
        equal: whether all outputs are stock's, bit for bit.
        value_error, gradient_error: the largest difference from stock's; see `largest_error`.
    """

    equal: bool
    value_error: float
    gradient_error: float


def compare(runs: dict[str, Run]) -> dict[str, Compared]:
    """Runs of a case by way, "stock" among them; the others against it."""
    values, gradients = runs["stock"].results()
    assert any(gradient.abs().max() > 0 for gradient in _present(gradients))
    found = {}
    for way in WAYS:
        ours, theirs = runs[way].results()
        assert [n for n, g in theirs.items() if g is None] == [n for n, g in gradients.items() if g is None]
        equal = all(torch.equal(a, b) for a, b in zip(ours, values, strict=True))
        errors = largest_error(ours, values), largest_error(_present(theirs), _present(gradients))
        found[way] = Compared(equal, *errors)
    return found


def _present(gradients: dict[str, Tensor | None]) -> list[Tensor]:
    return [gradient for gradient in gradients.values() if gradient is not None]


def largest_error(ours: list[Tensor], stock: list[Tensor]) -> float:
    """The largest difference, relative to the largest element of the same tensor of stock's.

    A tensor that would be zero but for rounding, such as the gradient of a bias before a batch norm, is held to a
    thousandth of the largest element of all.
    """
    largest = [tensor.abs().max().item() for tensor in stock]
    least = 1e-3 * max(largest)
    return max((a - b).abs().max().item() / max(scale, least) for a, b, scale in zip(ours, stock, largest, strict=True))


def runs(case: Case, dtype: torch.dtype) -> dict[str, Run]:
    """The case in every way."""
    stock = case.build()
    stock = stock.double() if dtype is torch.float64 else stock
    return {name: Run(case, stock, way) for name, way in {"stock": STOCK, **WAYS}.items()}
