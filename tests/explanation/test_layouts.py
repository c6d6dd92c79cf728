"""Results have the strides without data that they have with data, by which attention's kernel and copies are chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import freezekit as fk
from freezekit.explanation.modes import Operators

N, C, H, W = 3, 4, 6, 8


class Silent:
    """A listener that is told what runs, and notes nothing."""

    has_data = False

    def current(self) -> None:
        return None

    def note_function(self, arguments: Any, result: Any) -> None: ...

    def start_block(self) -> None: ...


INPUTS: dict[str, Callable[[int], Tensor]] = {
    "NCHW": lambda n: torch.randn(n, C, H, W),
    "NHWC": lambda n: torch.randn(n, C, H, W).contiguous(memory_format=torch.channels_last),
    "behind attention": lambda n: torch.randn(n, H * W, C).transpose(1, 2).reshape(n, C, H, W),
    "heads inside": lambda n: torch.randn(H * W, n, C).permute(1, 2, 0).reshape(n, C, H, W),
    "some channels": lambda n: torch.randn(n, 2 * C, H, W)[:, :C],
    "some channels, NHWC": lambda n: torch.randn(n, H, W, 2 * C).permute(0, 3, 1, 2)[:, :C],
    "some columns": lambda n: torch.randn(n, C, H, 2 * W)[..., :W],
    "transposed": lambda n: torch.randn(n, C, W, H).transpose(2, 3),
    "batch inside": lambda n: torch.empty_strided((n, C, H, W), (C, 1, W * C * n, C * n)).normal_(),
    "expanded": lambda n: torch.randn(n, C, 1, 1).expand(n, C, H, W),
}
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "positions": lambda x: x.flatten(2),
    "groups": lambda x: x.reshape(len(x), 2, C // 2, H, W),
    "rows": lambda x: x.permute(0, 2, 3, 1).reshape(-1, C),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(C), torch.ones(C)),
    "batch_norm by batch": lambda x: F.batch_norm(x, None, None, training=True),
    "group_norm": lambda x: F.group_norm(x, 2),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "instance_norm": F.instance_norm,
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "roll": lambda x: x.roll(1, 1),
    "roll of two": lambda x: x.roll((1, 2), (2, 3)),
    "sum": lambda x: x + 1,
    "difference": lambda x: x - 1.5,
    "product": lambda x: x * 2,
    "quotient": lambda x: x / 2,
    "scaled sum": lambda x: x * 2 + torch.zeros(x.shape),
    "convolution": lambda x: F.conv2d(x, torch.zeros(5, C, 1, 1)),
    "relu": F.relu,
}


@pytest.mark.parametrize("n", [1, N])
@pytest.mark.parametrize("operator", OPERATORS)
def test_strides_are_those_with_data(operator: str, n: int) -> None:
    for name, make in INPUTS.items():
        x = make(n)
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Operators(Silent()):
            without = OPERATORS[operator](torch.empty_strided(x.shape, x.stride()))
        assert without.stride() == OPERATORS[operator](x).stride(), name


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape) + x


@pytest.mark.parametrize("between", [nn.Identity(), nn.BatchNorm2d(4).eval(), nn.GroupNorm(2, 4), nn.ChannelShuffle(2)])
@pytest.mark.parametrize("n", [1, 2])
def test_attention_behind_attention(between: nn.Module, n: int) -> None:
    model = nn.Sequential(Attention(4), between, Attention(4))
    for x in (torch.randn(n, 4, 8, 6), torch.randn(n, 8, 6, 4).permute(0, 3, 1, 2)):
        without, with_data = (fk.explain(model, x, measure=measure).bytes_kept for measure in (False, True))
        assert without == with_data
