"""A call like one before is not decided again; whatever differs is; and nothing outlives what it was made of."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import freezekit as fk
from freezekit.fusion import fuse, unfuse
from tests.fusion.nets import Bottleneck, plain, settled


def x(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 6, 6)


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "trainable": lambda m: m[0].requires_grad_(True),
    "training": lambda m: m.train(),
    "eps": lambda m: setattr(m[1], "eps", 0.5),
    "statistics": lambda m: m[1].running_mean.add_(1),
    "data": lambda m: m[0].weight.data.mul_(2),
    "another weight": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight * 2, requires_grad=False)),
    "swapped": lambda m: torch.utils.swap_tensors(m[0].weight, nn.Parameter(m[0].weight * 2, requires_grad=False)),
    "padding": lambda m: setattr(m[0], "padding", (0, 0)),
    "list for a tuple": lambda m: setattr(m[0], "padding", [2, 2]),
    "padding mode": lambda m: setattr(m[0], "padding_mode", "nonsense") or setattr(m[0], "padding_mode", "zeros"),
    "hook": lambda m: m[0].register_forward_hook(lambda layer, args, y: y * 2),
    "own forward": lambda m: setattr(m[1], "forward", lambda y: y * 3),
    "activation": lambda m: m.__setitem__(2, nn.ReLU6()),
    "bias": lambda m: m[0].register_parameter("bias", nn.Parameter(torch.ones(8), requires_grad=False)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_call_sees_what_has_changed(name: str) -> None:
    model = fuse(settled(plain(1, 8)))
    model(input := x())
    with torch.no_grad():
        CHANGES[name](model)
    ours = model(input)
    torch.testing.assert_close(ours, unfuse(copy.deepcopy(model))(input))


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def test_calls_of_other_kinds_in_between() -> None:
    model = fuse(settled(plain(1, 8)))
    stock = unfuse(copy.deepcopy(model))
    contexts = [nullcontext, autocast, lambda: fk.testing.emulated(), lambda: fk.backend("aten")]
    inputs = [x(), x(3), x().to(memory_format=torch.channels_last)]
    for _ in range(2):
        for context in contexts:
            for input in inputs:
                with context():
                    ours, theirs = model(input), stock(input)
                assert ours.dtype == theirs.dtype
                assert ours.stride() == theirs.stride()
                torch.testing.assert_close(ours, theirs, atol=0.05 if context is autocast else 1e-5, rtol=0.02)


class Head(nn.Module):
    """One convolution for several inputs, with a norm and an activation of its own for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(self.norms[0](self.conv(a))), F.relu6(self.norms[1](self.conv(b)) + b)


def test_a_shared_convolution() -> None:
    model = fuse(settled(Head()))
    a, b = x(), x(1)
    for _ in range(3):
        torch.testing.assert_close(model(a, b), unfuse(copy.deepcopy(model))(a, b))


def test_nothing_outlives_the_model() -> None:
    model = fuse(settled(plain(1, 8)))
    model[1].friend = model  # a circle that only Python's collector opens
    model(x())
    conv = weakref.ref(model[0])
    del model
    gc.collect()
    assert conv() is None


def test_function_modes_see_the_layers() -> None:
    names = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    model = fuse(settled(plain(1, 8)))
    model(x())
    with Mode():
        model(x())
    assert "freezekit.frozen_conv2d.default" not in names
    assert any("conv2d" in name for name in names)


def test_errors_are_torchs_own() -> None:
    model = fuse(settled(plain(1, 8)))
    model(x())
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(2, 7, 6, 6))


def test_replicas_run_their_layers() -> None:
    """DataParallel makes replicas that have tensors where the model has parameters."""
    model = fuse(settled(plain(1, 8)))
    expected = model(input := x())
    replicas = [module._replicate_for_data_parallel() for module in model.modules()]
    for i, child in enumerate(replicas[1:]):
        replicas[0]._modules[str(i)] = child
        source = model[i]
        for name, parameter in source._parameters.items():
            if parameter is None:
                child._parameters[name] = None
            else:
                setattr(child, name, parameter.detach())
        child._buffers.update(source._buffers)
    torch.testing.assert_close(replicas[0](input), expected)


def test_weights_under_transforms() -> None:
    model = fuse(settled(plain(2, 8)))
    input, stock = x(), unfuse(copy.deepcopy(model))
    state = {name: value.detach() for name, value in model.named_parameters()}
    state |= dict(model.named_buffers())
    stacked = {name: torch.stack([value, value * 2]) if value.dim() else value for name, value in state.items()}
    axes = {name: 0 if value.dim() else None for name, value in state.items()}

    def call(net: nn.Module) -> Tensor:
        f = lambda state: torch.func.functional_call(net, state, (input,))  # noqa: E731
        return torch.vmap(f, in_dims=(axes,))(stacked)

    torch.testing.assert_close(call(model), call(stock))
    loss = lambda net: lambda weight: torch.func.functional_call(net, {"0.weight": weight}, (input,)).sum()  # noqa: E731
    weight = model[0].weight.detach()
    torch.testing.assert_close(torch.func.grad(loss(model))(weight), torch.func.grad(loss(stock))(weight))


def test_transforms_of_a_block_whose_input_has_two_readers() -> None:
    stock = settled(nn.Sequential(Bottleneck(8, 8), Bottleneck(8, 16)))
    fused, images = fuse(copy.deepcopy(stock)), torch.randn(3, 2, 8, 6, 6)
    filters = torch.stack([stock[0].conv1.weight, -stock[0].conv1.weight])
    calls = [
        lambda m: torch.vmap(m)(images),
        lambda m: torch.vmap(lambda w: torch.func.functional_call(m, {"0.conv1.weight": w}, (images[0],)))(filters),
        lambda m: torch.func.functionalize(m)(images[0]),
        lambda m: torch.func.jvp(m, (images[0],), (images[1],))[1],
        lambda m: torch.func.grad(lambda x: m(x).sum())(images[0]),
        lambda m: torch.vmap(torch.func.grad(lambda x: m(x).sum()))(images),
    ]
    for call in calls:
        torch.testing.assert_close(call(fused), call(stock), rtol=1e-4, atol=1e-4)
