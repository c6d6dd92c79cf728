"""Convolutions of one and three dimensions and transposed ones: torch's results; a frozen weight keeps no input."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck

import freezekit as fk
from freezekit import nn as layers
from tests.observe import Calls, bytes_kept

CASES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("Conv1d", {"kernel_size": 3, "padding": 1}, (2, 4, 9)),
    ("Conv1d", {"kernel_size": 4, "padding": "same", "dilation": 3}, (2, 4, 12)),
    ("Conv1d", {"kernel_size": 3, "padding": "valid", "stride": 2, "groups": 2}, (2, 4, 10)),
    ("Conv1d", {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}, (2, 4, 9)),
    ("Conv1d", {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}, (2, 4, 9)),
    ("Conv3d", {"kernel_size": (1, 2, 3), "stride": (2, 1, 2), "padding": (0, 1, 1)}, (2, 4, 5, 6, 7)),
    ("Conv3d", {"kernel_size": 3, "groups": 4, "dilation": (1, 2, 1), "bias": False}, (2, 4, 5, 6, 7)),
    ("Conv3d", {"kernel_size": 2, "padding": 1, "padding_mode": "replicate"}, (2, 4, 4, 4, 4)),
    ("ConvTranspose1d", {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}, (2, 4, 9)),
    ("ConvTranspose1d", {"kernel_size": 2, "dilation": 4, "output_padding": 3, "stride": 2}, (2, 4, 6)),
    ("ConvTranspose2d", {"kernel_size": (3, 2), "stride": (2, 3), "groups": 2}, (2, 4, 5, 6)),
    ("ConvTranspose2d", {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False}, (2, 4, 5, 6)),
    ("ConvTranspose3d", {"kernel_size": 3, "stride": 2, "output_padding": 1}, (1, 4, 3, 4, 3)),
    ("Conv2d", {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}, (2, 4, 6, 7)),
    ("Conv2d", {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate"}, (2, 4, 6, 7)),
]
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]
STATES = list(itertools.product([False, True], repeat=3))  # weight learns, bias learns, input needs grad


def pair(case: tuple[str, dict[str, Any], tuple[int, ...]]) -> tuple[nn.Module, nn.Module, Tensor]:
    name, settings, size = case
    ours = getattr(layers, f"Freezable{name}")(4, 8, **settings)
    return ours, fk.conversion.revert(copy.deepcopy(ours)), torch.randn(size)


def set_state(layer: nn.Module, state: tuple[bool, bool, bool]) -> None:
    layer.weight.requires_grad_(state[0])
    if layer.bias is not None:
        layer.bias.requires_grad_(state[1])


def step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    y = layer(x)
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *(grad(y, wanted, g) if wanted else ())]


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_values_and_gradients_are_torch_s(case: Any, state: tuple[bool, bool, bool]) -> None:
    ours, stock, x = pair(case)
    set_state(ours, state)
    set_state(stock, state)
    x.requires_grad_(state[2])
    for a, b in zip(step(ours, x), step(stock, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    unbatched = x.detach()[0]
    torch.testing.assert_close(ours(unbatched), stock(unbatched))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_what_is_kept_and_run(case: Any) -> None:
    ours, _, x = pair(case)
    pads = case[1].get("padding_mode") is not None or case[1].get("padding") == "same"
    for state in STATES[1::2] if pads else STATES:
        set_state(ours, state)
        t = x.detach().requires_grad_(state[2])
        kept = bytes_kept(ours, t)
        if not state[0]:
            assert kept == 0, state
        elif not pads:
            assert kept == t.numel() * 4
        if not any(state[: 1 if ours.bias is None else 2]) and not state[2]:
            continue
        y = ours(t)
        with Calls() as calls:
            y.sum().backward()
        assert calls.count["aten::convolution_backward"] + calls.gradients[1] == state[0]
        assert calls.count["aten::convolution"] + calls.gradients[0] == state[2]
        ours.zero_grad()


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[8], CASES[9], CASES[10], CASES[13]], ids=str)
def test_derivatives_of_every_order(case: Any) -> None:
    ours, _, x = pair(case)
    ours, x = ours.double(), x.double().requires_grad_()

    def f(t: Tensor, *parameters: Tensor) -> Tensor:
        return ours(t)

    assert gradcheck(f, (x, *ours.parameters()), fast_mode=True)
    assert gradgradcheck(f, (x, *ours.parameters()), fast_mode=True)


@pytest.mark.parametrize("case", [CASES[0], CASES[8], CASES[10]], ids=str)
def test_half_types_autocast_and_zero_batch(case: Any) -> None:
    ours, stock, x = pair(case)
    for a, b in zip(step(ours.bfloat16(), x.bfloat16()), step(stock.bfloat16(), x.bfloat16()), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=0.05)
    ours, stock = ours.float(), stock.float()
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), stock(x)
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=2**-6, atol=0.05)
    empty = x[:0].requires_grad_()
    assert [t.shape for t in step(ours, empty)] == [t.shape for t in step(stock, empty)]


def test_output_size_and_errors_are_torch_s() -> None:
    ours, stock, x = pair(CASES[8])
    assert ours(x, output_size=[17]).shape == stock(x, output_size=[17]).shape
    bad: list[tuple[nn.Module, Tensor]] = [
        (ours, torch.ones(2, 3, 9)),
        (pair(CASES[0])[0], torch.ones(4)),
        (pair(CASES[6])[0], torch.ones(1, 4, 1, 1, 1)),
    ]
    for layer, t in bad:
        with pytest.raises(RuntimeError) as e:
            layer(t)
        with pytest.raises(RuntimeError) as expected:
            fk.conversion.revert(copy.deepcopy(layer))(t)
        assert str(e.value)[:40] == str(expected.value)[:40]


def test_complex_and_transforms() -> None:
    ours, stock, x = pair(CASES[0])
    z = torch.complex(x, x)
    weight = torch.complex(ours.weight, ours.weight)
    assert torch.equal(fk.functional.conv1d(z, weight), torch.nn.functional.conv1d(z, weight))
    for f in (
        lambda n: torch.func.vmap(n)(x),
        lambda n: torch.func.grad(lambda v: n(v).sum())(x),
        lambda n: torch.func.jvp(n, (x,), (x,))[1],
    ):
        torch.testing.assert_close(f(ours), f(stock))


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed: bool) -> None:
    x, w, b = torch.randn(2, 4, 9), torch.randn(4, 4, 3), torch.randn(4)
    for learns in (False, True):
        arguments = (
            x.requires_grad_(),
            w.requires_grad_(learns),
            b.requires_grad_(learns),
            [2],
            [1],
            [1],
            transposed,
            [0],
            1,
        )
        torch.library.opcheck(torch.ops.freezekit.convolution, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Conv3d", "ConvTranspose2d", "ConvTranspose3d"])
def test_gradients_have_torch_s_strides(name: str, dtype: torch.dtype) -> None:
    """Whatever learns. Torch copies a weight's gradient that is laid out unlike the weight before it stores it."""
    axes = int(name[-2])
    formats = [torch.contiguous_format, torch.channels_last if axes == 2 else torch.channels_last_3d]
    wrong = []
    for c, k, kernel, side, depthwise in itertools.product((1, 4), (1, 4), (1, 3), (3, 5), (False, True)):
        if depthwise and k % c:
            continue
        stock = getattr(nn, name)(c, k, kernel, groups=c if depthwise else 1).to(dtype)
        values = torch.randn(2, c, *[side] * axes, dtype=dtype)
        for of_weight, of_x, learns in itertools.product(formats, formats, ("weight", "x", "both")):
            stock = stock.to(memory_format=of_weight).requires_grad_(learns != "x")
            found = []
            for model in (stock, fk.convert(copy.deepcopy(stock))):
                x = values.clone(memory_format=of_x).requires_grad_(learns != "weight")
                y = model(x)
                found.append([t.stride() for t in grad(y.sum(), [t for t in (x, model.weight) if t.requires_grad])])
            if found[0] != found[1]:
                wrong.append((c, k, kernel, side, depthwise, of_weight, of_x, learns, *found))
    assert not wrong, f"{len(wrong)} differ, among them {wrong[:: max(1, len(wrong) // 5)]}"
