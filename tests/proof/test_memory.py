"""What a proof holds at most: one result beside the caller's own, and a few MiB of values to compare."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import freezekit as fk
from bench.memory import trace
from freezekit import _C
from freezekit.functional import conv2d, conv2d_wgrad
from tests.proof.stand_in import decided, launched, stand_in

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("activation", fk.functional.relu),
        ("dropout", lambda x: fk.functional.dropout(x, 0.3)),
        ("max_pool2d", lambda x: fk.functional.max_pool2d(x, 3, 2, 1)),
    ],
)
def test_a_layer_s_proof_holds_no_more_than_one_result(
    name: str, layer: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """The first call makes its own result once the proof's are freed."""
    x = torch.randn(4, 8, 192, 192).to(dtype).requires_grad_()
    with stand_in():
        peak = trace(CPU, lambda: layer(x)).peak
        assert decided()[name].agree
    # A pool's result of both passes is torch's: the value, its indices, the gradient.
    result = x.nbytes if name != "max_pool2d" else x.nbytes + x.numel() // 4 * (x.element_size() + 8)
    assert peak <= result + 2 * MIB


def test_a_convolution_s_proof_holds_one_result_more() -> None:
    # Of float64: for other dtypes oneDNN itself holds as much again on some CPUs.
    x, w = torch.randn(16, 2, 128, 128).double().requires_grad_(), torch.randn(8, 2, 1, 1).double()
    with stand_in():
        first = trace(CPU, lambda: conv2d(x, w)).peak
        assert decided()["conv2d"].agree
        again = trace(CPU, lambda: conv2d(x, w)).peak
    assert first <= again + 16 * 8 * 128 * 128 * 8 + 16 * MIB


@pytest.mark.parametrize("batch", [1, 16])
def test_where_sums_cancel_no_operand_is_copied(batch: int) -> None:
    x = torch.full((batch, 64, 2048 // batch, 64), 0.3).double().contiguous(memory_format=torch.channels_last)
    w = torch.randn(1, 64, 1, 1).double()
    w -= w.mean()
    dy = torch.randn(batch, 1, 2048 // batch, 64).double()
    dy -= dy.mean()
    with stand_in():
        for name, call in (
            ("conv2d", lambda: conv2d(x, w)),
            ("conv2d_wgrad", lambda: conv2d_wgrad(dy, x, w.shape)),
        ):
            first = trace(CPU, call).peak
            assert not decided()[name].agree
            again = trace(CPU, call).peak
            assert first <= again + call().nbytes + 16 * MIB < x.nbytes


def test_in_nchw_the_copy_of_x_is_freed_before_there_is_a_second_result() -> None:
    """So a proof holds no more than the kernel needs in every call, where x is larger than the result."""
    x, w = torch.randn(8, 16, 128, 128).double().requires_grad_(), torch.randn(1, 16, 1, 1).double()
    with stand_in():
        first = trace(CPU, lambda: conv2d(x, w)).peak
        assert decided()["conv2d"].agree
        again = trace(CPU, lambda: conv2d(x, w)).peak
    assert again >= x.nbytes, "kernels read NHWC"
    assert first <= again


COPIED = 32 * MIB


@pytest.mark.parametrize(("channels", "filters"), [(32, 2), (2, 32)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("batch", "rows"), [(24, 64), (3, 288)], ids=["small images", "large images"])
def test_in_nchw_a_large_batch_is_copied_some_images_at_a_time(
    batch: int, rows: int, channels: int, filters: int, residual: bool
) -> None:
    """A block and its dgrad hold their result and so much at most, whatever the batch."""
    # Of float64: see above.
    x, w = torch.randn(batch, channels, 256, rows).double(), torch.randn(filters, channels, 1, 1).double()
    r = torch.randn(batch, filters, 256, rows).double() if residual else None
    result = filters * 256 * rows * 8  # bytes of an image, as below
    block, dgrad = torch.ops.freezekit.frozen_conv2d, torch.ops.freezekit.frozen_conv2d_dgrad
    with stand_in():
        fk.functional.relu(torch.randn(64).double().requires_grad_())  # bits need its kernels
        y = block(x, w, None, r, "relu", keep_mask=True)[0]
        peak = trace(CPU, lambda: block(x, w, None, r, "relu", keep_mask=True)).peak
        copied = channels * 256 * rows * 8 + result * (1 + residual)
        assert peak <= y.nbytes + y.numel() // 8 + max(COPIED, copied) + MIB
        dgrad(y, w, x.shape, x if residual else None)
        peak = trace(CPU, lambda: dgrad(y, w, x.shape, x if residual else None)).peak
        copied = channels * 256 * rows * 8 * (1 + residual) + result
        assert peak <= x.nbytes + max(COPIED, copied) + MIB
        assert {choice.backend for choice in fk.tuning.choices()} == {"native"}


def test_a_wgrad_that_copies_more_than_32_mib_is_torch_s() -> None:
    x, dy = torch.randn(2, 33, 2, 256, 256)  # 1 MiB for each image of both
    with stand_in():
        assert launched(lambda: conv2d_wgrad(dy[:4], x[:4], (2, 2, 1, 1)))
        assert not launched(lambda: conv2d_wgrad(dy, x, (2, 2, 1, 1)))
        sizes = {n: ((n, 2, 256, 256), (2, 2, 1, 1)) for n in (32, 33)}
        left_to_torch = [
            (n, channels_last)
            for n in sizes
            for channels_last in (False, True)
            if "copies too much memory"
            in _C.select("conv2d_wgrad", "float32", *sizes[n], device="cpu", channels_last=channels_last)["auto_reason"]
        ]
    assert left_to_torch == [(33, False)]
