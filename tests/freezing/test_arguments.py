"""Wrong arguments of freezing: told in two lines that name argument, expectation and value, with nothing changed."""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from freezekit import distributed
from freezekit.backends import backend
from freezekit.enabling import enabled
from freezekit.freezing import freeze, freeze_state, is_held, load_freeze_state, unfreeze
from freezekit.fusion.norms import register_norm
from freezekit.guarding import FrozenMoved, guard
from freezekit.schedules import FreezeOut, UpdateNorm, layers_of


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 2)).eval()


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1)


MODEL, LAYER = net(), nn.Linear(3, 1)
OPTIMIZER = sgd(MODEL)
BIG, SMALL = torch.full((64, 64), 0.8125), torch.tensor([0.8125, 0.8125])
VALUES: dict[str, Any] = {
    "None": None,
    "tensor": BIG,
    "two numbers": SMALL,
    "parameter": nn.Parameter(SMALL),
    "module": LAYER,
    "optimizer": OPTIMIZER,
    "string": "x",
    "negative": -1,
    "fraction": 1.5,
    "nan": float("nan"),
    "list": [BIG, 3],
    "dict": {"a": BIG},
    "state dict": MODEL.state_dict(),
    "class": nn.Conv3d,
    "object": object(),
    "function": lambda *args: False,
    "method": OPTIMIZER.step,
    "bytes": b"a",
}
# Argument, what is right of VALUES, call.
CALLS: dict[str, tuple[str, set[str], Callable[[Any], Any]]] = {
    "freeze(model)": ("model", {"module"}, freeze),
    "freeze(patterns)": ("patterns", set(), lambda x: freeze(net(), x)),
    "freeze(optimizer)": ("optimizer", {"None", "optimizer"}, lambda x: freeze(net(), "0", optimizer=x)),
    "freeze(remove)": ("remove", set(), lambda x: freeze(MODEL, "0", optimizer=OPTIMIZER, remove=x)),
    "freeze(state)": ("state", set(), lambda x: freeze(MODEL, "0", optimizer=OPTIMIZER, state=x)),
    "freeze(norm)": ("norm", {"None"}, lambda x: freeze(net(), norm=x)),
    "freeze(until)": ("until", {"None"}, lambda x: freeze(net(), until=x)),
    "freeze(inputs)": ("inputs", {"None"}, lambda x: freeze(net(), inputs=x)),
    "unfreeze(model)": ("model", {"module"}, unfreeze),
    "unfreeze(patterns)": ("patterns", set(), lambda x: unfreeze(net(), x)),
    "unfreeze(optimizer)": ("optimizer", {"None", "optimizer"}, lambda x: unfreeze(MODEL, "0", optimizer=x)),
    "unfreeze(state)": ("state", set(), lambda x: unfreeze(MODEL, "0", optimizer=OPTIMIZER, state=x)),
    "unfreeze(norm)": ("norm", set(), lambda x: unfreeze(net(), norm=x)),
    "unfreeze(until)": ("until", {"None"}, lambda x: unfreeze(net(), until=x)),
    "unfreeze(group)": ("group", {"None"}, lambda x: unfreeze(MODEL, "0", optimizer=OPTIMIZER, group=x)),
    "guard(model)": ("model", {"module"}, lambda x: guard(x, OPTIMIZER).remove()),
    "guard(optimizer)": ("optimizer", {"optimizer"}, lambda x: guard(MODEL, x).remove()),
    "guard(every)": ("every", set(), lambda x: guard(MODEL, OPTIMIZER, every=x)),
    "guard(mode)": ("mode", set(), lambda x: guard(MODEL, OPTIMIZER, mode=x)),
    "guard.allow": ("patterns", set(), lambda x: guard(net(), sgd(LAYER)).allow(x)),
    "freeze_state(model)": ("model", {"module"}, freeze_state),
    "freeze_state(optimizer)": ("optimizer", {"None", "optimizer"}, lambda x: freeze_state(MODEL, x)),
    "load(model)": ("model", {"module"}, lambda x: load_freeze_state(x, freeze_state(LAYER))),
    "load(state)": ("state", set(), lambda x: load_freeze_state(net(), x)),
    "load(optimizer)": ("optimizer", {"None"}, lambda x: load_freeze_state(net(), freeze_state(MODEL), x)),
    "load(strict)": ("strict", set(), lambda x: load_freeze_state(net(), freeze_state(MODEL), strict=x)),
    "is_held": ("module", {"module"}, is_held),
    "FreezeOut(model)": ("model", set(), lambda x: FreezeOut(x if x is not LAYER else "LAYER", 0.5, 10)),
    "FreezeOut(t0)": ("t0", set(), lambda x: FreezeOut(net(), x, 10)),
    "FreezeOut(total_steps)": ("total_steps", set(), lambda x: FreezeOut(net(), 0.5, x)),
    "FreezeOut(how)": ("how", set(), lambda x: FreezeOut(net(), 0.5, 10, x)),
    "FreezeOut(stages)": ("stages", {"None"}, lambda x: FreezeOut(net(), 0.5, 10, stages=x)),
    "FreezeOut(optimizer)": ("optimizer", {"None", "optimizer"}, lambda x: FreezeOut(net(), 0.5, 10, optimizer=x)),
    "FreezeOut(layers)": ("layers", {"None"}, lambda x: FreezeOut(net(), 0.5, 10, layers=x)),
    "FreezeOut(anneal)": ("anneal", set(), lambda x: FreezeOut(net(), 0.5, 10, anneal=x)),
    "FreezeOut(scale_lr)": ("scale_lr", set(), lambda x: FreezeOut(net(), 0.5, 10, scale_lr=x)),
    "FreezeOut(remove)": ("remove", set(), lambda x: FreezeOut(net(), 0.5, 10, remove=x)),
    "FreezeOut(state)": ("state", set(), lambda x: FreezeOut(net(), 0.5, 10, state=x)),
    "FreezeOut.load_state_dict": ("state", set(), lambda x: FreezeOut(net(), 0.5, 10).load_state_dict(x)),
    "FreezeOut.lr_factor(layer)": ("layer", set(), lambda x: FreezeOut(net(), 0.5, 10).lr_factor(x, 1)),
    "FreezeOut.lr_factor(step)": (
        "step",
        {"negative", "fraction", "nan"},
        lambda x: FreezeOut(net(), 0.5, 10).lr_factor("0", x),
    ),
    "FreezeOut.param_groups(model)": ("model", {"module"}, lambda x: FreezeOut.param_groups(x, 0.1)),
    "UpdateNorm(model)": ("model", {"module"}, lambda x: UpdateNorm(x, sgd(LAYER), 0.1)),
    "UpdateNorm(optimizer)": ("optimizer", {"optimizer"}, lambda x: UpdateNorm(net(), x, 0.1)),
    "UpdateNorm(threshold)": ("threshold", {"fraction"}, lambda x: UpdateNorm(MODEL, OPTIMIZER, x)),
    "UpdateNorm(every)": ("every", set(), lambda x: UpdateNorm(MODEL, OPTIMIZER, 0.1, every=x)),
    "UpdateNorm(patience)": ("patience", set(), lambda x: UpdateNorm(MODEL, OPTIMIZER, 0.1, patience=x)),
    "UpdateNorm(thaw_after)": ("thaw_after", {"None"}, lambda x: UpdateNorm(MODEL, OPTIMIZER, 0.1, thaw_after=x)),
    "UpdateNorm(max_changes)": ("max_changes", {"None"}, lambda x: UpdateNorm(MODEL, OPTIMIZER, 0.1, max_changes=x)),
    "UpdateNorm(layers)": ("layers", {"None"}, lambda x: UpdateNorm(MODEL, OPTIMIZER, 0.1, layers=x)),
    "UpdateNorm(dry_run)": ("dry_run", set(), lambda x: UpdateNorm(MODEL, OPTIMIZER, 0.1, dry_run=x)),
    "UpdateNorm.load_state_dict": ("state", set(), lambda x: UpdateNorm(MODEL, OPTIMIZER, 0.1).load_state_dict(x)),
    "layers_of(model)": ("model", {"module"}, layers_of),
    "layers_of(patterns)": ("layers", {"None"}, lambda x: layers_of(net(), x)),
    "rewrap": ("ddp", set(), distributed.rewrap),
    "mismatch": ("ddp", set(), distributed.mismatch),
    "check": ("ddp", set(), distributed.check),
    "reduced": ("ddp", set(), distributed.reduced),
    "sync_buffers": ("ddp", set(), distributed.sync_buffers),
    "watch": ("module", {"module"}, distributed.watch),
    "wrappers": ("model", {"module"}, lambda x: list(distributed.wrappers(x))),
    "enabled": ("precision", {"None"}, enabled),
    "backend": ("backend", set(), backend),
    "register_norm(kind)": ("kind", {"class"}, lambda x: x is nn.Conv3d or register_norm(x, always_fixed=True)),
    "register_norm(always_fixed)": ("always_fixed", set(), lambda x: register_norm(nn.BatchNorm2d, always_fixed=x)),
    "check_ranks": ("model", {"module"}, lambda x: x is LAYER or distributed.check_ranks(x)),
}


