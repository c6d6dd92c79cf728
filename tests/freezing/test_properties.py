"""Over random nets, patterns, optimizers and sequences: frozen is bit-identical, trainable moves as in stock torch.

Each example runs twice: once through freezekit, and once by hand with stock torch alone (`Stock`), which never removes
a parameter, never saves and never loads. Parameters, statistics and learning rates of the two must agree in every bit.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import LBFGS, Optimizer

from freezekit.freezing import freeze, freeze_state, is_held, load_freeze_state, unfreeze
from freezekit.freezing.bits import same_bits
from freezekit.freezing.held import frozen_tensors
from freezekit.freezing.patterns import select
from freezekit.guarding import guard
from tests.freezing.cases import LAYERS, SCHEDULERS, Choice, batch, choices, net


def learn(model: nn.Module, optimizer: Optimizer, scheduler: Any, seed: int) -> None:
    """One step of training on a batch of its own."""

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(batch(seed)).square().sum()
        if value.requires_grad:
            value.backward()
        return value

    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        if scheduler is not None:
            scheduler.step()
        return
    if isinstance(optimizer, LBFGS):
        optimizer.step(loss)
    else:
        loss()
        optimizer.step()
    if scheduler is not None:
        scheduler.step()


class Stock:
    """The same by hand: flags, ``grad = None``, ``eval()`` after every ``train()``, and a state made new by torch."""

    def __init__(self, choice: Choice, model: nn.Module, schedule: str) -> None:
        self.choice, self.model = choice, model
        self.optimizer = choice.build(model)
        self.scheduler = None if choice.kind is LBFGS else SCHEDULERS[schedule](self.optimizer)
        self.still: set[str] = set()
        self.mode = True

    def set(self, params: list[str], norms: list[str], frozen: bool, held: bool, reset: bool) -> None:
        for name in params:
            param = self.model.get_parameter(name)
            param.requires_grad_(not frozen)
            if frozen:
                param.grad = None
            if reset and not isinstance(self.optimizer, LBFGS):
                self._reset(param)
        if not frozen:
            self._complete()
        self.still = self.still | set(norms) if held else self.still - set(norms)
        self.train(self.mode)
        if isinstance(self.optimizer, LBFGS):
            left = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = LBFGS(left or [nn.Parameter(torch.zeros(1), requires_grad=False)], **self.choice.options)

    def _reset(self, param: nn.Parameter) -> None:
        for group in self.optimizer.param_groups:
            if any(p is param for p in group["params"]):
                options = {k: v for k, v in group.items() if k not in ("params", "initial_lr")}
                known = {k: options[k] for k in self.choice.options}
                fresh = self.choice.kind([param], **known).state
                self.optimizer.state.pop(param, None)
                if param in fresh:
                    self.optimizer.state[param] = fresh[param]

    def _complete(self) -> None:
        """Fused SGD fails where only some trainable parameters have a momentum; zeros step as none does."""
        if not (self.choice.options.get("fused") and self.choice.options.get("momentum")):
            return
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        if any("momentum_buffer" in self.optimizer.state.get(p, {}) for p in params):
            for param in params:
                self.optimizer.state[param].setdefault("momentum_buffer", torch.zeros_like(param.detach()))

    def train(self, mode: bool) -> None:
        self.mode = mode
        self.model.train(mode)
        for name in self.still:
            self.model.get_submodule(name).eval()


def patterns_of(model: nn.Module) -> list[Any]:
    names = [name for name, m in model.named_modules() if name and m.state_dict()]
    params = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    kinds = {type(m) for m in model.modules() if next(m.parameters(), None) is not None}
    return [
        *names,
        *params,
        "*weight",
        "*0*",
        *sorted(kinds, key=lambda k: k.__name__),
        lambda n, p: n.endswith("weight"),
    ]


class Run:
    """One example: the model under freezekit beside its stock twin."""

    def __init__(self, choice: Choice, layers: list[str], schedule: str, seed: int) -> None:
        self.choice, self.schedule = choice, schedule
        self.lbfgs = choice.kind is LBFGS
        self.model = net(choice, layers, seed)
        self.stock = Stock(choice, copy.deepcopy(self.model), schedule)
        self.optimizer = choice.build(self.model)
        self.scheduler = None if self.lbfgs else SCHEDULERS[schedule](self.optimizer)
        self.held: dict[str, torch.Tensor] = {}
        self.blank = copy.deepcopy(self.model)
        self.seed = seed

    def freeze(self, pattern: Any, remove: bool, reset: bool, norm: str) -> Any:
        remove, reset = (True, True) if self.lbfgs else (remove, reset)
        state = "reset" if reset else "keep"
        result = freeze(self.model, pattern, optimizer=self.optimizer, remove=remove, state=state, norm=norm)
        self._mirror(pattern, True, norm == "freeze", reset)
        return result

    def unfreeze(self, pattern: Any, reset: bool) -> None:
        reset = reset or self.lbfgs
        known = {id(p) for group in self.stock.optimizer.param_groups for p in group["params"]}
        params, _ = selected(self.model, pattern)
        outside = [n for n in params if not self.lbfgs and id(self.stock.model.get_parameter(n)) not in known]
        optimizer: Optimizer | None = None if outside else self.optimizer
        if outside:  # Muon holds matrices only: the others are not its own to unfreeze
            with pytest.raises(ValueError, match="would never move"):
                unfreeze(self.model, pattern, optimizer=self.optimizer)
            return
        unfreeze(self.model, pattern, optimizer=optimizer, state="reset" if reset else "keep")
        self._mirror(pattern, False, False, reset)

    def _mirror(self, pattern: Any, frozen: bool, held: bool, reset: bool) -> None:
        params, norms = selected(self.model, pattern)
        self.stock.set(params, norms, frozen, held, reset)
        now = frozen_tensors(self.model)
        self.held = {name: self.held.get(name, tensor.detach().clone()) for name, tensor, _ in now}

    def resume(self) -> None:
        """Save all, build all anew, load all: through a file, as plain data."""
        saved = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "frozen": freeze_state(self.model, self.optimizer),
        }
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=self.schedule != "lambda")
        mode = self.stock.mode
        self.model = copy.deepcopy(self.blank)
        self.optimizer = self.choice.build(self.model)
        self.scheduler = None if self.lbfgs else SCHEDULERS[self.schedule](self.optimizer)
        self.model.load_state_dict(saved["model"])
        load_freeze_state(self.model, saved["frozen"], self.optimizer)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.model.train(mode)

    def learn(self, seed: int) -> None:
        with guard(self.model, self.optimizer, every=1):
            learn(self.model, self.optimizer, self.scheduler, seed)
        learn(self.stock.model, self.stock.optimizer, self.stock.scheduler, seed)

    def compare(self) -> None:
        twin = self.stock.model.state_dict()
        for name, tensor in self.model.state_dict().items():
            assert same_bits(tensor, twin[name]), f"{name} is not where stock torch has it"
        for name, tensor, _ in frozen_tensors(self.model):
            assert same_bits(tensor, self.held[name]), f"frozen {name} moved"
            assert tensor.grad is None
        modes = {name: module.training for name, module in self.stock.model.named_modules()}
        assert {name: module.training for name, module in self.model.named_modules()} == modes
        if not self.lbfgs:
            assert [g["lr"] for g in self.optimizer.param_groups] == [
                g["lr"] for g in self.stock.optimizer.param_groups
            ]
        self.optimizer.load_state_dict(self.optimizer.state_dict())


def selected(model: nn.Module, pattern: Any) -> tuple[list[str], list[str]]:
    found = select(model, [pattern])
    return list(found.params), list(found.norms)


PATTERN = st.integers(0, 99)  # an index into `patterns_of`, modulo its length
OPERATIONS = st.one_of(
    st.tuples(st.just("learn"), st.integers(1, 2)),
    st.tuples(st.just("freeze"), PATTERN, st.booleans(), st.booleans(), st.sampled_from(["freeze", "batch"])),
    st.tuples(st.just("unfreeze"), PATTERN, st.booleans()),
    st.tuples(st.just("resume")),
    st.tuples(st.just("mode"), st.booleans()),
    st.tuples(st.just("within"), PATTERN, st.booleans()),
)


def play(run: Run, operations: list[tuple[Any, ...]]) -> None:
    patterns = patterns_of(run.model)
    steps = 0
    run.learn(seed=1000)  # momentum and statistics are there before the first freeze
    for kind, *arguments in operations:
        if kind == "learn":
            for _ in range(arguments[0]):
                run.learn(seed=steps)
                steps += 1
                run.compare()
        elif kind == "freeze":
            index, remove, reset, norm = arguments
            run.freeze(patterns[index % len(patterns)], remove, reset, norm)
        elif kind == "unfreeze":
            run.unfreeze(patterns[arguments[0] % len(patterns)], arguments[1])
        elif kind == "resume":
            run.resume()
        elif kind == "mode":
            run.model.train(arguments[0])
            run.stock.train(arguments[0])
        elif kind == "within":
            within(run, patterns[arguments[0] % len(patterns)], arguments[1])
        run.compare()


def within(run: Run, pattern: Any, remove: bool) -> None:
    """A block in which all moves stop for the pattern; nothing that it changed is left behind."""
    if run.lbfgs:
        return  # its history belongs to the block it was made in; tests of its own show what is restored
    before = structure(run)
    still = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    params, _ = selected(run.model, pattern)
    with freeze(run.model, pattern, optimizer=run.optimizer, remove=remove):
        for name in params:
            assert same_bits(run.model.get_parameter(name), still[name])
            assert not run.model.get_parameter(name).requires_grad
    assert structure(run) == before


def structure(run: Run) -> Any:
    """Flags, gradients by identity, modes, groups by identity and state by identity."""
    return (
        [(p.requires_grad, id(p.grad)) for p in run.model.parameters()],
        [(m.training, is_held(m)) for m in run.model.modules()],
        [[id(p) for p in group["params"]] for group in run.optimizer.param_groups],
        {id(p): {k: id(v) for k, v in s.items()} for p, s in run.optimizer.state.items() if s},
    )


def sequences(examples: int) -> Any:
    """Decorator: ``examples`` random nets, schedules and sequences of operations, the same ones in each run."""
    steady = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.generate, Phase.shrink],
    )
    drawn = given(
        layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=2, max_size=4),
        schedule=st.sampled_from(sorted(SCHEDULERS)),
        seed=st.integers(0, 2**16),
        operations=st.lists(OPERATIONS, min_size=3, max_size=9),
    )
    return lambda test: steady(drawn(test))


@pytest.mark.parametrize("choice", choices(), ids=str)
@sequences(examples=20)
def test_frozen_holds_and_the_rest_moves_as_in_stock_torch(
    choice: Choice, layers: list[str], schedule: str, seed: int, operations: list[tuple[Any, ...]]
) -> None:
    play(Run(choice, layers, schedule, seed), operations)


@pytest.mark.full
@pytest.mark.parametrize("choice", choices(), ids=str)
@sequences(examples=60)
def test_the_same_over_many_more(
    choice: Choice, layers: list[str], schedule: str, seed: int, operations: list[tuple[Any, ...]]
) -> None:
    play(Run(choice, layers, schedule, seed), operations)
