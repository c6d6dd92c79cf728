"""guard: what would move a frozen tensor is named and stopped, or undone, whoever writes and however."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from freezekit.freezing import freeze
from freezekit.guarding import FrozenMoved, guard
from tests.freezing.cases import Choice, choices
from tests.freezing.guarded import backward, learn, same, trained, values

# LBFGS steps along one history; SparseAdam takes sparse gradients: both have tests of their own.
DENSE = [choice for choice in choices() if choice.kind.__name__ not in ("LBFGS", "SparseAdam")]


@pytest.mark.parametrize("choice", DENSE, ids=str)
def test_a_stale_gradient_is_refused_before_anything_moves(choice: Choice) -> None:
    model, optimizer = trained(choice)
    model[1].weight.requires_grad_(False)  # half a freeze: the gradient is left
    before = values(model, optimizer)
    kind = "fused" if choice.options.get("fused") else "foreach" if choice.options.get("foreach") else "single-tensor"
    with guard(model, optimizer), pytest.raises(FrozenMoved) as error:
        optimizer.step()
    assert error.value.names == ("1.weight",)
    message = str(error.value)
    assert message.startswith(
        "guard: this step would move what is frozen; nothing has moved yet\n  '1.weight': its .grad"
    )
    assert (
        f"in a {kind} step of {choice.kind.__name__}. Cure: freeze(model, '1.weight', optimizer=optimizer)" in message
    )
    assert same(values(model, optimizer), before)


@pytest.mark.parametrize("choice", DENSE, ids=str)
def test_restore_undoes_values_and_state_and_lets_the_rest_step(choice: Choice) -> None:
    model, optimizer = trained(choice)
    twin, twin_optimizer = trained(choice)
    model[1].weight.requires_grad_(False)
    weight = model[1].weight.clone()
    state = copy.deepcopy(optimizer.state[model[1].weight])
    stale = model[1].weight.grad.clone()
    with guard(model, optimizer, mode="restore") as held:
        optimizer.step()
    twin_optimizer.step()
    assert torch.equal(model[1].weight, weight)
    assert not torch.equal(twin[1].weight, weight)
    assert same(dict(optimizer.state[model[1].weight]), dict(state))
    assert held.undone == {"1.weight": 1}
    assert torch.equal(model[1].weight.grad, stale)
    for name, value in twin.state_dict().items():
        assert name == "1.weight" or torch.equal(model.state_dict()[name], value)


ZERO = [
    (SGD, {"momentum": 0.9}, "momentum (momentum_buffer) moves it at a gradient of zeros"),
    (RMSprop, {"momentum": 0.9}, "momentum (momentum_buffer) moves it at a gradient of zeros"),
    (Adam, {}, "momentum (exp_avg) moves it at a gradient of zeros"),
    (SGD, {"weight_decay": 0.1}, "weight decay (weight_decay=0.1) moves it at a gradient of zeros"),
    (torch.optim.ASGD, {"lambd": 0.01}, "weight decay (lambd=0.01) moves it at a gradient of zeros"),
]


@pytest.mark.parametrize(("kind", "options", "cause"), ZERO)
def test_zeros_are_refused_with_their_cause(kind: type[Optimizer], options: dict, cause: str) -> None:
    model, optimizer = trained(Choice(kind, {"lr": 0.1, **options}))
    model[1].weight.requires_grad_(False)
    optimizer.zero_grad(set_to_none=False)
    with guard(model, optimizer), pytest.raises(FrozenMoved) as error:
        optimizer.step()
    assert cause in str(error.value)
    assert "stale" not in str(error.value)


@pytest.mark.parametrize(("kind", "options"), [(SGD, {}), (RMSprop, {}), (torch.optim.Adagrad, {})])
def test_zeros_that_move_nothing_pass(kind: type[Optimizer], options: dict) -> None:
    model, optimizer = trained(Choice(kind, {"lr": 0.1, **options}))
    model[1].weight.requires_grad_(False)
    with guard(model, optimizer, every=1) as held:
        for _ in range(3):
            learn(model, optimizer)
    assert held.steps == 3


@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_a_rate_of_zero_moves_nothing_and_passes(mode: str) -> None:
    model, optimizer = trained(Choice(AdamW, {"lr": 0.1}))
    model[1].weight.requires_grad_(False)
    state = copy.deepcopy(optimizer.state[model[1].weight])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with guard(model, optimizer, every=1, mode=mode):
        optimizer.step()
    kept = same(dict(optimizer.state[model[1].weight]), dict(state))
    assert kept is (mode == "restore"), "the step counted for the frozen parameter too, and that is undone"


class Drift(Optimizer):
    """Moves parameters for no reason that anyone could foresee, by writes that count no version."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["steps"] = self.state[param].get("steps", 0) + 1
                param.data.add_(1.0)


