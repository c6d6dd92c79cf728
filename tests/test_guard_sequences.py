"""guard over random sequences of what happens to a model, and in closures of steps, against a plain account of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import isfunction, signature
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from freezekit import convert
from freezekit.freezing import freeze, unfreeze
from freezekit.guarding import FrozenMoved, guard
from tests.freezing.account import Account, Entry, same, tensors_of


def alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else same(a, b)


def layer(i: int) -> nn.Module:
    return [lambda: nn.Linear(2, 2), lambda: nn.BatchNorm1d(2), lambda: nn.Linear(2, 2, bias=False)][i % 3]()


def one_of(module: nn.Module, j: int) -> torch.Tensor:
    tensors = tensors_of(module)
    return tensors[j % len(tensors)]


Acts = list[tuple[Callable[["Play", int, int], object], int, int]]


class Play:
    """A model under guard, and what happens to it: functions of ``i``, a layer, and ``j``, a number."""

    def __init__(self, mode: Any, allowed: list[int]) -> None:
        torch.manual_seed(0)
        self.mode = mode
        self.model = nn.Sequential(*map(layer, range(4)))
        freeze(self.model, "0", "1", norm="freeze")
        self.optimizer = SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.optimizer.register_step_post_hook(self.expect)  # called before the guard's
        self.guard = guard(self.model, self.optimizer, every=1, mode=mode)
        self.account = Account(self.model)
        self.account.look()
        self.others: list[torch.Tensor] = []
        self.at_risk: dict[Entry, torch.Tensor | None] = {}  # in a step with a closure, and their momentum before
        for i in allowed:
            self.allow(i, 0)

    def others_own(self, tensor: torch.Tensor) -> torch.Tensor:
        self.others.append(tensor)
        return tensor

    def freeze(self, i: int, j: int) -> None:
        freeze(self.model, str(i), norm="freeze" if j % 2 else "batch")
        self.account.hear()

    def unfreeze(self, i: int, j: int) -> None:
        unfreeze(self.model, str(i))
        self.account.hear(self.model[i].parameters())

    def frozen_for_a_while(self, i: int, j: int) -> None:
        with freeze(self.model, str(i), norm="freeze"):
            self.account.hear()
            self.check(i, j)
        self.account.hear(p for p in self.model[i].parameters() if p.requires_grad)

    def flag(self, i: int, j: int) -> None:
        self.model[i].requires_grad_(bool(j % 2))

    def replace(self, i: int, j: int) -> None:
        self.model[i] = layer(j).requires_grad_(j % 2 == 0)

    def another_parameter(self, i: int, j: int) -> None:
        module = next(m for m in self.model[i].modules() if "weight" in m._parameters)
        module.weight = nn.Parameter(module.weight.detach() + j, requires_grad=j % 2 == 0)

    def no_bias(self, i: int, j: int) -> None:
        next(m for m in self.model[i].modules() if "bias" in m._parameters).bias = None

    def drop(self, i: int, j: int) -> None:
        if len(self.model) > 2:
            self.model.pop(i)

    def insert(self, i: int, j: int) -> None:
        self.model.insert(i, layer(j))

    def swap(self, i: int, j: int) -> None:
        j %= len(self.model)
        self.model[i], self.model[j] = self.model[j], self.model[i]

    def wrap(self, i: int, j: int) -> None:
        self.model[i] = nn.Sequential(self.model[i])

    def copied(self, i: int, j: int) -> None:
        self.model[i] = copy.deepcopy(self.model[i])

    def another_norm(self, i: int, j: int) -> None:
        self.model[i] = nn.SyncBatchNorm.convert_sync_batchnorm(self.model[i])

    def converted(self, i: int, j: int) -> None:
        convert(self.model)

    def assign(self, i: int, j: int) -> None:
        state = {name: self.others_own(t.detach() + j) for name, t in self.model[i].state_dict().items()}
        self.model[i].load_state_dict(state, assign=True)

    def write(self, i: int, j: int) -> None:
        with torch.no_grad():
            one_of(self.model[i], j).add_(1)

    def write_data(self, i: int, j: int) -> None:
        one_of(self.model[i], j).data.add_(1)

    def put_data(self, i: int, j: int) -> None:
        tensor = one_of(self.model[i], j)
        tensor.data = self.others_own(tensor.detach() + j)

    def allowed(self, i: int, j: int) -> None:
        if self.check(i, j):
            with self.guard.allow():
                self.write(i, j)
                self.replace((i + j) % len(self.model), j + 1)
            self.account.accept()

    def allow(self, i: int, j: int) -> None:
        if self.check(i, j):
            self.account.allowed.append((self.guard.allow(str(i)), str(i), []))
            self.account.refresh()

    def allow_no_more(self, i: int, j: int) -> None:
        if self.account.allowed:
            self.account.refresh()
            allowance, *_ = self.account.allowed.pop(j % len(self.account.allowed))
            allowance.end()
            self.account.refresh()

    def accept(self, i: int, j: int) -> None:
        self.write(i, j)
        self.guard.accept()
        self.account.accept()

    def step(self, i: int, j: int) -> None:
        """All that trains has a gradient, and moves."""
        for param in self.model.parameters():
            param.grad = torch.ones_like(param) if param.requires_grad else None
        if self.check(i, j):
            self.optimizer.step()
            self.check(i, j)

    def check(self, i: int, j: int) -> bool:
        """Whether there was nothing to tell."""
        self.expect()
        return self.judge(self.guard.check)

    def step_with(self, acts: Acts, stays: bool) -> None:
        """A step in whose closure ``acts`` happen. What is frozen has a gradient; it ``stays``, or is cleared there."""
        if not self.check(0, 0):
            return
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        for param in (*params, *self.model.parameters()):
            param.grad = None if param.requires_grad else torch.ones_like(param)
        held = [self.account.held[id(param)] for param in params if id(param) in self.account.held]
        self.at_risk = {one: copy.deepcopy(self.momentum(one.tensor)) for one in held}

        def closure() -> None:
            for param in () if stays else (*params, *self.model.parameters()):
                param.grad = None
            for act, i, j in acts:
                act(self, i % len(self.model), j)
            for param in self.model.parameters():
                param.grad = torch.ones_like(param) if param.requires_grad else param.grad

        self.judge(lambda: self.optimizer.step(closure))
        self.at_risk = {}
        self.check(0, 0)

    def momentum(self, param: torch.Tensor) -> torch.Tensor | None:
        return self.optimizer.state.get(param, {}).get("momentum_buffer")

    def expect(self, *step: object) -> None:
        """Note what guard has to tell and to put back now, and all that it must not write to."""
        moved, left = self.account.look()
        stepped = [one for one in moved if step and one in self.at_risk]
        self.back = moved if self.mode == "restore" else stepped
        self.told = left if self.mode == "restore" else stepped or moved + left
        own = {id(one.tensor) for one in moved} | {one.memory for one in moved}
        rest = [t for t in (*tensors_of(self.model), *self.others) if own.isdisjoint((id(t), t.data_ptr()))]
        self.rest = [(tensor, tensor.detach().clone()) for tensor in rest]
        learns = [param for param in self.optimizer.state if id(param) not in self.account.held]
        self.momenta = [(param, copy.deepcopy(self.momentum(param))) for param in learns]

    def judge(self, watch: Callable[[], object]) -> bool:
        """Whether there was nothing to tell, where ``watch`` has guard look."""
        names: tuple[str, ...] = ()
        try:
            watch()
        except FrozenMoved as error:
            names = error.names
        assert sorted(names) == sorted(one.name for one in self.told)
        assert all(same(one.tensor, one.value) for one in self.back)
        stepped = [(one.tensor, self.at_risk[one]) for one in self.back if one in self.at_risk]
        assert all(alike(self.momentum(param), value) for param, value in stepped)
        assert all(same(*pair) for pair in self.rest), "guard wrote to what it does not hold"
        assert all(alike(self.momentum(param), value) for param, value in self.momenta)
        return not self.told


ACTS = [f for f in vars(Play).values() if isfunction(f) and [*signature(f).parameters] == ["self", "i", "j"]]
STEADY = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_random_sequences(mode: str) -> None:
    """A list among the acts is what happens in the closure of a step."""
    numbers = st.integers(0, 5)
    one = st.tuples(st.sampled_from(ACTS), numbers, numbers)
    inside = st.tuples(st.sampled_from([act for act in ACTS if act is not Play.step]), numbers, numbers)
    step = st.tuples(st.lists(inside, max_size=3), st.booleans())

    @STEADY
    @given(st.lists(st.integers(0, 3), max_size=2), st.lists(st.one_of(one, one, step), min_size=4, max_size=16))
    def play(allowed: list[int], acts: list[Any]) -> None:
        played = Play(mode, allowed)
        for act, *arguments in acts:
            if isinstance(act, list):
                played.step_with(act, *arguments)
            else:
                act(played, arguments[0] % len(played.model), arguments[1])
        played.check(0, 0)
        played.guard.remove()

    play()
