"""A first call in every way that a program may make it: what the proof does inside is seen by nobody."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from freezekit.functional import conv2d, relu
from tests.proof.stand_in import FASTER, launched, leaf, stand_in
from tests.proof.test_layers import LAYERS, step


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    with stand_in(FASTER):
        yield


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.3), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)]
    return nn.Sequential(*layers, nn.Hardtanh(-0.5, 0.5))


def gradients(net: nn.Module, x: Tensor, reentrant: bool | None = None) -> list[Tensor]:
    torch.manual_seed(1)
    y = net(x) if reentrant is None else checkpoint(net, x, use_reentrant=reentrant)
    y.sum().backward()
    leaves = [x, *net.parameters()]
    found = [t.grad for t in leaves if t.grad is not None]
    for t in leaves:
        t.grad = None
    assert len(found) == len(leaves)
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_keeps_and_makes_again_the_same(reentrant: bool) -> None:
    stock = network()
    net, x = fk.convert(copy.deepcopy(stock)), leaf(2, 4, 8, 8)
    expected = gradients(stock, x)
    for _ in range(2):
        for found, wanted in zip(gradients(net, x, reentrant), expected):
            torch.testing.assert_close(found, wanted)
    assert len(fk.tuning.choices()) == 9
    assert {choice.backend for choice in fk.tuning.choices()} == {"native"}


def test_hooks_on_saved_tensors_meet_those_of_the_call_alone() -> None:
    net, x = fk.convert(network()), leaf(2, 4, 8, 8)
    seen = []
    for _ in range(2):
        kept: list[tuple[torch.dtype, int]] = []

        def pack(tensor: Tensor, kept: list[tuple[torch.dtype, int]] = kept) -> Tensor:
            kept.append((tensor.dtype, tensor.numel()))
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            net(x).sum().backward()
        seen.append(kept)
    assert seen[0] == seen[1]
    fk.tuning.clear_choices()
    with save_on_cpu():
        net(x).sum().backward()


@pytest.mark.parametrize("grad_mode", [torch.inference_mode, torch.no_grad])
def test_a_convolution_may_be_met_where_no_gradient_is_recorded(grad_mode: type[torch.no_grad]) -> None:
    w = torch.randn(8, 4, 3, 3)
    with grad_mode():
        x = torch.randn(2, 4, 7, 7)
        y = conv2d(x, w)
        torch.testing.assert_close(y, F.conv2d(x, w))
        assert y.is_inference() == x.is_inference()
    assert [choice.backend for choice in fk.tuning.choices()] == ["native"]
    x = leaf(2, 4, 7, 7)
    y = conv2d(x, w)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(F.conv2d(x, w).sum(), x))


def test_under_autocast_the_dtype_that_is_computed_in_is_decided() -> None:
    net, x = fk.convert(network()), leaf(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert len(fk.tuning.choices()) == 9
    assert all("BFloat16" in choice.problem for choice in fk.tuning.choices())


def test_a_compiled_convolution_is_decided_when_it_runs() -> None:
    net, x = fk.convert(nn.Conv2d(4, 8, 3, padding=1)), leaf(2, 4, 8, 8)
    expected = F.conv2d(x, net.weight, net.bias, padding=1).detach()
    compiled = torch.compile(net, backend="aot_eager")
    for found in ([], ["native"] * 3):
        assert [choice.backend for choice in fk.tuning.choices()] == found
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
    assert len(launched(lambda: compiled(x).sum().backward())) == 3


@pytest.mark.parametrize("name", LAYERS)
def test_of_nothing_nothing_is_decided(name: str) -> None:
    _, own, stock, _ = LAYERS[name]
    x = torch.randn(0, 4, 6, 6)
    torch.testing.assert_close(step(own, x), step(stock, x))
    assert fk.tuning.choices() == []


def test_a_convolution_of_no_images() -> None:
    x, w = leaf(0, 4, 6, 6), leaf(5, 4, 3, 3)
    expected = F.conv2d(x, w)
    for _ in range(2):
        y = conv2d(x, w)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), (x, w)), torch.autograd.grad(F.conv2d(x, w).sum(), (x, w))
        )


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "leaky_relu", "dropout"])
def test_a_number_is_a_tensor(name: str) -> None:
    _, own, stock, kernels = LAYERS[name]
    x = torch.tensor(0.25)
    for _ in range(2):
        torch.testing.assert_close(step(own, x), step(stock, x), rtol=0, atol=0)
    assert launched(lambda: step(own, x)) == kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_was_decided_on_aligned_memory_holds_for_views(dtype: torch.dtype) -> None:
    """A class is one kernel's, whatever the addresses: none of them is refused later, and none is wrong."""

    def image(offset: int) -> Tensor:
        row = torch.arange(2 * 7 * 7 * 16 + offset).remainder(5).sub(2).to(dtype)[offset:]
        return row.view(2, 7, 7, 16).permute(0, 3, 1, 2)

    w = image(0)[:1].repeat(16, 1, 1, 1)[:, :, :3, :3].contiguous(memory_format=torch.channels_last)
    conv2d(image(0), w)
    for x in (image(1), image(3), image(0)[:, :, ::2], image(0)[:, :, :, 1:], image(0)[:1].expand(3, -1, -1, -1)):
        assert len(launched(lambda x=x: torch.testing.assert_close(conv2d(x, w), F.conv2d(x, w)))) >= 1
    assert {choice.backend for choice in fk.tuning.choices()} == {"native"}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_windows_of_minus_infinity_lead_their_gradient_to_the_first_place(
    dtype: torch.dtype, channels_last: bool
) -> None:
    _, own, stock, kernels = LAYERS["max_pool2d"]
    x = torch.full((2, 5, 7, 6), -float("inf"), dtype=dtype)
    x[:, 2] = 1
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for _ in range(2):
        torch.testing.assert_close(step(own, x), step(stock, x), rtol=0, atol=0)
    assert launched(lambda: step(own, x)) == kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "leaky_relu"])
