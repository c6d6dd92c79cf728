"""`audit` of optimizers that wrap another: nothing real is stepped, and what was not asked is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.optim import SGD, Optimizer

from freezekit.auditing import audit
from freezekit.freezing import freeze, unfreeze
from freezekit.guarding import FrozenMoved, guard
from freezekit.schedules import FreezeOut
from tests.auditing.helpers import found, images, net, the


class Lookahead(Optimizer):
    """As timm's and others': it steps the optimizer inside, and pulls the weights back every other step."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self._base_optimizer, self.param_groups, self.steps = base, base.param_groups, 0
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    def step(self, closure: Any = None) -> None:
        self._base_optimizer.step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            with torch.no_grad():
                for p, slow in self.slow.items():
                    p.copy_(slow.add_(p - slow, alpha=0.5))


class Accelerated(Optimizer):
    """As accelerate's: no constructor of Optimizer's, everything handed on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(
        lambda self: self.optimizer.param_groups, lambda self, groups: setattr(self.optimizer, "param_groups", groups)
    )

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


class Wrapper:
    """As Lightning's: no optimizer itself."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def step(self) -> None:
        self._optimizer.step()


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, optimizer: Optimizer) -> None:
        self.inner = optimizer

    def step(self) -> None:
        self.inner.step()


class InTable(Wrapper):
    def __init__(self, optimizer: Optimizer) -> None:
        self.all, self._optimizer = {"main": optimizer, "rate": 0.1}, None

    def step(self) -> None:
        self.all["main"].step()


class Delegating:
    """As fastai's OptimWrapper: a state of its own, all else handed on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.opt, self.state = optimizer, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["opt"], name)


class Closed:
    """An optimizer of another make, which wraps none of torch's."""

    def __init__(self, params: Any) -> None:
        self.params = list(params)

    def step(self) -> None:
        pass


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "Lookahead": lambda m: Lookahead(sgd(m)),
    "Accelerated": lambda m: Accelerated(sgd(m)),
    "Wrapper": lambda m: Wrapper(sgd(m)),
    "Slotted": lambda m: Slotted(sgd(m)),
    "InTable": lambda m: InTable(sgd(m)),
    "Delegating": lambda m: Delegating(sgd(m)),
    "Wrapper of wrappers": lambda m: Wrapper(Slotted(Wrapper(sgd(m)))),
    "Wrapper in a table of a Wrapper": lambda m: InTable(Wrapper(sgd(m))),
    "Accelerated Lookahead": lambda m: Accelerated(Lookahead(sgd(m))),
    "ZeroRedundancyOptimizer": lambda m: ZeroRedundancyOptimizer(m.parameters(), SGD, lr=0.1, momentum=0.9),
    "PostLocalSGDOptimizer": lambda m: PostLocalSGDOptimizer(sgd(m), PeriodicModelAverager(4)),
}


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def prepared(make: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
    """A net after a step, whose first layer is frozen with its gradient left."""
    model = net()
    optimizer = make(model)
    for _ in range(2):
        model(images()).square().mean().backward()
        optimizer.step()
    model[0].requires_grad_(False)
    return model, optimizer


def inner_of(optimizer: Any) -> SGD:
    while not isinstance(optimizer, SGD):
        held = [getattr(optimizer, "inner", None), *getattr(optimizer, "__dict__", {}).values()]
        held += [value["main"] for value in held if isinstance(value, dict) and "main" in value]
        optimizer = next(value for value in held if isinstance(value, Optimizer | Wrapper | Slotted))
    return optimizer


@pytest.mark.parametrize("name", WRAPPERS)
def test_nothing_moves_and_the_move_is_seen(name: str) -> None:
    model, optimizer = prepared(WRAPPERS[name])
    before = [p.detach().clone() for p in model.parameters()]
    inner = inner_of(optimizer)
    momenta = [state["momentum_buffer"].clone() for state in inner.state.values()]
    report = audit(model, optimizer, images())
    assert the(report, "would-move").names == ("0.weight", "0.bias")
    assert "probably" not in the(report, "would-move").why, "the optimizer inside is asked"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, s["momentum_buffer"]) for a, s in zip(momenta, inner.state.values(), strict=True))
    assert sum(len(group["params"]) for group in inner.param_groups) == len(before)
    optimizer.step()
    assert not torch.equal(before[0], model[0].weight), "what audit said is so"


def test_wrappers_of_each_other_end() -> None:
    model = net()
    one = Wrapper(None)
    one._optimizer = Wrapper(one)
    for take in (lambda: guard(model, one), lambda: freeze(model, "0", optimizer=one), lambda: audit(model, one)):
        with pytest.raises(TypeError, match=r"got .*Wrapper,\nand found none inside it"):
            take()
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("name", WRAPPERS)
def test_guard_watches_the_optimizer_inside(name: str) -> None:
    model, optimizer = prepared(WRAPPERS[name])
    before = model[0].weight.detach().clone()
    with guard(model, optimizer) as held:
        with pytest.raises(FrozenMoved, match=r"nothing has moved yet[\s\S]*0\.weight"):
            optimizer.step()
        assert torch.equal(before, model[0].weight)
        for p in model[0].parameters():
            p.grad = None
        optimizer.step()
    assert held.steps == 1


