"""Gradients that wait for a step when `freeze` drops them: told where they are lost, and nowhere else."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from freezekit.freezing import GradientWarning, freeze, unfreeze
from freezekit.freezing.pending import _waiting
from freezekit.guarding import guard
from freezekit.schedules import FreezeOut, UpdateNorm

pytestmark = pytest.mark.filterwarnings("error::freezekit.freezing.GradientWarning")
IDLE = r"SGD\.step: there is no gradient .* freeze\(\) had dropped those of '0\.weight' and 3 more;\n.*`with"
LOST = r"unfreeze: freeze\(\) had dropped gradients of '0\.weight' and 3 more that no optimizer has stepped.*\n.*`with"


class Gan:
    """A generator, a discriminator, and the parts of a training loop."""

    def __init__(self, choice: Callable[[Any], Optimizer] = lambda params: SGD(params, lr=0.1)) -> None:
        torch.manual_seed(0)
        self.G = nn.Linear(2, 3)
        self.D = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
        self.opt_g, self.opt_d = choice(self.G.parameters()), choice(self.D.parameters())

    def discriminate(self) -> None:
        self.D(torch.randn(4, 3)).square().mean().backward()
        self.D(self.G(torch.randn(4, 2)).detach()).mean().backward()

    def generate(self, block: bool = False) -> None:
        if block:
            with freeze(self.D):
                self.D(self.G(torch.randn(4, 2))).mean().backward()
            return
        freeze(self.D)
        self.D(self.G(torch.randn(4, 2))).mean().backward()
        unfreeze(self.D)


def fused(params: Any) -> Optimizer:
    return Adam(params, lr=0.1, fused=True)


def foreach(params: Any) -> Optimizer:
    return AdamW(params, lr=0.1, foreach=True)


class ByHand(Optimizer):
    """Steps without torch's wrapper around ``step``, as optimizers of other libraries do."""

    def __init__(self, params: Any) -> None:
        self.params = list(params)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self.params:
            param.grad = None if set_to_none else torch.zeros_like(param)

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for param in self.params:
                if param.grad is not None:
                    param -= 0.1 * param.grad


CHOICES = [lambda params: SGD(params, lr=0.1), fused, foreach, ByHand]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("clear", ["before", "after", "zeros"])
def test_a_loop_that_steps_first_is_quiet(choice: Callable[[Any], Optimizer], clear: str) -> None:
    gan = Gan(choice)
    for step in range(4):
        for _ in range(1 + step % 2):  # more steps of the discriminator than of the generator
            if clear != "after":
                gan.opt_d.zero_grad(set_to_none=clear == "before")
            gan.discriminate()
            gan.opt_d.step()
            if clear == "after":
                gan.opt_d.zero_grad()
        gan.opt_g.zero_grad()
        gan.generate()
        gan.opt_g.step()
    assert gan.D not in _waiting


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("generator_first", [False, True])
def test_gradients_of_micro_batches_are_told(choice: Callable[[Any], Optimizer], generator_first: bool) -> None:
    gan = Gan(choice)
    for batch in range(2):
        for micro in range(3):
            # The last gradient of a batch is there at the step if the generator's came before it.
            told = micro > 0 or (batch > 0 and not generator_first)
            if not generator_first:
                gan.discriminate()
            with pytest.warns(GradientWarning, match=LOST) if told else nullcontext():
                gan.generate()
            if generator_first:
                gan.discriminate()
        for optimizer in (gan.opt_d, gan.opt_g):
            optimizer.step()
            optimizer.zero_grad()


def test_a_step_that_met_no_gradient_does_not_end_the_wait() -> None:
    gan = Gan()
    for first in (True, False, False):  # both backward passes, then both steps: the discriminator never learns
        gan.opt_d.zero_grad()
        gan.discriminate()
        with nullcontext() if first else pytest.warns(GradientWarning, match=LOST) as caught:
            gan.generate()
        assert first or caught[0].filename == __file__
        gan.opt_g.step()
        with pytest.warns(GradientWarning, match=IDLE) if first else nullcontext() as caught:
            gan.opt_d.step()
        assert not first or caught[0].filename == __file__


def test_a_step_without_gradients_that_nothing_dropped_is_quiet() -> None:
    gan = Gan()
    gan.generate()
    gan.opt_d.step()
    gan.discriminate()
    gan.generate(block=True)
    gan.opt_d.zero_grad()
    gan.opt_d.step()


def test_a_step_of_others_is_quiet() -> None:
    gan = Gan()
    gan.discriminate()
    gan.opt_d.step()
    gan.generate()
    gan.opt_g.step()
    gan.discriminate()
    gan.opt_d.step()
    gan.opt_d.zero_grad()
    gan.opt_d.step()


