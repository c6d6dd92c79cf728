"""A checkpoint between whose passes something was switched: one keeps bits, the other what torch's formula reads.

Torch's own check says so. Where a caller has switched it off (determinism_check="none"), the backward pass is an error
or right, never a wrong gradient: a word of bits has the shape of a number, and torch's formulas broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from tests.proof.stand_in import decided, leaf, stand_in

LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "dropout": F.dropout,
    "max_pool2d": lambda x: F.max_pool2d(x, 1),
}
# Of one word of bits, and of as many words as the last axis is long.
LOUD = "checkpoint|Promotion|must match the size"
SIZES = [(1, 1, 1, 1), (1, 1, 2, 2), (1, 1, 32, 2), (2, 4, 4, 4), (2, 3, 5, 5)]


NOTHING = nullcontext()


class LooksOn(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def gradient(
    call: Callable[[], Tensor],
    x: Tensor,
    first: AbstractContextManager[Any] = NOTHING,
    second: AbstractContextManager[Any] = NOTHING,
) -> Tensor:
    """From passes within one context and another, of numbers that are always the same."""
    torch.manual_seed(1)
    with first:
        y = call()
    with second:
        return torch.autograd.grad(y, x, torch.arange(1.0, y.numel() + 1).view_as(y))[0]


@contextmanager
def determinism() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("check", ["none", "default"])
@pytest.mark.parametrize("first", [False, True], ids=["then determinism", "first determinism"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_switch_of_determinism_is_an_error_and_no_wrong_gradient(
    name: str, size: tuple[int, ...], first: bool, check: str
) -> None:
    layer, x = LAYERS[name], leaf(*size)

    def call() -> Tensor:
        return checkpoint(layer, x, use_reentrant=False, determinism_check=check)

    with stand_in(), fk.enabled():
        expected = gradient(lambda: layer(x), x)
        assert decided()
        torch.testing.assert_close(gradient(call, x), expected, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match=LOUD):
            gradient(call, x, *((determinism(), NOTHING) if first else (NOTHING, determinism())))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("on", [False, True], ids=["then enabled", "enabled first"])
@pytest.mark.parametrize("name", ["relu", "hardtanh", "leaky_relu"])
def test_so_is_a_switch_of_enable_on_any_device(name: str, on: bool, size: tuple[int, ...]) -> None:
    layer, x = LAYERS[name], leaf(*size)
    passes = (fk.enabled(), NOTHING) if on else (NOTHING, fk.enabled())
    with pytest.raises(RuntimeError, match=LOUD):
        gradient(lambda: checkpoint(layer, x, use_reentrant=False, determinism_check="none"), x, *passes)


def test_the_error_names_what_may_have_been_switched() -> None:
    x = leaf(3, 5)
    said = r"kept packed bits, as bytes of size \[4\], the second one Float of size \[3, 5\].* freezekit.enable\(\)"
    with pytest.raises(RuntimeError, match=said):
        gradient(lambda: checkpoint(F.relu, x, use_reentrant=False, determinism_check="none"), x, fk.enabled())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("forward", [False, True])
def test_a_mode_that_looks_on_in_one_pass_alone_changes_nothing_that_is_kept(forward: bool, backward: bool) -> None:
    """Such as one that counts the FLOPs of a forward pass."""
    net = fk.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2)))
    x = leaf(2, 3, 8, 8)
    expected = gradient(lambda: net(x), x)

    passes = (LooksOn() if looks else NOTHING for looks in (forward, backward))
    found = gradient(lambda: checkpoint(net, x, use_reentrant=False), x, *passes)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