@pytest.fixture(autouse=True)
def as_before() -> Any:
    yield
    LAYER.requires_grad_(True)
    LAYER._forward_pre_hooks.clear()


@pytest.mark.parametrize("call", CALLS)
def test_wrong_values_are_told_in_two_lines(call: str) -> None:
    argument, right, ask = CALLS[call]
    for kind, value in VALUES.items():
        if kind in right:
            ask(value)
            continue
        with pytest.raises((TypeError, ValueError)) as error:
            ask(value)
        said = str(error.value)
        assert said.startswith((argument, f"guard: {argument}")), f"{kind}: {said}"
        assert said.count("\n") <= 1, f"{kind}: {said}"
        assert len(said) < 450, f"{kind}: {said}"
        assert "0.8125" not in said, f"{kind}: {said}"
        assert all(p.requires_grad for p in MODEL.parameters())


OTHER = Adam(MODEL[0].parameters())
WRONG_OPTIMIZERS = [
    (OPTIMIZER.step, r"got the \w+ step;\npass the optimizer itself"),
    (
        lambda: OPTIMIZER,
        r"got the function <lambda>;\npass the optimizer itself",
    ),  # which has optimizers among its globals
    (net, r"got the function net;\npass the optimizer itself"),
    (torch.optim, r"got the module torch\.optim;\npass the optimizer itself"),
    (SGD, r"got the class SGD;\npass an instance of it"),
    (functools.partial(SGD, lr=0.1), r"got functools\.partial"),
    (list(MODEL.parameters()), r"got torch\.nn\.parameter\.Parameter in a list;\npass the optimizer that steps it"),
    (OPTIMIZER.state_dict(), r"got .* in a dict"),
    ([OPTIMIZER, 3], r"got int 3 in a list"),
    ({"a": OPTIMIZER, "c": "x"}, r"got str 'x' in a dict"),
    ({"a": OPTIMIZER, "b": None}, r"got None in a dict"),
    ([OPTIMIZER, None], r"got None in a list"),
    ([[OPTIMIZER], [None]], r"got None in a list"),
    (torch.amp.GradScaler("cpu"), r"got torch\.amp\.grad_scaler\.GradScaler,\nand found none inside it: pass the"),
]
TAKERS: list[Callable[[Any], Any]] = [
    lambda x: freeze(net(), optimizer=x),
    lambda x: unfreeze(net(), optimizer=x),
    lambda x: guard(net(), x),
    lambda x: freeze_state(net(), x),
    lambda x: load_freeze_state(net(), freeze_state(MODEL), x),
    lambda x: FreezeOut(net(), 0.5, 10, optimizer=x),
    lambda x: UpdateNorm(net(), x, 0.1),
]


