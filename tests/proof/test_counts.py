"""Launches and bytes of the layers under `auto` on a GPU, counted on a CPU: before a proof, and after.

Before, a layer with kernels is torch's own operator, which is what stock runs. After, it is never above stock's bytes
by more than its mask, which is written once and read once. Layers without kernels run torch's operators at all times:
they are counted on the meta device, where they take the path that they take on a GPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import freezekit as fk
from bench.layer_lists import layers_of
from freezekit import _C
from tests.proof.stand_in import launches, stand_in
from tests.proof.test_layers import LAYERS, step

aten = torch.ops.aten
POOL = [3, 3], [2, 2], [1, 1]

# What stock launches on a GPU: forward of x, backward of dy, x and what forward gave.
STOCK: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "relu": (aten.relu, lambda dy, x, y: aten.threshold_backward(dy, y, 0)),
    "relu6": (lambda x: aten.hardtanh(x, 0, 6), lambda dy, x, y: aten.hardtanh_backward(dy, x, 0, 6)),
    "relu_": (lambda x: aten.relu_(x.clone()), lambda dy, x, y: aten.threshold_backward(dy, y, 0)),
    "hardtanh": (
        lambda x: aten.hardtanh(x, -0.5, 0.25),
        lambda dy, x, y: aten.hardtanh_backward(dy, x, -0.5, 0.25),
    ),
    "leaky_relu": (lambda x: aten.leaky_relu(x, 0.2), lambda dy, x, y: aten.leaky_relu_backward(dy, x, 0.2, False)),
    "dropout": (
        lambda x: aten.native_dropout(x, 0.5, True),
        lambda dy, x, y: aten.native_dropout_backward(dy, y[1], 2.0),
    ),
    "max_pool2d": (
        lambda x: aten.max_pool2d_with_indices(x, *POOL),
        lambda dy, x, y: aten.max_pool2d_with_indices_backward(dy, x, *POOL, [1, 1], False, y[1]),
    ),
}


class Traffic(TorchDispatchMode):
    """What operators are called, and the bytes of the tensors that each reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.convolution_backward.default:
            # Two kernels. dgrad is given an input, and wgrad a weight, for their sizes alone.
            dy, read, gradients, mask = args[0], (args[2], args[1]), result[:2], args[-1][:2]
            for name, wanted, other, made in zip(("conv::dgrad", "conv::wgrad"), mask, read, gradients):
                if wanted:
                    self.calls.append((name, dy.nbytes + other.nbytes + made.nbytes))
            return result
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        self.calls.append((func.name(), sum(t.nbytes for t in tensors)))
        return result