@pytest.mark.parametrize("name", WRAPPERS)
def test_freeze_takes_parameters_out_of_the_optimizer_inside_and_puts_them_back(name: str) -> None:
    model, optimizer = prepared(WRAPPERS[name])
    inner = optimizer if name == "ZeroRedundancyOptimizer" else inner_of(optimizer)
    params, before = list(model.parameters()), [id(p) for group in inner.param_groups for p in group["params"]]
    freeze(model, "0", optimizer=optimizer, remove=True, norm="freeze")
    assert [id(p) for group in inner.param_groups for p in group["params"]] == [id(p) for p in params[2:]]
    if name != "ZeroRedundancyOptimizer":
        inner.state_dict()  # holds no state of what is gone
    unfreeze(model, "0", optimizer=optimizer)
    assert [id(p) for group in inner.param_groups for p in group["params"]] == before


def test_what_holds_several_stands_for_all_of_them() -> None:
    generator, discriminator = nn.Conv2d(3, 3, 1), net()
    both = nn.ModuleDict({"g": generator, "d": discriminator})
    manager = InTable(sgd(generator))
    manager.all["other"] = sgd(discriminator)
    assert not len(audit(both, manager))
    freeze(both, optimizer=manager, remove=True, norm="freeze")
    assert not any(group["params"] for one in (manager.all["main"], manager.all["other"]) for group in one.param_groups)
    with pytest.raises(TypeError, match="must be one torch.optim.Optimizer, got 2"):
        FreezeOut(both, t0=0.5, total_steps=10, optimizer=manager)


def test_what_wraps_none_is_told_what_to_pass() -> None:
    model = net()
    for ask in (
        lambda optimizer: freeze(model, optimizer=optimizer),
        lambda optimizer: audit(model, optimizer),
        lambda optimizer: FreezeOut(model, t0=0.5, total_steps=10, optimizer=optimizer),
    ):
        with pytest.raises(
            TypeError,
            match=r"got tests.auditing.test_wrapping.Closed,\nand found none inside it: pass the one .* or none where",
        ):
            ask(Closed(model.parameters()))
        with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer or several, got float 0.1$"):
            ask(0.1)
    with pytest.raises(TypeError, match=r"got .*Closed,\n.*that it wraps; .* no hooks to watch its steps by"):
        guard(model, Closed(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())


def test_hooks_around_a_step_are_told_to_be_not_run() -> None:
    model = net()
    optimizer = sgd(model)
    with guard(model, optimizer):
        assert not [check for check in audit(model, optimizer).skipped if "hook" in check]
        optimizer.register_step_pre_hook(lambda *step: None)
        optimizer.register_step_post_hook(lambda *step: model[0].weight.data.zero_())
        assert "2 hook(s) around the step of SGD" in audit(model, optimizer).skipped
    assert model[0].weight.any()


def test_guard_says_what_to_pass() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer or several, got .*Module$"):
        guard(model, nn.Module())
    both = Wrapper(sgd(model))
    both.other = sgd(model)
    with pytest.raises(ValueError, match=r"Wrapper has several inside it \(SGD, SGD\); pass the one that is meant"):
        guard(model, both)


class OwnTensors(SGD):
    """An optimizer that reaches its parameters by a list of its own."""

    def __init__(self, params: Any) -> None:
        self.mine = list(params)
        super().__init__(self.mine, lr=0.1)

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for p in self.mine:
                p.sub_(1)


def test_what_cannot_be_copied_is_looked_at_and_not_stepped() -> None:
    model, optimizer = prepared(lambda m: OwnTensors(m.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    report = audit(model, optimizer)
    assert "probably" in the(report, "would-move").why
    assert "keeps a list of its own (mine)" in report.skipped["a step of OwnTensors on copies"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not audit(model, sgd(model)).skipped.keys() & {"a step of SGD on copies"}


def test_several_at_once() -> None:
    generator, discriminator = nn.Conv2d(3, 3, 1), net()
    both = nn.ModuleDict({"g": generator, "d": discriminator})
    optimizers = {"g": Wrapper(sgd(generator)), "d": sgd(discriminator)}
    assert not len(audit(both, optimizers))
    assert not len(audit(both, list(optimizers.values())))
    discriminator.eval().requires_grad_(False)
    report = audit(both, optimizers)
    assert the(report, "nothing-to-step").names == tuple(f"d.{name}" for name, _ in discriminator.named_parameters())
    assert not found(report, "nothing-trainable")