@pytest.mark.parametrize(("value", "says"), WRONG_OPTIMIZERS, ids=[says for _, says in WRONG_OPTIMIZERS])
@pytest.mark.parametrize(
    "take", TAKERS, ids=["freeze", "unfreeze", "guard", "freeze_state", "load", "FreezeOut", "UpdateNorm"]
)
def test_what_is_no_optimizer(take: Callable[[Any], Any], value: Any, says: str) -> None:
    with pytest.raises(TypeError, match=r"^optimizer must be a torch\.optim\.Optimizer or several, " + says):
        take(value)


def pair() -> tuple[nn.ModuleDict, list[Optimizer]]:
    model = nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 2)})
    return model, [SGD(model["g"].parameters(), lr=0.1), Adam(model["d"].parameters(), lr=0.1)]


FORMS: dict[str, Callable[[list[Optimizer]], Any]] = {
    "list": lambda both: both,
    "tuple": tuple,
    "set": set,
    "by name": lambda both: dict(zip("gd", both, strict=True)),
    "values": lambda both: dict(enumerate(both)).values(),
    "iterator": iter,
    "deque": deque,
    "nested": lambda both: [[both[0]], {"d": both[1]}],
    "twice": lambda both: [*both, *both],
}


@pytest.mark.parametrize("form", FORMS)
def test_several_optimizers_in_any_form(form: str) -> None:
    model, both = pair()
    freeze(model, optimizer=FORMS[form](both), remove=True)
    assert [len(one.param_groups[0]["params"]) for one in both] == [0, 0]
    assert len(freeze_state(model, FORMS[form](both))["removed"]) == 2
    unfreeze(model, optimizer=FORMS[form](both))
    assert [len(one.param_groups[0]["params"]) for one in both] == [2, 2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_guard_watches_several_optimizers(form: str, mode: str) -> None:
    model, both = pair()
    held = guard(model, FORMS[form](both), mode=mode)
    assert {id(one) for one in held.optimizers} == set(map(id, both))
    for which, name in enumerate("gd"):
        model[name](torch.ones(1, 2)).sum().backward()
        model[name].weight.requires_grad_(False)  # half a freeze: the gradient is left
        before = model[name].weight.clone()
        if mode == "raise":
            with pytest.raises(
                FrozenMoved, match=rf"'{name}\.weight': its \.grad .* of {type(both[which]).__name__}\. Cure"
            ):
                both[which].step()
        else:
            both[which].step()
            assert held.undone[f"{name}.weight"] == 1
        assert torch.equal(before, model[name].weight)
        model[name].weight.grad = None
    assert held.steps == (2 if mode == "restore" else 0)
    both[0].step()
    held.remove()
    assert not any(one._optimizer_step_pre_hooks or one._optimizer_step_post_hooks for one in both)


@pytest.mark.parametrize("kind", ["FreezeOut", "UpdateNorm"])
def test_no_part_of_a_schedules_state_is_taken_as_it_comes(kind: str) -> None:
    def build() -> FreezeOut | UpdateNorm:
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
        optimizer = SGD(FreezeOut.param_groups(model, 0.1), lr=0.1)
        if kind == "FreezeOut":
            return FreezeOut(model, 0.5, 4, optimizer=optimizer, anneal=True)
        return UpdateNorm(model, optimizer, 1e-3, every=1)

    used = build()
    for _ in range(3):
        used.step()
    state, bad = used.state_dict(), [None, -1, "x", [3], [[]], {"a": 3}, {"0.weight": torch.ones(1)}, object()]
    for key in state:
        for value in bad:
            fresh = build()
            before = repr(fresh.state_dict())
            with pytest.raises((TypeError, ValueError), match="^state"):
                fresh.load_state_dict({**state, key: value})
            assert repr(fresh.state_dict()) == before
    fresh = build()
    assert fresh.load_state_dict(state).frozen == used.frozen
    assert repr(fresh.state_dict()) == repr(state)


def test_a_state_of_a_schedule_that_is_not_whole() -> None:
    schedule = FreezeOut(net(), 0.5, 10)
    good = schedule.state_dict()
    for wrong, says in (
        ({"steps": -1}, "state: 'steps' must be a number of steps, got -1"),
        ({"steps": "1"}, "state: 'steps' must be a number of steps, got '1'"),
        ({"frozen": ["7"]}, "state: 'frozen' must be a list of layers, got ['7']"),
        ({"frozen": "0"}, "state: 'frozen' must be a list of layers, got '0'"),
        ({"config": 3}, "state: 'config' must be a dict, got 3"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            schedule.load_state_dict({**good, **wrong})
    assert schedule.steps == 0
