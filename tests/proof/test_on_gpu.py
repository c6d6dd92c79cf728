"""What `auto` decides on a GPU: every kernel agrees with torch's operator, and depthwise gradients are stock's."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import freezekit as fk
from freezekit.functional import conv2d
from tests.proof.test_cancelling import CANCELS, DTYPES, SIZES, Cancel, convolution, tensors
from tests.proof.test_layers import LAYERS, step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_proof_agrees(dtype: torch.dtype, channels_last: bool) -> None:
    fk.tuning.clear_choices()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(4, 32, 28, 28, device="cuda", dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    for _, own, _, _ in LAYERS.values():
        step(own, x)
    for groups, stride in ((1, 1), (1, 2), (32, 1), (4, 1)):
        w = torch.randn(32, 32 // groups, 3, 3, device="cuda", dtype=dtype, requires_grad=True)
        conv2d(x, w, stride=stride, padding=1, groups=groups).sum().backward()
    assert [str(choice) for choice in fk.tuning.choices() if not choice.agree] == []
    fk.tuning.clear_choices()


@pytest.mark.parametrize("channels_last", [False, True])
@CANCELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_that_cancel_accuse_no_kernel(
    size: tuple[int, ...], dtype: torch.dtype, cancel: Cancel, channels_last: bool
) -> None:
    fk.tuning.clear_choices()
    given = tensors(size, cancel, dtype, channels_last)
    convolution(*(t.detach().cuda().requires_grad_(t.requires_grad) for t in given))
    assert [str(choice) for choice in fk.tuning.choices() if not choice.agree] == []
    fk.tuning.clear_choices()


def test_where_no_wait_is_allowed_nothing_is_decided() -> None:
    fk.tuning.clear_choices()
    x = torch.randn(4, 8, 9, 9, device="cuda", requires_grad=True)
    w, dy = torch.randn(8, 8, 3, 3, device="cuda"), torch.ones(4, 8, 7, 7, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(fk.functional.relu(conv2d(x, w)), x, dy)
        assert fk.tuning.choices() == []
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.autograd.grad(fk.functional.relu(conv2d(x, w)), x, dy)
    assert [choice.problem.split()[0] for choice in fk.tuning.choices()] == ["activation", "conv2d", "conv2d_dgrad"]
    fk.tuning.clear_choices()


def test_a_proof_ends_no_capture_of_another_thread() -> None:
    fk.tuning.clear_choices()
    x, read = torch.randn(64, device="cuda", requires_grad=True), torch.randn(64, device="cuda")
    prove = threading.Thread(target=fk.functional.relu, args=(x,))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prove.start(), prove.join()
        doubled = read * 2
    graph.replay()
    assert torch.equal(doubled, read * 2)
    assert [choice.agree for choice in fk.tuning.choices()] == [True]
    fk.tuning.clear_choices()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_depthwise_gradient_is_by_the_kernel_that_stock_runs(dims: int) -> None:
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    x = torch.randn(2, 32, *[16] * dims, device="cuda", requires_grad=True)
    w = torch.randn(32, 1, *[3] * dims, device="cuda")
    dy = torch.randn_like(convolve(x, w, padding=1, groups=32))

    def kernels() -> list[str]:
        y = convolve(x, w, padding=1, groups=32)
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            torch.autograd.grad(y, x, dy)
            torch.cuda.synchronize()
        return [event.name for event in recorded.events() if "conv" in event.name.lower()]

    stock = kernels()
    with fk.backend("aten"), fk.enabled():
        assert kernels() == stock


@pytest.mark.parametrize("switch", [fk.convert, lambda net: net], ids=["convert", "enabled"])
@pytest.mark.parametrize(("make", "dims"), [(nn.PReLU, 2), (lambda: nn.MaxPool3d(2), 3)], ids=["prelu", "max_pool3d"])
def test_what_has_no_kernel_keeps_torch_s_own_gradient(
    make: Callable[[], nn.Module], dims: int, switch: Callable[[nn.Module], nn.Module]
) -> None:
    x = torch.randn(2, 4, *[6] * dims, device="cuda", requires_grad=True)
    stock = make().cuda().requires_grad_(False)
    own = switch(copy.deepcopy(stock))
    expected = stock(x).grad_fn.name()
    assert own(x).grad_fn.name() == expected
    with fk.enabled():
        assert own(x).grad_fn.name() == expected


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_blocks_are_their_layers(dtype: torch.dtype, channels_last: bool) -> None:
    """By ATen's operators at first, then by whatever was decided; all sums are exact."""
    fk.tuning.clear_choices()
    check_blocks("cuda", dtype, torch.channels_last if channels_last else torch.contiguous_format)
    assert [str(choice) for choice in fk.tuning.choices() if not choice.agree] == []
    fk.tuning.clear_choices()


def check_blocks(device: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)

    def integers(*size: int, end: int = 2) -> torch.Tensor:
        return torch.randint(1 - end, end, size, generator=generator).to(dtype)

    layers = []
    for activation in (nn.ReLU(), nn.ReLU6(), nn.ReLU()):
        convolution, norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=0.0)
        convolution.weight.data = integers(8, 8, 3, 3)
        norm.running_var = torch.full((8,), 16.0)
        layers += [convolution, norm, activation]
    stock = nn.Sequential(*layers).eval().requires_grad_(False).to(device, dtype, memory_format=layout)  # type: ignore[call-overload]
    fused = fk.fuse(copy.deepcopy(stock))
    x, dy = (integers(4, 8, 6, 6, end=3).to(device, memory_format=layout) for _ in range(2))

    def step(net: nn.Module) -> tuple[torch.Tensor, ...]:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = net(leaf)
        return y.detach(), *torch.autograd.grad(y, leaf, dy)

    expected = step(stock)
    for _ in range(3):
        torch.testing.assert_close(step(fused), expected)
