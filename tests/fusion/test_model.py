"""A fused model stays the model that it was: names, state, copies, hooks, freezing, moves."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from freezekit.fusion import fuse, fusion_report, unfuse
from tests.fusion.nets import Bottleneck, ResNet, plain, settled

FUSED = "FreezekitFrozenConv2dBackward"


def net() -> nn.Sequential:
    return settled(nn.Sequential(Bottleneck(8, 16), nn.ReLU(), *plain(1, 16)))


def x(channels: int = 8) -> Tensor:
    return torch.randn(2, channels, 8, 8, requires_grad=True)


def runs_fused(model: nn.Module, input: Tensor | None = None) -> bool:
    return model(x() if input is None else input).grad_fn.name() == FUSED


def test_what_a_model_is_made_of_stays_the_same_objects() -> None:
    model = net()
    before = {
        "state": {k: id(v) for k, v in model.state_dict(keep_vars=True).items()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "repr": repr(model),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "kinds": [type(module) for module in model.modules()],
    }

    def now() -> dict:
        return {
            "state": {k: id(v) for k, v in model.state_dict(keep_vars=True).items()},
            "modules": [(name, id(module)) for name, module in model.named_modules()],
            "repr": repr(model),
            "attributes": [sorted(vars(module)) for module in model.modules()],
            "kinds": [type(module) for module in model.modules()],
        }

    fuse(model)(x())
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), before["kinds"], strict=True))
    assert {**now(), "kinds": 0} == {**before, "kinds": 0}
    unfuse(model)
    assert now() == before


def test_copies_are_fused_and_independent() -> None:
    model = fuse(net())
    expected = model(x := torch.randn(1, 8, 8, 8, requires_grad=True))
    other = copy.deepcopy(model)
    assert runs_fused(other)
    torch.testing.assert_close(other(x), expected)
    with torch.no_grad():
        other[0].conv1.weight.zero_()
    assert not torch.equal(other(x), expected)
    assert torch.equal(model(x), expected)


class Registered(nn.Module):
    """Is told of each class that is made of it, and tolerates none twice."""

    kinds: ClassVar[dict[str, type[nn.Module]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 8, 1), nn.ReLU()

    def __init_subclass__(cls, *, key: str) -> None:
        assert key not in Registered.kinds
        Registered.kinds[key] = cls

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Told(Registered, key="told"):
    pass


class Listed(type):
    kinds: ClassVar[list[type]] = []

    def __new__(cls, *arguments: Any) -> Any:
        cls.kinds.append(super().__new__(cls, *arguments))
        return cls.kinds[-1]


class Met(nn.Module, metaclass=Listed):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 8, 1), nn.ReLU()

    forward = Registered.forward


class Abstract(ABC):
    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class Typed(nn.Module, Abstract, Generic[TypeVar("T")]):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 8, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


@pytest.mark.parametrize(("kind", "reason"), [(Told, "__init_subclass__"), (Met, "metaclass"), (Typed, "")])
def test_no_class_is_made_where_somebody_is_told_of_it(kind: type[nn.Module], reason: str) -> None:
    known = dict(Registered.kinds), list(Listed.kinds)
    model = fuse(kind().requires_grad_(False))
    assert (type(model) is kind) is bool(reason)
    assert reason in fusion_report(model)[0].reason
    assert (dict(Registered.kinds), list(Listed.kinds)) == known
    assert isinstance(model, kind)
    assert not isinstance(model, Abstract) or kind is Typed
    assert model(x()).shape == (2, 8, 8, 8)


def test_no_class_outlives_its_models() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(8, 8, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x))

    models = [fuse(Local()), fuse(Local())]
    assert type(models[0]) is type(models[1]) is not Local
    kind = weakref.ref(Local)
    del models, Local
    gc.collect()
    assert kind() is None


def test_a_forward_that_is_edited_is_obeyed() -> None:
    class Net(Typed):
        def forward(self, x: Tensor, factor: float = 1.0, *, shift: float = 0.0) -> Tensor:
            return self.act(self.conv(x)) * factor + shift

    def edited(self: Any, x: Tensor, factor: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return self.act(self.conv(x)) * factor * 100

    model = Net()
    stock = copy.deepcopy(model)
    fuse(model)
    input = x()
    for change in (
        lambda: setattr(Net.forward, "__defaults__", (5.0,)),
        lambda: Net.forward.__kwdefaults__.update(shift=3.0),
        lambda: setattr(Net.forward, "__kwdefaults__", {"shift": 4.0}),
        lambda: setattr(Net.forward, "__code__", edited.__code__),  # as autoreload does
    ):
        change()
        torch.testing.assert_close(model(input), stock(input))


def test_a_copy_of_what_others_made_of_a_fused_model() -> None:
    class Twice(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value * 2

    model = fuse(net())
    model[0].scale = nn.Parameter(torch.ones(1), requires_grad=False)
    nn.utils.parametrize.register_parametrization(model[0], "scale", Twice())
    other = copy.deepcopy(model)
    assert type(other[0]) is type(model[0])
    input = x()
    torch.testing.assert_close(other(input), model(input))
    assert other[0].parametrizations.scale.original is not model[0].parametrizations.scale.original


def test_an_instance_s_own_forward_is_what_the_report_is_about() -> None:
    model = fuse(settled(nn.Sequential(*plain(1, 8))))
    model.forward = lambda x: x
    for _ in range(2):
        assert fusion_report(model)[0].reason == "the module around it has a forward of its own instance"
        fuse(model)
    assert type(model) is nn.Sequential


def test_the_report_names_a_block_of_which_a_layer_is_gone() -> None:
    model = fuse(settled(nn.Sequential(*plain(2, 8))))
    del model[-1]
    assert fusion_report(model)[-1].reason == "a layer of it is gone"


class WithArguments(Typed):
    def __getnewargs__(self) -> tuple[int]:
        return (3,)

    def __new__(cls, *arguments: int) -> WithArguments:
        made = super().__new__(cls)
        made.made_of = arguments
        return made


class WithoutState(Typed):
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class WithNoState(Typed):
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (), None


@pytest.mark.parametrize("kind", [WithArguments, WithoutState, WithNoState])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_classes_that_say_how(kind: type[nn.Module], copied: Callable[[nn.Module], nn.Module]) -> None:
    stock, fused = kind(), fuse(kind())
    mine, theirs = copied(fused), copied(stock)
    assert isinstance(mine, kind)
    assert {name: type(value) for name, value in vars(mine).items()} == {
        name: type(value) for name, value in vars(theirs).items()
    }
    assert getattr(mine, "made_of", None) == getattr(theirs, "made_of", None)


def test_a_pickle_is_that_of_the_stock_model() -> None:
    model = fuse(net())
    expected = model(x := torch.randn(1, 8, 8, 8, requires_grad=True))
    data = pickle.dumps(model)
    assert b"freezekit" not in data
    loaded = pickle.loads(data)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in unfuse(model).modules()]
    torch.testing.assert_close(loaded(x), expected)
    assert runs_fused(fuse(loaded))


ORDERS = [
    ("convert", "fuse", "revert"),
    ("fuse", "convert", "revert"),
    ("fuse", "revert", "unfuse"),
    ("convert", "fuse", "unfuse", "revert"),
    ("fuse", "unfuse", "convert", "fuse", "revert", "revert"),
    ("fuse", "copy", "convert", "pickle", "fuse", "copy", "revert"),
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_convert_fuse_and_what_undoes_them_in_any_order(order: tuple[str, ...]) -> None:
    model, input = net(), x()
    kinds, expected = [type(m) for m in model.modules()], model(input)
    steps = {
        "convert": fk.convert,
        "fuse": fuse,
        "revert": fk.revert,
        "unfuse": unfuse,
        "copy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    }
    for step in order:
        model = steps[step](model)
        torch.testing.assert_close(model(input), expected)
    assert [type(m) for m in model.modules()] == kinds


def test_reverting_a_part_unfuses_that_part() -> None:
    model = fuse(net())
    fk.revert(model, only="0")
    assert type(model[0]) is Bottleneck
    assert type(model) is not nn.Sequential
    assert {row.conv for row in fusion_report(model) if row.fused} == {"2"}


def test_fusing_twice_is_fusing_once() -> None:
    model = fuse(net())
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in fuse(model).modules()] == kinds


@pytest.mark.parametrize("part", ["conv1", "bn1", "relu"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_on_layers_run(part: str, kind: str) -> None:
    model = settled(Bottleneck(8, 16))
    calls = []
    layer = getattr(fuse(model), part)
    register = {
        "forward": layer.register_forward_hook,
        "pre": layer.register_forward_pre_hook,
        "backward": layer.register_full_backward_hook,
    }[kind]
    model.relu.inplace = kind != "backward"  # torch itself refuses these hooks next to an in-place layer
    handle = register(lambda *_: calls.append(1))
    model(x()).sum().backward()
    assert len(calls) == (3 if part == "relu" else 1)
    blocked = [row.reason for row in fusion_report(model) if not row.fused]
    assert blocked
    assert all("hooks" in reason for reason in blocked)
    handle.remove()
    calls.clear()
    assert runs_fused(model)
    assert not calls


def test_hooks_on_containers_run_beside_fused_blocks() -> None:
    model, calls = fuse(net()), []
    model[0].register_forward_hook(lambda module, args, out: calls.append(out.grad_fn.name()))
    model(x()).sum().backward()
    assert calls == [FUSED]


def test_frozen_is_read_at_each_call() -> None:
    model = fuse(plain(1, 8))
    assert not runs_fused(model.train())
    assert not runs_fused(model.requires_grad_(False))
    assert runs_fused(model.eval())
    model[1].weight.requires_grad_(True)
    assert not runs_fused(model)
    assert "trainable" in fusion_report(model)[0].reason


def test_freeze_and_unfreeze_need_no_other_call() -> None:
    model = fuse(plain(2, 8)).train()
    fk.freeze(model, "0", "1")
    names = [row.fused for row in fusion_report(model)]
    assert names == [True, False]
    fk.unfreeze(model, "0", "1")
    assert not any(row.fused for row in fusion_report(model))


def test_a_frozen_prefix_runs_fused_and_keeps_no_graph() -> None:
    model = fuse(settled(plain(2, 8)))
    with_hooks = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: with_hooks.append(t) or t, lambda t: t):
        y = model(torch.randn(1, 8, 8, 8))
    assert y.grad_fn is None
    assert not with_hooks
    torch.testing.assert_close(y, unfuse(model)(torch.zeros(1, 8, 8, 8)) * 0 + y)


def test_thaw_train_and_freeze_again_in_the_middle_of_training() -> None:
    random.seed(0)
    stock = settled(ResNet((1, 1), width=8, stem=3)).double().requires_grad_(True)
    losses = []
    for model in (stock, fuse(copy.deepcopy(stock))):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        losses.append([])
        for step in range(12):
            if step in (0, 8):
                fk.freeze(model, "conv1", "bn1", "layers.0", optimizer=optimizer)
            if step == 4:
                fk.unfreeze(model, "layers.0", optimizer=optimizer)
            model.train()
            input = torch.randn(4, 3, 16, 16, dtype=torch.float64)
            loss = F.cross_entropy(model(input), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert len({round(loss, 6) for loss in losses[0]}) == 12


def test_compiled_as_eager() -> None:
    model = fuse(settled(nn.Sequential(Bottleneck(8, 16), Bottleneck(16, 16))))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input = x()
    for net in (model, compiled):
        y = net(input)
        y.square().sum().backward()
        if net is model:
            expected, gradient = y, input.grad.clone()
            input.grad = None
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(input.grad, gradient)


def test_autocast_as_stock() -> None:
    stock = settled(nn.Sequential(Bottleneck(8, 16), Bottleneck(16, 16)))
    model, input = fuse(copy.deepcopy(stock)), x()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(input), stock(input)
    assert ours.dtype == theirs.dtype
    assert ours.grad_fn.name() == FUSED
    exact = stock(input)
    assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()