def x_of(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 4, 64, 64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_before_it_is_proven_a_layer_runs_what_stock_runs(name: str, dtype: torch.dtype) -> None:
    _, own, stock, _ = LAYERS[name]
    x = x_of(dtype)
    traffic = []
    for layer in (stock, own):
        with stand_in(), Traffic() as seen:
            step(layer, x)
        traffic.append(seen.calls)
    assert traffic[0] == traffic[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STOCK)
def test_once_proven_it_moves_no_more_than_stock_and_its_mask(name: str, dtype: torch.dtype) -> None:
    x = x_of(dtype).detach()
    forward, backward = STOCK[name]
    with Traffic() as stock:
        made = forward(x)
        y = made[0] if isinstance(made, tuple) else made
        dy = torch.ones_like(y)
        backward(dy, x, made)
    calls = [call for call in stock.calls if not call[0].startswith(("aten::ones_like", "aten::clone"))]
    assert len(calls) == 2

    proving = log_of(LAYERS[name][1], x, steps=1)
    if name == "dropout":
        # The mask of bytes is torch's own on a GPU; only the proof meets the kernel that packs it on a CPU.
        own = [calls[0], *(row for row in proving if row[0] in ("pack_bytes", "gate_scale"))][:3]
        assert [kernel for kernel, _ in own[1:]] == ["pack_bytes", "gate_scale"]
    else:
        own = log_of(LAYERS[name][1], x, steps=2)[-2:]
        assert [kernel for kernel, _ in own] == LAYERS[name][3]
    mask = (y.numel() if name == "max_pool2d" else y.numel() // 8) * 2  # taps or bits, written and read
    assert sum(moved for _, moved in own) <= sum(moved for _, moved in calls) + mask
    if name != "dropout":
        assert sum(moved for _, moved in own) < sum(moved for _, moved in calls)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_pool_that_is_asked_for_indices_runs_what_stock_runs(enabled: bool) -> None:
    """Always: from taps they would be made in a dozen passes of eight bytes per element."""
    x = x_of(torch.float32)

    def pool(function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x, 3, 2, 1, return_indices=True)[0]

    def operators(layer: Callable[[Tensor], Tensor]) -> list[str]:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            step(layer, x)
        return [event.name for event in recorded.events() if event.name.startswith("aten::")]

    stock = operators(pool(F.max_pool2d))
    with stand_in():
        step(LAYERS["max_pool2d"][1], x)
        with fk.enabled() if enabled else nullcontext(), launches() as kernels:
            own = operators(pool(F.max_pool2d if enabled else fk.functional.max_pool2d))
    assert kernels == []
    assert own == stock


# Without kernels of freezekit's on a GPU: how to make the layer, and the size of its input.
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1), (2, 8, 12)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 6, 7)),
    "depthwise conv1d": (lambda: nn.Conv1d(8, 8, 3, padding=1, groups=8), (2, 8, 12)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(8, 6, 3), (2, 8, 12)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), (2, 8, 5, 6)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 6, 3, stride=2), (2, 4, 5, 6, 7)),
    "batch_norm": (lambda: nn.BatchNorm2d(8).eval(), (2, 8, 5, 6)),
    "layer_norm": (lambda: nn.LayerNorm(8), (2, 6, 8)),
    "group_norm": (lambda: nn.GroupNorm(2, 8), (2, 8, 5, 6)),
    "instance_norm": (lambda: nn.InstanceNorm2d(8, affine=True), (2, 8, 5, 6)),
    "reflection_pad1d": (lambda: nn.ReflectionPad1d(2), (2, 8, 12)),
    "reflection_pad2d": (lambda: nn.ReflectionPad2d(1), (2, 8, 5, 6)),
    "replication_pad2d": (lambda: nn.ReplicationPad2d(1), (2, 8, 5, 6)),
    "replication_pad3d": (lambda: nn.ReplicationPad3d(1), (2, 4, 5, 6, 7)),
    "avg_pool1d": (lambda: nn.AvgPool1d(2), (2, 8, 12)),
    "avg_pool2d": (lambda: nn.AvgPool2d(2), (2, 8, 5, 6)),
    "avg_pool3d": (lambda: nn.AvgPool3d(2), (2, 4, 5, 6, 7)),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d(3), (2, 8, 5, 6)),
    "adaptive_avg_pool3d": (lambda: nn.AdaptiveAvgPool3d(2), (2, 4, 5, 6, 7)),
    "linear": (lambda: nn.Linear(8, 5), (2, 6, 8)),
}
# Operators that launch nothing.
FREE = ("empty", "new_empty", "view", "expand", "detach", "squeeze", "unsqueeze", "t", "transpose", "permute", "alias")


def passes(layer: nn.Module, x: Tensor) -> tuple[list[int], int]:
    """The bytes of each operator of a step that reads or writes an activation; those of all operators."""
    with Traffic() as seen:
        y = layer(x)
        dy = torch.empty_like(y)
        torch.autograd.grad(y, x, dy)
    moved = [count for name, count in seen.calls if name.split("::")[1].split(".")[0].removesuffix("_like") not in FREE]
    return [count for count in moved if count >= min(x.nbytes, dy.nbytes)], sum(moved)


