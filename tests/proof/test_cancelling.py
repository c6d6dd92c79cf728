"""Sums of a caller's numbers that cancel: the rounding that is left accuses no kernel, and lets no wrong one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import freezekit as fk
from freezekit.functional import conv2d
from tests.proof.stand_in import Faulty, decided, launched
from tests.proof.test_faults import Told, faulty, kernels, told  # noqa: F401

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def in_turn(w: Tensor) -> Tensor:
    """Rows that add up to zero, in an order in which no sum of some of them is large."""
    rows = w.flatten(1)
    half = rows.shape[1] // 2
    return torch.cat([rows[:, :half], -rows[:, :half], torch.zeros_like(rows[:, 2 * half :])], 1).view_as(w)


def sorted_by_sign(w: Tensor) -> Tensor:
    """The same, all positive numbers before all negative ones: half of the sum of sizes is met on the way."""
    rows = w.flatten(1).abs()
    half = rows.shape[1] // 2
    return torch.cat([rows[:, :half], -rows[:, :half].flip(1), torch.zeros_like(rows[:, 2 * half :])], 1).view_as(w)


Cancel = Callable[[Tensor], Tensor]
CANCELS = pytest.mark.parametrize("cancel", [in_turn, sorted_by_sign])
# Images, channels, height and width, filters, their height and width.
SIZES = [(2, 8, 7, 8, 3), (1, 256, 4, 16, 1), (4, 8, 64, 8, 1), (1, 1, 9, 4, 3)]


def tensors(
    size: tuple[int, ...], cancel: Cancel, dtype: torch.dtype, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x of one value, w whose filters add up to zero, dy that does so in each channel, as behind a batch norm."""
    images, channels, side, filters, kernel = size
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.full((images, channels, side, side), 0.3)
    w = cancel(torch.randn(filters, channels, kernel, kernel))
    out = side - kernel + 1
    dy = cancel(torch.randn(filters, images, out, out)).transpose(0, 1)
    x, w, dy = (t.to(dtype).contiguous(memory_format=layout) for t in (x, w, dy))
    return x.requires_grad_(), w.requires_grad_(), dy


def untold(choice: fk.tuning.Choice) -> bool:
    return not choice.agree and "sums cancel" in choice.note


def convolution(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    y = conv2d(x, w)
    return (y.detach(), *torch.autograd.grad(y, (x, w), dy))


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@CANCELS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_right_kernel_is_not_accused_where_sums_cancel(
    faulty: Faulty,  # noqa: F811
    told: Told,  # noqa: F811
    size: tuple[int, ...],
    cancel: Cancel,
    channels_last: bool,
    tf32: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    for dtype in [torch.float32] if tf32 else DTYPES:
        fk.tuning.clear_choices()
        given = tensors(size, cancel, dtype, channels_last)
        assert told(lambda given=given: convolution(*given))[1] == []
        taken = [choice for choice in fk.tuning.choices() if not untold(choice)]
        assert len(fk.tuning.choices()) == 3
        assert all(choice.agree for choice in taken), dtype
        assert len(launched(lambda given=given: convolution(*given))) == len(taken)


@pytest.mark.parametrize("channels_last", [False, True])
@CANCELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES[:3], ids=str)
@pytest.mark.parametrize("how", ["wrong", "nonzero", "moved", "term"])
def test_sums_that_cancel_hide_no_fault(
    faulty: Faulty,  # noqa: F811
    told: Told,  # noqa: F811
    how: str,
    size: tuple[int, ...],
    dtype: torch.dtype,
    cancel: Cancel,
    channels_last: bool,
) -> None:
    """One element that is another number, or another pixel's; twice what is right; one term too many in one element."""
    if how == "term" and dtype == torch.bfloat16 and size == SIZES[2]:
        pytest.skip("one term of wgrad's 16384 is less than the rounding of bfloat16, on any data")
    given = tensors(size, cancel, dtype, channels_last)
    faulty.fail("conv2d", how)
    found, _ = told(lambda: convolution(*given))
    wrong = {name for name, choice in decided().items() if not choice.agree}
    if how == "moved":
        assert {name for name in wrong if not untold(decided()[name])} == {"conv2d"}
    else:
        assert wrong == {"conv2d", "conv2d_dgrad", "conv2d_wgrad"}
    with fk.backend("aten"):
        expected = convolution(*given)
    for name, ours, torchs in zip(("conv2d", "conv2d_dgrad", "conv2d_wgrad"), found, expected, strict=True):
        if name in wrong:
            torch.testing.assert_close(ours, torchs, rtol=0, atol=0)


def test_what_could_not_be_told_is_torch_s_and_no_other_process_learns_of_it(
    faulty: Faulty,  # noqa: F811
    told: Told,  # noqa: F811
) -> None:
    given = tensors(SIZES[2], in_turn, torch.float32, channels_last=True)
    assert told(lambda: convolution(*given))[1] == []
    rows = [choice for choice in fk.tuning.choices() if untold(choice)]
    assert "conv2d_wgrad" in {choice.problem.split()[0] for choice in rows}
    with fk.backend("aten"):
        expected = convolution(*given)
    torch.testing.assert_close(convolution(*given)[2], expected[2], rtol=0, atol=0)
    assert not any(choice.problem in fk.tuning.dump_choices() for choice in rows)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_numbers_that_do_not_cancel_a_single_term_in_four_thousand_is_found(
    faulty: Faulty,  # noqa: F811
    told: Told,  # noqa: F811
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    """What rounding may do where sums cancel, in any order, is more than a term of so long a sum."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(1, 4096, 4, 4).to(dtype).contiguous(memory_format=layout)
    w = torch.randn(8, 4096, 1, 1).to(dtype)
    x[0, 0, 0, 0] = w[0, 0, 0, 0] = 1.1
    faulty.fail("conv2d", "term")
    told(lambda: conv2d(x, w))
    assert not decided()["conv2d"].agree


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("channels_last", [False, True])
@CANCELS
def test_a_frozen_block_whose_sums_cancel(
    faulty: Faulty,  # noqa: F811
    told: Told,  # noqa: F811
    cancel: Cancel,
    channels_last: bool,
    activation: str,
) -> None:
    """Those of its convolution alone, and with its norm's mean."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, w, dy = tensors(SIZES[0], cancel, dtype, channels_last)
        shifted = (w.detach() + 0.125).contiguous(memory_format=layout)
        mean = conv2d(x.detach(), shifted)[0, :, 0, 0].float()
        for weight, norm in ((w.detach(), {}), (shifted, {"running_mean": mean, "running_var": torch.full((8,), 0.5)})):
            fk.tuning.clear_choices()

            def call(weight: Tensor = weight, norm: dict[str, Any] = norm, x: Tensor = x, dy: Tensor = dy) -> Tensor:
                y = torch.ops.freezekit.frozen_conv2d(x, weight, activation=activation, eps=1e-5, **norm)[0]
                return torch.autograd.grad(y, x, dy)[0]

            assert told(call)[1] == []
            blocks = [choice for choice in fk.tuning.choices() if choice.problem.startswith("conv2d")]
            assert all(choice.agree or untold(choice) for choice in blocks), dtype
            assert len(blocks) >= 2
