"""torch.func, forward-mode AD, tensor subclasses and modes: what stock computes, freezekit computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import freezekit as fk
from freezekit.functional import conv2d, conv2d_dgrad, conv2d_wgrad
from tests.dropin.twins import net as make_net
from tests.dropin.twins import turns
from tests.observe import Calls

X = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)
SMALL = X[:1, :, :4, :4]


def same(ours: Any, stock: Any) -> None:
    assert len(tree_leaves(ours)) == len(tree_leaves(stock)) > 0
    for a, b in zip(tree_leaves(ours), tree_leaves(stock)):
        torch.testing.assert_close(a, b)


def loss(net: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(net, parameters, (x,)).square().sum()


def detached(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def per_sample(net: nn.Module) -> Any:
    one = grad(lambda p, x: loss(net, p, x.unsqueeze(0)))
    return vmap(one, in_dims=(None, 0))(detached(net), X)


def per_sample_unbatched(net: nn.Module) -> Any:
    return vmap(grad(lambda p, x: loss(net, p, x)), in_dims=(None, 0))(detached(net), X)


def forward_mode(net: nn.Module) -> Any:
    with fwad.dual_level():
        y = net(fwad.make_dual(X, torch.ones_like(X)))
        weight = fwad.make_dual(net[0].weight, torch.ones_like(net[0].weight))
        z = functional_call(net, {"0.weight": weight}, (X,))
        return fwad.unpack_dual(y).tangent, fwad.unpack_dual(z).tangent


def forward_over_reverse(net: nn.Module) -> Any:
    with fwad.dual_level():
        x = fwad.make_dual(X.clone().requires_grad_(), torch.ones_like(X))
        (g,) = torch.autograd.grad(net(x).square().sum(), x)
        return fwad.unpack_dual(g).tangent


def batched_gradients(net: nn.Module) -> Any:
    x = X.clone().requires_grad_()
    y = net(x)
    v = torch.arange(3 * y.numel(), dtype=y.dtype).view(3, *y.shape) % 5
    return torch.autograd.grad(y, [x, *net.parameters()], v, is_grads_batched=True)


def batched_gradients_differentiated(net: nn.Module) -> Any:
    x = X.clone().requires_grad_()
    y = net(x).square()
    v = torch.arange(3 * y.numel(), dtype=y.dtype).view(3, *y.shape) % 5 / 5
    (g,) = torch.autograd.grad(y, x, v, is_grads_batched=True, create_graph=True)
    return g, *torch.autograd.grad(g.sum(), [x, *(p for p in net.parameters() if p.requires_grad)], allow_unused=True)


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda net: grad(lambda p: loss(net, p, X))(detached(net)),
    "grad of a subset": lambda net: grad(lambda w: loss(net, {"0.weight": w}, X))(net[0].weight.detach()),
    "grad of grad": lambda net: grad(lambda x: grad(lambda x: net(x).pow(3).sum())(x).sum())(X),
    "vjp": lambda net: vjp(net, X)[1](torch.ones_like(net(X))),
    "jvp": lambda net: jvp(net, (X,), (torch.ones_like(X),)),
    "linearize": lambda net: linearize(net, X)[1](torch.ones_like(X)),
    "jacrev": lambda net: jacrev(net)(SMALL),
    "jacfwd": lambda net: jacfwd(net)(SMALL),
    "hessian": lambda net: hessian(lambda x: net(x).square().sum())(SMALL),
    "per-sample": per_sample,
    "per-sample, unbatched": per_sample_unbatched,
    "vmap": lambda net: vmap(net)(X),
    "forward mode": forward_mode,
    "forward over reverse": forward_over_reverse,
    "batched gradients": batched_gradients,
    "batched gradients, differentiated": batched_gradients_differentiated,
    "functional hessian": lambda net: torch.autograd.functional.hessian(lambda x: net(x).square().sum(), SMALL),
    "functional jacobian, forward": lambda net: torch.autograd.functional.jacobian(
        net, SMALL, strategy="forward-mode", vectorize=True
    ),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str, frozen: bool, channels_last: bool, way: str) -> None:
    results = []
    for net in turns(way):
        net[2].requires_grad_(not frozen or name == "batched gradients")
        if channels_last:
            net.to(memory_format=torch.channels_last)
        results.append(TRANSFORMS[name](net))
    same(*results)


def test_an_ensemble() -> None:
    def run(kind: Callable[..., nn.Conv2d]) -> list[Tensor]:
        torch.manual_seed(0)
        models = [kind(3, 4, 3) for _ in range(3)]
        parameters, _ = stack_module_state(models)
        base = copy.deepcopy(models[0]).to("meta")
        y = vmap(lambda p, x: functional_call(base, p, (x,)), in_dims=(0, None))(parameters, X)
        y.sum().backward()
        return [y, *(p.grad for p in parameters.values())]

    same(run(fk.FreezableConv2d), run(nn.Conv2d))


def test_vmap_of_the_gradient_operators() -> None:
    g, w, xs = torch.randn(5, 2, 4, 4, 4), torch.randn(4, 3, 3, 3), torch.randn(5, 2, 3, 6, 6)
    same(
        vmap(lambda g: conv2d_dgrad(g, w, (2, 3, 6, 6)))(g),
        torch.stack([conv2d_dgrad(one, w, (2, 3, 6, 6)) for one in g]),
    )
    same(
        vmap(lambda g, x: conv2d_wgrad(g, x, (4, 3, 3, 3)))(g, xs),
        torch.stack([conv2d_wgrad(a, b, (4, 3, 3, 3)) for a, b in zip(g, xs)]),
    )
    with pytest.raises(RuntimeError, match=r"input_size|input must have 4 dimensions"):
        vmap(lambda g: torch.ops.freezekit.conv2d_dgrad(g, w, (2, 3, 6)))(g)


def test_kernels_that_were_demanded_are_not_left_out_silently() -> None:
    w = torch.randn(4, 3, 3, 3)
    with fk.testing.emulated():
        for call in (
            lambda: vmap(lambda x: conv2d(x, w))(X),
            lambda: grad(lambda x: conv2d(x, w).sum())(X),
            lambda: jvp(lambda x: conv2d(x, w), (X,), (X,)),
            lambda: conv2d(X.cfloat(), w.cfloat()),
        ):
            with pytest.raises(RuntimeError, match="emulated"):
                call()


def test_functional_call_decides_from_the_tensors_it_is_given() -> None:
    net = fk.FreezableConv2d(3, 4, 3)
    frozen = {name: p.detach() for name, p in net.named_parameters()}
    x = X.clone().requires_grad_()
    y = functional_call(net, frozen, (x,))
    with Calls() as calls:
        y.sum().backward()
    assert calls.gradients == (1, 0)
    assert net.weight.grad is None


class Plain(torch.Tensor):
    pass


class Logged(torch.Tensor):
    calls: list[Any] = []  # noqa: RUF012 -- what this class is for

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("padding", [0, "same"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_subclass_stays_one(which: int, padding: Any) -> None:
    for kind in (Plain, Logged):
        tensors = [X, torch.randn(4, 3, 3, 3), torch.randn(4)]
        tensors[which] = tensors[which].as_subclass(kind)
        ours, stock = conv2d(*tensors, padding=padding), F.conv2d(*tensors, padding=padding)
        assert type(ours) is type(stock) is kind
        assert torch.equal(ours, stock)
    assert conv2d in Logged.calls


def test_a_mode_sees_the_function() -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        fk.FreezableConv2d(3, 4, 3)(X)
    assert conv2d in seen


def test_devices_by_default() -> None:
    with torch.device("meta"):
        assert fk.FreezableConv2d(3, 4, 3)(torch.empty(1, 3, 8, 8)).is_meta
    torch.set_default_device("meta")
    try:
        assert fk.FreezableConv2d(3, 4, 3, padding="same")(torch.empty(1, 3, 8, 8)).is_meta
    finally:
        torch.set_default_device(None)


def test_fake_tensors() -> None:
    for frozen in (False, True):
        with FakeTensorMode():
            net = make_net(fk.FreezableConv2d)
            net[2].requires_grad_(not frozen)
            x = torch.randn(2, 3, 8, 8, requires_grad=True)
            net(x).sum().backward()
            assert x.grad.shape == x.shape
            assert x.grad.device.type == "cpu"
            with pytest.raises(RuntimeError, match="channels"):
                net(torch.randn(2, 4, 8, 8))


def test_functional_tensors() -> None:
    w = torch.randn(4, 3, 3, 3)
    assert torch.equal(functionalize(lambda x: conv2d(x, w).add_(1))(X), F.conv2d(X, w) + 1)


def test_a_nested_jagged_tensor_is_refused_as_in_stock() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 8, 8), torch.randn(4, 8, 8)], layout=torch.jagged)
    for conv in (F.conv2d, conv2d):
        with pytest.raises(RuntimeError, match="nested|dimension"):
            conv(nested, torch.randn(4, 3, 3, 3))