def test_a_gradient_passes_where_torch_s_kernels_for_gpus_let_it(name: str, dtype: torch.dtype) -> None:
    """NaN passes ReLU and Hardtanh and meets LeakyReLU's slope; torch's vectors on a CPU stop some of them."""
    _, own, stock, kernels = LAYERS[name]
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -0.5, 0.25, 6.0, 7.0, 1e-30]
    x = torch.tensor(special * 3, dtype=dtype)
    passes = {"relu": x > 0, "relu6": (x > 0) & (x < 6), "hardtanh": (x > -0.5) & (x < 0.25), "leaky_relu": x > 0}[name]
    if name != "leaky_relu":
        passes = passes | x.isnan()
    slope = torch.tensor(0.2 if name == "leaky_relu" else 0.0).to(torch.promote_types(dtype, torch.float32))
    for _ in range(2):
        y, dx = step(own, x)
        torch.testing.assert_close(y, stock(x), rtol=0, atol=0, equal_nan=True)
        dy = torch.arange(x.numel()).remainder(5).to(dtype)
        torch.testing.assert_close(dx, torch.where(passes, dy, (dy * slope).to(dtype)), rtol=1e-3, atol=0)
    assert launched(lambda: step(own, x)) == kernels


@pytest.mark.parametrize(
    "settings", [([3, 3], [2, 2], [1, 1], [1, 1]), ([2, 2], [2, 2], [0, 0], [1, 1]), ([3, 3], [1, 2], [1, 1], [2, 3])]
)
def test_taps_are_right_where_torch_leaves_an_index_of_zero(settings: tuple[list[int], ...]) -> None:
    """As its kernel for NHWC on a GPU does for windows of minus infinity, in a step that is not proven."""
    x = torch.full((1, 2, 9, 8), -float("inf"))
    y, indices = F.max_pool2d(x, *settings, return_indices=True)
    with fk.testing.emulated():
        expected = torch.ops.freezekit.max_pool2d_taps(x, *settings, backend="emulated")[1]
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("max_pool2d_with_indices", lambda *_: (y, torch.zeros_like(indices)), "CPU")
        _, taps = torch.ops.freezekit.max_pool2d_taps(x, *settings)
    finally:
        library._destroy()
    assert torch.equal(taps, expected)
    assert fk.tuning.choices() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_block_in_nchw_is_decided_as_one_in_nhwc(residual: bool, activation: str, dtype: torch.dtype) -> None:
    """Kernels compute it; bits are in the order of the result either way, so a later call may be ATen's."""
    generator = torch.Generator().manual_seed(0)

    def integers(*size: int) -> Tensor:
        return torch.randint(-2, 3, size, generator=generator).to(dtype)

    x, w, r = integers(2, 8, 5, 7).requires_grad_(), integers(8, 8, 3, 3), integers(2, 8, 5, 7).requires_grad_()
    norm = {"running_mean": torch.ones(8), "running_var": torch.full((8,), 0.25), "norm_weight": torch.arange(8.0)}
    more = {"residual": r} if residual else {}

    def block(backend: str) -> tuple[Tensor, ...]:
        y = torch.ops.freezekit.frozen_conv2d(
            x, w, activation=activation, padding=[1], backend=backend, **norm, **more
        )[0]
        assert y.is_contiguous()
        return (y.detach(), *torch.autograd.grad(y, (x, r) if residual else x, dy))

    dy = integers(2, 8, 5, 7)
    relu(x)  # the bits' kernels
    expected = block("aten")
    for _ in range(2):
        torch.testing.assert_close(block("auto"), expected, rtol=0, atol=0)
    fprop = next(c for c in fk.tuning.choices() if c.problem.startswith("conv2d+frozen"))
    assert (fprop.backend, " contiguous " in fprop.problem) == ("native", True)
    ran = launched(lambda: block("auto"))
    assert len([kernel for kernel in ran if "fprop" in kernel or "dgrad" in kernel]) == 2
    # Its dgrad, with the bits of what is before it and behind it.
    bits = torch.ops.freezekit.activation_bits(x.detach(), "relu")[1]
    of_dy = torch.ops.freezekit.activation_bits(dy.clone(), "relu")[1]

    def dgrad(backend: str) -> Tensor:
        return torch.ops.freezekit.frozen_conv2d_dgrad(
            dy, w, x.size(), r.detach() if residual else None, bits, padding=[1], grad_mask=of_dy,
            running_var=norm["running_var"], norm_weight=norm["norm_weight"], backend=backend,
        )  # fmt: skip

    for _ in range(2):
        torch.testing.assert_close(dgrad("auto"), dgrad("aten"), rtol=0, atol=0)
    assert any("dgrad" in kernel for kernel in launched(lambda: dgrad("auto")))