def test_what_no_rule_foresees_is_put_back_and_raised() -> None:
    model = nn.Linear(2, 2)
    optimizer = Drift(model.parameters())
    model.weight.requires_grad_(False)
    model.weight.grad = torch.zeros(2, 2)
    before = model.weight.clone()
    with guard(model, optimizer), pytest.raises(FrozenMoved, match="this step moved what is frozen; that was put back"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    assert model.weight not in optimizer.state


@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_writes_through_data_are_found_at_the_nth_step(mode: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = Drift(model.parameters())
    model.weight.requires_grad_(False)  # without a gradient nothing hints at the write
    before = model.weight.clone()
    with guard(model, optimizer, every=3, mode=mode) as held:
        optimizer.step()
        optimizer.step()
        if mode == "raise":
            with pytest.raises(FrozenMoved, match="moved in or before step 3 of Drift\n  'weight': some"):
                optimizer.step()
        else:
            optimizer.step()
            assert torch.equal(model.weight, before)
            assert held.undone == {"weight": 1}


@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_writes_outside_a_step_are_found_at_the_next(mode: str) -> None:
    model, optimizer = trained()
    freeze(model, "1", "0.1", optimizer=optimizer)
    before = model[1].weight.clone()
    with guard(model, optimizer, every=50, mode=mode) as held:
        learn(model, optimizer)
        with torch.no_grad():
            model[1].weight.mul_(2)
        backward(model)
        rest = model[0][0].weight.clone()
        if mode == "restore":
            optimizer.step()
            assert torch.equal(model[1].weight, before)
            return
        with pytest.raises(FrozenMoved, match=r"moved outside the optimizer's step\n  '1\.weight'"):
            optimizer.step()
        assert torch.equal(model[0][0].weight, rest), "the step must not have run"
        held.accept()
        optimizer.step()


def test_what_was_found_once_is_told_until_it_is_accepted() -> None:
    """Also where the write left address and version alone, and only a checksum found it."""
    model = nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with guard(model, optimizer, every=2) as held:
        optimizer.step()
        model.weight.data.add_(1)
        for _ in range(3):
            with pytest.raises(FrozenMoved, match="weight"):
                optimizer.step()
        held.accept()
        for _ in range(3):
            optimizer.step()


def test_a_write_of_equal_values_and_a_move_to_other_memory_pass() -> None:
    model, optimizer = trained()
    freeze(model, "1", "0.1", optimizer=optimizer)
    with guard(model, optimizer) as held:
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        model[1].weight.data = model[1].weight.detach().t().contiguous().t()
        learn(model, optimizer)
        held.check()


@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_a_lasting_allowance_covers_what_takes_the_place_of_what_it_covered(mode: Any) -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student)})
    freeze(model, "teacher", norm="freeze")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    held = guard(model, optimizer, every=1, mode=mode)
    held.allow("teacher")

    def average() -> None:
        optimizer.step()
        for tensor in model["teacher"].state_dict().values():
            tensor.add_(1)
        optimizer.step()

    model.double()  # puts other buffers into the norm
    average()
    model["teacher"].load_state_dict(copy.deepcopy(student.state_dict()), assign=True)
    average()
    model["teacher"] = copy.deepcopy(student)
    freeze(model, "teacher", norm="freeze")
    average()
    del model["teacher"]
    optimizer.step()
    assert not held.undone


def test_updates_that_are_meant_are_allowed_by_name() -> None:
    model = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2), "backbone": nn.Linear(2, 2)})
    model["teacher"].requires_grad_(False)
    model["backbone"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["student"].parameters(), lr=0.1)
    held = guard(model, optimizer, every=1)
    for _ in range(3):  # a mean teacher
        model["student"](torch.ones(1, 2)).sum().backward()
        optimizer.step()
        with held.allow("teacher"):
            for kept, new in zip(model["teacher"].parameters(), model["student"].parameters(), strict=True):
                kept.data.mul_(0.9).add_(new.data, alpha=0.1)
    held.check()
    allowance = held.allow("teacher")  # where the update is out of reach, in a library's own step
    model["teacher"].weight.data.mul_(0.5)
    optimizer.step()
    held.check()
    allowance.end()
    allowance.end()
    model["teacher"].weight.data.mul_(0.5)
    with pytest.raises(FrozenMoved, match=r"'teacher\.weight'[\s\S]*guard\.allow\(\)") as moved:
        held.check()
    assert moved.value.names == ("teacher.weight",)
    held.accept()
    with held.allow("teacher"):
        model["backbone"].weight.data.add_(1)  # not what was allowed
        with pytest.raises(FrozenMoved, match=r"'backbone\.weight'"):
            held.check()
    held.accept()
    with held.allow():  # an adapter that is merged
        model["backbone"].weight.data.add_(1)
    held.check()
    with pytest.raises(ValueError, match="'techer' matches no module"):
        held.allow("techer")
    held.accept()
    held.allow(model["teacher"].named_parameters())  # an iterator, which is read once
    for _ in range(2):
        optimizer.step()
        model["teacher"].weight.data.add_(1)
    held.remove()