@pytest.mark.parametrize("way", ["convert", "enabled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_layers_without_kernels_move_no_more_than_stock(name: str, dtype: torch.dtype, way: str) -> None:
    make, size = OTHERS[name]
    stock, own = (make().to("meta", dtype).requires_grad_(False) for _ in range(2))
    x = torch.empty(size, device="meta", dtype=dtype, requires_grad=True)
    if way == "convert":
        (many, most), (passes_of_own, moved) = passes(stock, x), passes(fk.convert(own), x)
    else:
        many, most = passes(stock, x)
        with fk.enabled():
            passes_of_own, moved = passes(own, x)
    assert len(passes_of_own) <= len(many)
    assert moved <= most


def convolution_of(
    dtype: torch.dtype, channels_last: bool, frozen: bool, learns: bool
) -> tuple[Tensor, nn.Module, nn.Module]:
    """An input, torch's layer and freezekit's."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 16, 10, 10).to(dtype).contiguous(memory_format=layout).requires_grad_(learns)
    stock = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False).to(dtype=dtype, memory_format=layout)
    return x, stock.requires_grad_(not frozen), fk.convert(copy.deepcopy(stock))


def whole_step(layer: nn.Module, x: Tensor) -> None:
    y = layer(x)
    torch.autograd.grad(y, [t for t in (x, layer.weight) if t.requires_grad], torch.ones_like(y))


def by_stock(layer: nn.Module, x: Tensor) -> list[tuple[str, int]]:
    """What is launched in a step, and the bytes of it."""
    with Traffic() as seen:
        whole_step(layer, x)
    # The same in freezekit's words: an operator of its own reads and writes what it is called with.
    words = {"aten::convolution": "conv2d", "conv::dgrad": "conv2d_dgrad", "conv::wgrad": "conv2d_wgrad"}
    calls = [(words.get(name, name.removeprefix("freezekit::")), moved) for name, moved in seen.calls]
    return [
        call for call in calls if call[0].split("::")[-1].split(".")[0].removesuffix("_like") not in (*FREE, "ones")
    ]


WHO_LEARNS = pytest.mark.parametrize(("frozen", "learns"), [(False, True), (True, True), (False, False)])


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@WHO_LEARNS
def test_before_it_is_proven_a_convolution_runs_what_stock_runs(
    dtype: torch.dtype, channels_last: bool, frozen: bool, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, stock, own = convolution_of(dtype, channels_last, frozen, learns)
    expected = by_stock(stock, x)
    backward = [*(["conv2d_dgrad"] * learns), *(["conv2d_wgrad"] * (not frozen))]
    assert [name for name, _ in expected] == ["conv2d", *backward]
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # nothing is measured
    ran = []
    with stand_in():
        assert by_stock(own, x) == expected
        for layer in (stock, own):
            with profile(activities=[ProfilerActivity.CPU]) as recorded, launches() as kernels:
                whole_step(layer, x)
            assert kernels == []
            ran.append([event.name for event in recorded.events()])
    assert ran[1].count("aten::convolution") == 1
    assert ran[1].count("aten::convolution_backward") == len(backward)
    for name in ("aten::copy_", "aten::fill_", "aten::zero_"):  # those of ATen's convolutions on a CPU
        assert ran[1].count(name) <= ran[0].count(name) * max(1, len(backward))


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@WHO_LEARNS
def test_once_proven_a_convolution_adds_the_conversions_of_nchw_and_nothing_else(
    dtype: torch.dtype, channels_last: bool, frozen: bool, learns: bool
) -> None:
    """One kernel for each of stock's, which reads and writes what that does; in NCHW each tensor is turned once."""
    x, stock, own = convolution_of(dtype, channels_last, frozen, learns)
    expected = by_stock(stock, x)
    with stand_in():
        whole_step(own, x)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded, launches() as kernels:
            whole_step(own, x)
    assert len(kernels) == len(expected)
    copies = [event.input_shapes[0] for event in recorded.events() if event.name == "aten::copy_"]
    turned = sum(2 * x.element_size() * math.prod(size) for size in copies)
    assert turned == (0 if channels_last else 2 * sum(moved for _, moved in expected))
    assert len(copies) == (0 if channels_last else 3 * len(expected))


def operators_of(call: Callable[[], Any]) -> int:
    """How many of ATen's operators run in a call that launch something on a GPU; those that others are made of."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    free = (*FREE, "narrow", "slice", "select", "as_strided", "contiguous", "result_type", "item", "to")

    def is_launch(event: Any) -> bool:
        name = event.name.removeprefix("aten::")
        return name != event.name and name not in free and not name.startswith(("empty", "resize", "_reshape_alias"))

    return sum(is_launch(e) and not any(map(is_launch, e.cpu_children)) for e in recorded.events())


def test_the_proofs_of_a_resnet_step_stay_far_below_two_seconds() -> None:
    """At some 5 us of the host for each launch; what is compared is counted here, whatever is launched to make it."""

    def first_call(images: int) -> int:
        x, w = torch.randn(images, 2, 128, 128), torch.randn(8, 2, 1, 1)
        with stand_in():
            return operators_of(lambda: fk.functional.conv2d(x, w))

    piece = 1 << 20  # elements that are compared at once
    one, three = first_call(8), first_call(24)
    per_piece = (three - one) // 2 + 1  # bfloat16 becomes float32 first
    assert per_piece <= 12
    assert one <= 120
    largest: dict[str, int] = {}
    for layer in layers_of("resnet50"):
        x = (128, layer.in_channels, layer.size, layer.size)
        w = (layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
        y = (128, layer.out_channels, layer.output_size, layer.output_size)
        for operator, result in (("conv2d", y), ("conv2d_dgrad", x), ("conv2d_wgrad", w)):
            geometry = ((layer.stride,) * 2, (layer.padding,) * 2)
            of = _C.select(operator, "bfloat16", x, w, *geometry, channels_last=True)["class"]
            largest[of] = max(largest.get(of, 0), math.prod(result))
    assert len(largest) <= 30
    launched = sum(one + per_piece * (size // piece) for size in largest.values())
    for name in ("relu", "max_pool2d"):
        with stand_in():
            launched += operators_of(lambda own=LAYERS[name][1]: step(own, x_of(torch.bfloat16)))
    assert launched * 5e-6 < 0.1, "seconds; docs/hardware.md says so"


def block_of(
    dtype: torch.dtype, residual: bool, layout: torch.memory_format = torch.channels_last
) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A frozen convolution, its norm, a residual, ReLU: an input, freezekit's one operator, torch's layers."""
    x = torch.randn(2, 16, 20, 20).to(dtype).contiguous(memory_format=layout).requires_grad_()
    w = torch.ones(16, 16, 3, 3, dtype=dtype).contiguous(memory_format=layout)
    names = ("running_mean", "running_var", "norm_weight", "norm_bias")
    vectors = {name: torch.ones(16) for name in names}

    def own(x: Tensor) -> Tensor:
        more = {"residual": x, **vectors} if residual else vectors
        return torch.ops.freezekit.frozen_conv2d(x, w, activation="relu", padding=[1], eps=1e-5, **more)[0]

    def stock(x: Tensor) -> Tensor:
        y = F.batch_norm(F.conv2d(x, w, padding=1), *(vectors[name] for name in names))
        return F.relu(y + x if residual else y)

    return x, own, stock


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_before_it_is_proven_a_block_runs_what_stock_runs(dtype: torch.dtype, residual: bool) -> None:
    x, own, stock = block_of(dtype, residual)
    with stand_in(), Traffic() as by_own:
        step(own, x)
    with Traffic() as by_stock:
        step(stock, x)
    # A tensor of no elements, too, stands for the bits that are not kept.
    calls = [[call for call in seen.calls if call != ("aten::empty.memory_format", 0)] for seen in (by_own, by_stock)]
    assert calls[0] == calls[1]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_once_proven_a_block_is_two_convolutions_and_a_gate(dtype: torch.dtype, residual: bool) -> None:
    x, own, stock = block_of(dtype, residual)
    with Traffic() as by_stock:
        step(stock, x)
    kernels = [kernel for kernel, _ in log_of(own, x, steps=2)]
    rows = kernels[len(kernels) - 1 - kernels[::-1].index("conv2d") - 1 :]
    assert [kernel for kernel in rows if kernel not in ("norm_affine", "filter_transform")] == [
        "conv2d",
        "gate_select",
        "conv2d_dgrad",
    ]
    # A convolution reads x and a filter and writes y, all of one size here; dgrad makes a filter first. Bits: twice.
    y, w = x.nbytes, 16 * 16 * 9 * x.element_size()
    moved = (2 + residual) * y + w + 2 * x.numel() // 8 + 2 * y + 2 * y + 3 * w
    if residual:
        moved += 3 * y  # what flows around the block is added by autograd
    assert moved < sum(count for name, count in by_stock.calls if not name.startswith(("aten::detach", "aten::empty")))


def test_in_nchw_a_block_adds_the_conversions_and_a_pass_that_makes_its_bits() -> None:
    """What a convolution reads and writes is turned once; the gate reads dy in its own order."""
    x, own, _ = block_of(torch.float32, residual=False, layout=torch.contiguous_format)
    with stand_in():
        step(own, x)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded, launches() as kernels:
            step(own, x)
    names = [name for name in kernels if name not in ("norm_affine", "filter_transform")]
    assert ["fprop" in names[0], *names[1:3], "dgrad" in names[3]] == [True, "activation_relu", "gate_select", True]
    assert len(names) == 4

    def is_own(event: Any) -> bool:
        return event is not None and (event.name.startswith("freezekit::frozen_conv2d") or is_own(event.cpu_parent))

    turned = [event.input_shapes[0] for event in recorded.events() if event.name == "aten::copy_" and is_own(event)]
    assert turned.count([*x.shape]) == 4, "x, y, dy, dx"


def test_a_norm_s_factor_is_multiplied_in_one_pass_of_the_short_dtype() -> None:
    """It is float32; a product of that dtype would be written, read again and rounded: 12 bytes per element for 4.

    On a CPU ATen does that inside of the product.
    """
    dy, w = torch.randn(1, 32, 40, 40).bfloat16(), torch.randn(32, 64, 3, 3).bfloat16()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        torch.ops.freezekit.frozen_conv2d_dgrad(
            dy, w, (1, 64, 40, 40), padding=[1], norm_weight=torch.ones(32), running_var=torch.ones(32), eps=1e-5
        )
    whole = next(event for event in recorded.events() if event.name == "freezekit::frozen_conv2d_dgrad")
    ran = [event.name for event in whole.cpu_children if event.input_shapes and event.input_shapes[0] == [*w.shape]]
    assert "aten::mul" in ran
    assert "aten::to" not in ran


def log_of(layer: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> list[tuple[str, int]]:
    """Kernel and bytes of each launch of some steps, the proof's among them."""
    _C.set_launch_log(True)
    try:
        with stand_in():
            for _ in range(steps):
                step(layer, x)
        # A convolution's launch says its operator, and the kernel is whichever fits.
        named = ("operator", "kernel")
        return [(row[named["bytes" in row]], row.get("bytes", 0)) for row in _C.take_launch_log()]
    finally:
        _C.set_launch_log(False)


def test_what_is_counted() -> None:
    """One element of each tensor, by hand: relu in float32."""
    x = torch.randn(32 * 100)
    with fk.testing.emulated():
        rows = log_of(fk.functional.relu, x, steps=1)
    assert rows == [("activation_relu", 3200 * 8 + 400), ("gate_select", 3200 * 8 + 400)]
    with Traffic() as seen:
        F.threshold(x, 0, 0)
    assert [moved for _, moved in seen.calls] == [3200 * 8]
