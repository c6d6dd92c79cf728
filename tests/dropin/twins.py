"""A freezekit net and its stock twin, and the comparison of what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import freezekit as fk


def net(kind: Callable[..., nn.Conv2d]) -> nn.Sequential:
    """Plain, string and reflected padding; groups, stride and dilation."""
    return nn.Sequential(
        kind(3, 4, 3, padding=1),
        nn.ReLU(),
        kind(4, 4, (2, 3), padding="same", groups=2),
        kind(4, 2, 3, padding=2, dilation=2, padding_mode="reflect", bias=False),
    )


def nets() -> tuple[nn.Sequential, nn.Sequential]:
    """(freezekit's, stock's), with the same parameters."""
    ours, stock = net(fk.FreezableConv2d), net(nn.Conv2d)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def kinds(way: str) -> Iterator[type[nn.Conv2d]]:
    """freezekit's layer and stock's, in turn: a class of its own, or stock's while freezekit is enabled."""
    if way == "converted":
        yield fk.FreezableConv2d
    else:
        with fk.enabled():
            yield nn.Conv2d
    yield nn.Conv2d


def turns(way: str) -> Iterator[nn.Sequential]:
    """The nets of `nets()`, in turn; "enabled" runs stock's twice, the first time with freezekit enabled."""
    stock = net(nn.Conv2d).state_dict()
    for kind in kinds(way):
        made = net(kind)
        made.load_state_dict(stock)
        yield made


def gradients(call: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module | None = None) -> dict[str, Tensor | None]:
    """Output, and gradients of its squares' sum with respect to input and parameters (of `module`, else of `call`)."""
    module = module if module is not None else call
    assert isinstance(module, nn.Module)
    module.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    y = call(leaf)
    y.float().square().sum().backward()
    return {"y": y, "x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}


def assert_same(ours: dict[str, Any], stock: dict[str, Any], **tolerance: float) -> None:
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            assert ours[name] is not None, name
            torch.testing.assert_close(ours[name], expected, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
