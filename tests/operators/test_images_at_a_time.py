"""Kernels read and write NHWC: tensors in NCHW are copied, some images of a large batch at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.proof.stand_in import launched

HEIGHT, WIDTH = 333, 701  # an image of one channel is no multiple of 16 bytes


def integers(*size: int, channels_last: bool = False) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randint(-2, 3, size).float().contiguous(memory_format=layout)


@pytest.mark.parametrize(("channels", "filters"), [(4, 1), (2, 3)])
@pytest.mark.parametrize(
    ("weight_last", "residual"),
    [(False, "none"), (True, "none"), (False, "NHWC"), (True, "NCHW"), (True, "NHWC")],
    ids=["x and y", "x", "x and y, not r", "x and r", "x, neither y nor r"],
)
def test_what_is_copied_by_images_gives_the_whole_batch(
    channels: int, filters: int, weight_last: bool, residual: str
) -> None:
    batch = 19
    x = integers(batch, channels, HEIGHT, WIDTH)
    w = integers(filters, channels, 2, 1, channels_last=weight_last)
    w = w.as_strided(w.shape, (2 * channels, 1, channels, channels)) if weight_last else w
    r = integers(batch, filters, HEIGHT - 1, WIDTH, channels_last=residual == "NHWC")
    found: list[Tensor] = []
    block, given = torch.ops.freezekit.frozen_conv2d, None if residual == "none" else r

    def run() -> None:
        found.append(block(x, w, None, given, backend="emulated")[0])

    kernels = launched(run)
    assert len(kernels) >= 2, "slices"
    assert len(set(kernels)) == 1
    expected = torch.nn.functional.conv2d(x, w) + (0 if given is None else given)
    assert torch.equal(found[0], expected)
    assert found[0].stride() == torch.nn.functional.conv2d(x[:2], w).stride()