@pytest.mark.parametrize("released_before", [False, True])
def test_a_block_loses_nothing_and_is_quiet(released_before: bool) -> None:
    gan, stock = Gan(), Gan()
    if released_before:
        freeze(gan.D)
        unfreeze(gan.D)
    for which in (gan, stock):
        torch.manual_seed(1)
        for _ in range(2):
            for _ in range(3):
                which.discriminate()
                if which is gan:
                    gan.generate(block=True)
                else:
                    stock.D.requires_grad_(False)
                    stock.D(stock.G(torch.randn(4, 2))).mean().backward()
                    stock.D.requires_grad_(True)
            for optimizer in (which.opt_d, which.opt_g):
                optimizer.step()
                optimizer.zero_grad()
    for ours, theirs in ((gan.D, stock.D), (gan.G, stock.G)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_what_a_block_gives_back_still_waits() -> None:
    gan = Gan()
    gan.generate()
    gan.discriminate()
    gan.generate(block=True)
    with pytest.warns(GradientWarning, match=LOST):
        gan.generate()


def test_one_optimizer_for_both_is_quiet() -> None:
    gan = Gan()
    both = SGD([*gan.G.parameters(), *gan.D.parameters()], lr=0.1)
    for _ in range(3):
        both.zero_grad()
        gan.discriminate()
        both.step()
        both.zero_grad()
        gan.generate()
        both.step()


def test_a_step_that_a_scaler_skips_is_quiet() -> None:
    gan = Gan()
    gan.generate()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    for _ in range(2):
        gan.opt_d.zero_grad()
        scaler.scale(1e30 * gan.D(torch.ones(4, 3)).square().mean()).backward()
        before = gan.D[0].weight.clone()
        scaler.step(gan.opt_d)
        scaler.update()
        assert torch.equal(gan.D[0].weight, before)
        gan.generate()


def test_gradients_of_zeros_are_no_loss() -> None:
    gan = Gan()
    gan.generate()
    for param in gan.D.parameters():
        param.grad = torch.zeros_like(param)
    gan.generate()


def test_part_of_a_model() -> None:
    gan = Gan()
    gan.generate()
    gan.discriminate()
    freeze(gan.D)
    with pytest.warns(GradientWarning, match=r"'2\.bias' that no optimizer"):
        unfreeze(gan.D, "2.bias")
    with pytest.warns(GradientWarning, match=r"'0\.weight' and 2 more"):
        unfreeze(gan.D)


def test_freezing_for_good_is_quiet() -> None:
    gan = Gan()
    gan.generate()
    gan.discriminate()
    freeze(gan.D)
    freeze(gan.D)


def test_a_block_of_unfreeze_that_ends_before_the_step_is_told() -> None:
    gan = Gan()
    freeze(gan.D)
    with unfreeze(gan.D):
        gan.discriminate()
        gan.opt_d.step()
    says = r"the block ends and drops gradients of '0\.weight' and 3 more"
    with pytest.warns(GradientWarning, match=says) as caught, unfreeze(gan.D):
        gan.discriminate()
    assert caught[0].filename == __file__
    assert gan.D not in _waiting


@pytest.mark.parametrize("zero", [True, False])
def test_schedules_are_quiet(zero: bool) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    optimizer = SGD([{"params": model[0].parameters(), "lr": 0.0}, {"params": model[1:].parameters()}], lr=0.1)
    schedules = [
        UpdateNorm(model, optimizer, 1e-4, every=1, thaw_after=1, max_changes=None),
        FreezeOut(copy.deepcopy(model), 0.2, 8),
    ]
    with guard(model, optimizer):
        for _ in range(8):
            if zero:
                optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
            for schedule in schedules:
                schedule.step()


def test_nothing_is_kept_alive_and_parameters_can_be_swapped() -> None:
    gan = Gan()
    gan.generate()
    gan.discriminate()
    freeze(gan.D)
    unfreeze(copy.deepcopy(gan.D))
    for param in gan.D.parameters():
        assert not weakref.getweakrefs(param)
    gone = weakref.ref(gan.D[0])
    before = len(_waiting)
    del gan, param
    gc.collect()
    assert gone() is None
    assert len(_waiting) <= before


def test_a_compiled_step_is_seen_by_what_it_writes() -> None:
    gan = Gan()
    step = torch.compile(gan.opt_d.step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradientWarning)
        for _ in range(3):
            gan.opt_d.zero_grad()
            gan.discriminate()
            step()
            gan.generate()


def test_sparse_and_lazy_and_meta() -> None:
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.LazyLinear(2))
    freeze(model)
    unfreeze(model)
    model[0](torch.tensor([1])).sum().backward()
    freeze(model)
    with pytest.warns(GradientWarning, match=r"'0\.weight' that no optimizer"):
        unfreeze(model)
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
        freeze(empty)
        unfreeze(empty)
        empty(torch.ones(1, 2)).sum().backward()
        freeze(empty)
        unfreeze(empty)
