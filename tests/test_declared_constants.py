"""What declares a tensor constant, how long it stays so, and who does not become so with it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from freezekit import constants
from tests.test_constants import EDITS, casts, expected, frozen_conv, run

STAYS: dict[str, Callable[[nn.Module], object]] = {
    name: EDITS[name]
    for name in (".data =", ".data = twice", ".to(float64)", "channels_last", "copy_", "load_state_dict")
}


@pytest.mark.parametrize("edit", STAYS.values(), ids=STAYS)
def test_a_declared_weight_stays_declared_and_is_cast_once_more(edit: Callable[[nn.Module], object]) -> None:
    conv = frozen_conv()
    run(conv)
    with torch.no_grad():
        edit(conv)
    assert constants.is_constant(conv.weight)
    assert casts(conv) >= 1
    assert casts(conv) == 0


def test_aliases_are_not_declared() -> None:
    weight = frozen_conv().weight
    for alias in (weight.detach(), weight.data, weight[:], weight.view(-1), copy.copy(weight)):
        assert not constants.is_constant(alias)


def test_a_declared_weight_that_learns_all_the_same_has_hooks_as_any() -> None:
    conv = frozen_conv()
    run(conv)
    conv.weight.requires_grad_(True)
    seen = []
    x = torch.ones(1, 4, 8, 8)
    before = torch.autograd.grad(conv(x).sum(), conv.weight)[0]
    handle = conv.weight.register_hook(lambda grad: seen.append(1) or 2 * grad)
    conv(x).sum().backward()
    assert torch.equal(conv.weight.grad, 2 * before)
    assert seen == [1]
    handle.remove()


def test_compiled_autograd_takes_a_declared_weight_that_learns_all_the_same() -> None:
    conv = frozen_conv()
    conv.weight.requires_grad_(True)
    x = torch.ones(1, 4, 8, 8)
    expected = torch.autograd.grad(conv(x).sum(), conv.weight)[0]
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        conv(x).sum().backward()
    assert torch.equal(conv.weight.grad, expected)


def test_declaring_a_trainable_or_inference_tensor_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="requires grad"):
        constants.declare_constant(nn.Parameter(torch.ones(1)))
    with torch.inference_mode():
        tensor = torch.ones(1)
    with pytest.raises(RuntimeError, match="inference tensor"):
        constants.declare_constant(tensor)


def test_withdrawing_ends_it() -> None:
    conv = frozen_conv()
    run(conv)
    constants.withdraw_constant(conv.weight)
    assert not constants.is_constant(conv.weight)
    conv.weight.data.mul_(2)
    assert torch.equal(run(conv), expected(conv))
