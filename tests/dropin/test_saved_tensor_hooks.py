"""Saved-tensor hooks that take every tensor for numbers: packed bits and taps must come through, or say why not.

Weights are small integers, which every cast here holds exactly: a gradient differs only where bits do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import freezekit as fk

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]

# Casts that hold bytes, with and without a way back to the dtype.
CASTS: dict[str, Hooks] = {
    "half": (lambda t: t.half(), lambda t: t.float()),
    "bfloat16": (lambda t: t.bfloat16(), lambda t: t.float()),
    "double": (lambda t: t.double(), lambda t: t.float()),
    "half and back": (lambda t: (t.dtype, t.half()), lambda kept: kept[1].to(kept[0])),
    "bfloat16 and back": (lambda t: (t.dtype, t.bfloat16()), lambda kept: kept[1].to(kept[0])),
    "copies": (lambda t: t.clone(), lambda t: t),
}
# Of eight bits these keep fewer.
SHORT: dict[str, Hooks] = {
    "float8": (lambda t: t.to(torch.float8_e4m3fn), lambda t: t.float()),
    "float8 and back": (lambda t: (t.dtype, t.to(torch.float8_e5m2)), lambda kept: kept[1].float().to(kept[0])),
    "nothing": (torch.zeros_like, lambda t: t),
}


def integers(model: nn.Module) -> nn.Module:
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randint(-2, 3, tensor.shape))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(3)
            module.eps = 1.0
    return model.requires_grad_(False).eval()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.5),
    "prelu": lambda: nn.PReLU(4),
    "threshold": lambda: nn.Threshold(1, 2),
    "hardtanh": nn.Hardtanh,
    "dropout": lambda: nn.Dropout(0.5),
    "max_pool2d": lambda: nn.MaxPool2d(2),
    "max_pool2d of a large window": lambda: nn.MaxPool2d(17, 1, 8),
}


def gradient(model: nn.Module, hooks: Hooks | None) -> Tensor:
    torch.manual_seed(3)
    x = torch.randint(-3, 4, (2, 4, 20, 18)).float().requires_grad_()
    if hooks is None:
        y = model(x)
    else:
        with saved_tensors_hooks(*hooks):
            y = model(x)
    (dx,) = torch.autograd.grad(y, x, torch.randint(-3, 4, y.shape).float())
    return dx


def net(way: str, layer: str = "relu") -> nn.Module:
    torch.manual_seed(0)
    made = LAYERS[layer]()
    model = integers(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), made, nn.Conv2d(4, 2, 1)))
    if isinstance(made, nn.Dropout):
        made.train()
    return {"converted": fk.convert, "fused": fk.fuse, "enabled": lambda m: m}[way](model)


@pytest.fixture(params=["converted", "enabled", "fused"])
def way(request: pytest.FixtureRequest) -> Any:
    if request.param == "enabled":
        with fk.enabled():
            yield request.param
    else:
        yield request.param


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_bits_come_through_casts(layer: str, cast: str, way: str) -> None:
    if way == "fused" and layer.startswith("max_pool"):
        pytest.skip("torch's own layer, which takes no indices of another dtype")
    model = net(way, layer)
    assert torch.equal(gradient(model, CASTS[cast]), gradient(model, None))


@pytest.mark.parametrize("cast", SHORT)
@pytest.mark.parametrize("layer", ["relu", "dropout", "max_pool2d of a large window"])
def test_spoilt_bits_are_an_error(layer: str, cast: str, way: str) -> None:
    if way == "fused" and layer != "relu":
        pytest.skip("torch's own layer")
    with pytest.raises(RuntimeError, match="saved-tensor hooks must give back the values that they were given"):
        gradient(net(way, layer), SHORT[cast])


def test_errors_say_what_came_back(way: str) -> None:
    cases = {"made one of size": lambda t: t[:-1], "they made one on meta": lambda t: t.to("meta")}
    for text, wrong in cases.items():
        hooks = (lambda t, wrong=wrong: wrong(t) if t.dtype is torch.uint8 else t, lambda t: t)
        with pytest.raises(RuntimeError, match=text):
            gradient(net(way), hooks)


def test_hooks_see_as_many_bytes_as_are_kept(way: str) -> None:
    seen: list[Tensor] = []
    gradient(net(way), (lambda t: seen.append(t) or t, lambda t: t))
    (bits,) = (t for t in seen if not t.is_floating_point())
    assert bits.dtype is torch.uint8
    assert bits.numel() == bits.untyped_storage().nbytes() == 2 * 4 * 18 * 16 // 8


def test_torch_s_hooks_see_what_is_kept(way: str) -> None:
    """They may give back other bits: a checkpoint that runs again draws anew where it was told not to care."""
    model, expected = net(way), gradient(net(way), None)
    with save_on_cpu():
        assert torch.equal(gradient(model, None), expected)
    drops = net(way, "dropout")
    x = torch.ones(2, 4, 20, 18, requires_grad=True)
    y = checkpoint(drops, x, use_reentrant=False, preserve_rng_state=False)
    y.sum().backward()


def test_compiled_autograd_reads_bytes(way: str) -> None:
    model, found = net(way), []
    for compiled in (False, True):
        x = torch.linspace(-2, 2, 2 * 4 * 20 * 18).view(2, 4, 20, 18).requires_grad_()
        with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            loss = model(x).sum()
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
        else:
            loss.backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_gradients_of_gradients() -> None:
    fused = fk.fuse(integers(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))))
    stock = fk.unfuse(copy.deepcopy(fused))
    found = []
    for model in (fused, stock):
        x = torch.randint(-3, 4, (1, 4, 6, 6), generator=torch.Generator().manual_seed(0)).float().requires_grad_()
        with saved_tensors_hooks(*CASTS["half"]):
            (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    assert torch.equal(*found)
