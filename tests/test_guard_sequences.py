"""guard over random sequences of what happens to a model, against a plain account of what it must tell and undo.

The account compares values, tensor by tensor. It knows neither checksums nor versions.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from freezekit import convert
from freezekit.freezing import freeze, is_held, unfreeze
from freezekit.guarding import FrozenMoved, guard


@dataclass(eq=False)
class Entry:
    """A frozen tensor, its value when guard met it, and where it had this value."""

    name: str
    tensor: torch.Tensor
    norm: nn.Module | None
    value: torch.Tensor
    memory: int

    def thawed(self) -> bool:
        return self.tensor.requires_grad if self.norm is None else not is_held(self.norm)


def frozen_now(model: nn.Module) -> dict[int, Entry]:
    found = [(name, param, None) for name, param in model.named_parameters() if not param.requires_grad]
    for path, module in model.named_modules():
        if is_held(module):
            found += [(f"{path}.{name}", buffer, module) for name, buffer in module.named_buffers()]
    return {id(t): Entry(name, t, norm, t.detach().clone(), t.data_ptr()) for name, t, norm in found}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@dataclass
class Account:
    model: nn.Module
    held: dict[int, Entry] = field(default_factory=dict)

    def hear(self, unfrozen: Iterable[nn.Parameter] = ()) -> dict[int, Entry]:
        """Forget what was thawed, and what ``unfrozen`` took the place of. Returns what is frozen now."""
        frozen = frozen_now(self.model)
        ids = set(map(id, unfrozen))
        names = {name for name, param in self.model.named_parameters() if id(param) in ids}
        for key, one in tuple(self.held.items()):
            if key in frozen:
                one.name, one.norm = frozen[key].name, frozen[key].norm
            elif one.thawed() or one.name in names:
                del self.held[key]
        return frozen

    def look(self) -> tuple[list[Entry], list[Entry]]:
        """What moved and what left; what is newly frozen is held from now on."""
        frozen = self.hear()
        named = {one.name: self.held.get(key, one).value for key, one in frozen.items()}
        for key, one in tuple(self.held.items()):
            if key not in frozen and one.name in named and same(named[one.name], one.value):
                del self.held[key]
        left = [one for key, one in self.held.items() if key not in frozen]
        moved = [one for key, one in self.held.items() if key in frozen and not same(one.tensor, one.value)]
        for one in self.held.values():
            one.memory = one.memory if one in moved else one.tensor.data_ptr()
        self.held = {**frozen, **self.held}
        return moved, left


def layer(i: int) -> nn.Module:
    return [lambda: nn.Linear(2, 2), lambda: nn.BatchNorm1d(2), lambda: nn.Linear(2, 2, bias=False)][i % 3]()


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def one_of(module: nn.Module, j: int) -> torch.Tensor:
    tensors = tensors_of(module)
    return tensors[j % len(tensors)]


class Play:
    """A model under guard, and what happens to it: functions of ``i``, a layer, and ``j``, a number."""

    def __init__(self, mode: Any) -> None:
        torch.manual_seed(0)
        self.mode = mode
        self.model = nn.Sequential(*map(layer, range(4)))
        freeze(self.model, "0", "1", norm="freeze")
        self.optimizer = SGD(self.model.parameters(), lr=0.1)
        self.guard = guard(self.model, self.optimizer, every=1, mode=mode)
        self.account = Account(self.model)
        self.account.look()
        self.others: list[torch.Tensor] = []

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
                self.replace(i, j + 1)
            self.account.held = frozen_now(self.model)

    def accept(self, i: int, j: int) -> None:
        self.guard.accept()
        self.account.held = frozen_now(self.model)

    def step(self, i: int, j: int) -> None:
        """All that trains has a gradient, and moves."""
        for param in self.model.parameters():
            param.grad = torch.ones_like(param) if param.requires_grad else None
        if self.check(i, j):
            self.optimizer.step()
            self.check(i, j)

    def check(self, i: int, j: int) -> bool:
        """Whether there was nothing to tell."""
        moved, left = self.account.look()
        told = left if self.mode == "restore" else moved + left
        own = {id(one.tensor) for one in moved} | {one.memory for one in moved}
        rest = [t for t in (*tensors_of(self.model), *self.others) if own.isdisjoint((id(t), t.data_ptr()))]
        before = [tensor.detach().clone() for tensor in rest]
        names: tuple[str, ...] = ()
        try:
            self.guard.check()
        except FrozenMoved as error:
            names = error.names
        assert sorted(names) == sorted(one.name for one in told)
        assert self.mode == "raise" or all(same(one.tensor, one.value) for one in moved)
        assert all(map(same, rest, before)), "guard wrote to what it does not hold"
        return not told


Act = Callable[[Play, int, int], object]
ACTS: list[Act] = [act for act in vars(Play).values() if inspect.isfunction(act) and act.__code__.co_argcount == 3]
STEADY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_random_sequences(mode: str) -> None:
    steps = st.tuples(st.sampled_from(ACTS), st.integers(0, 5), st.integers(0, 5))

    @STEADY
    @given(st.lists(steps, min_size=4, max_size=16))
    def play(acts: list[tuple[Act, int, int]]) -> None:
        played = Play(mode)
        for act, i, j in acts:
            act(played, i % len(played.model), j)
        played.check(0, 0)
        played.guard.remove()

    play()
