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
from tests.observe import bytes_saved

SHAPES = [(1, 4, 6, 8), (3, 4, 6, 8), (3, 1, 6, 8), (3, 4, 1, 8), (3, 4, 6, 1), (2, 2, 2, 2)]


class Silent:
    """A listener that is told what runs, and notes nothing."""

    has_data = False

    def current(self) -> None:
        return None

    def note_function(self, arguments: Any, result: Any) -> None: ...

    def start_block(self) -> None: ...


def with_odd_ones(x: Tensor) -> Tensor:
    """Nothing reads the stride of a dimension of size 1."""
    return x.as_strided(x.shape, [7 if size == 1 else stride for size, stride in zip(x.shape, x.stride())])


INPUTS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "NCHW": lambda n, c, h, w: torch.randn(n, c, h, w),
    "NHWC": lambda n, c, h, w: torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last),
    "behind attention": lambda n, c, h, w: torch.randn(n, h * w, c).transpose(1, 2).reshape(n, c, h, w),
    "heads inside": lambda n, c, h, w: torch.randn(h * w, n, c).permute(1, 2, 0).reshape(n, c, h, w),
    "some channels": lambda n, c, h, w: torch.randn(n, 2 * c, h, w)[:, :c],
    "some channels, NHWC": lambda n, c, h, w: torch.randn(n, h, w, 2 * c).permute(0, 3, 1, 2)[:, :c],
    "some columns": lambda n, c, h, w: torch.randn(n, c, h, 2 * w)[..., :w],
    "transposed": lambda n, c, h, w: torch.randn(n, c, w, h).transpose(2, 3),
    "batch inside": lambda n, c, h, w: torch.empty_strided((n, c, h, w), (c, 1, w * c * n, c * n)).normal_(),
    "expanded": lambda n, c, h, w: torch.randn(n, c, 1, 1).expand(n, c, h, w),
    "an odd stride of one": lambda n, c, h, w: with_odd_ones(torch.randn(n, c, h, w)),
    "an odd stride of one, transposed": lambda n, c, h, w: with_odd_ones(torch.randn(n, c, w, h).transpose(2, 3)),
}


def groups(x: Tensor) -> int:
    return min(2, x.shape[1])


def ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1])


def interpolated(mode: str) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, scale_factor=2, mode=mode)


def loss(of: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: of(x, torch.zeros(x.shape), reduction="none")


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "positions": lambda x: x.flatten(2),
    "groups": lambda x: x.reshape(len(x), groups(x), -1, *x.shape[2:]),
    "rows": lambda x: x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]),
    "batch_norm": lambda x: F.batch_norm(x, 0 * ones(x), ones(x)),
    "batch_norm by batch": lambda x: F.batch_norm(x, None, None, training=True),
    "group_norm": lambda x: F.group_norm(x, groups(x)),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "instance_norm": F.instance_norm,
    "channel_shuffle": lambda x: F.channel_shuffle(x, groups(x)),
    "roll": lambda x: x.roll(1, 1),
    "roll of two": lambda x: x.roll((1, 2), (2, 3)),
    "roll by nothing": lambda x: x.roll((1, 0), (1, 3)),
    "roll of all": lambda x: x.roll(1),
    "flip": lambda x: x.flip(2),
    "sum": lambda x: x + 1,
    "sum of two": lambda x: x + x,
    "sum with NHWC": lambda x: x + x.contiguous(memory_format=torch.channels_last),
    "sum with channels": lambda x: ones(x).view(-1, 1, 1) + x,
    "difference": lambda x: x - 1.5,
    "difference from a number": lambda x: 1 - x,
    "product": lambda x: x * 2,
    "quotient": lambda x: x / 2,
    "inverse": lambda x: 1 / x,
    "scaled sum": lambda x: x * 2 + torch.zeros(x.shape),
    "comparison": lambda x: x > 0,
    "choice": lambda x: torch.where(x > 0, x, 0.5),
    "mean of two": lambda x: torch.lerp(x, x, 0.5),
    "power": lambda x: x**2,
    "power of a number": lambda x: 2**x,
    "clamp": lambda x: x.clamp(-1, 1),
    "convolution": lambda x: F.conv2d(x, torch.zeros(5, x.shape[1], 1, 1)),
    **{f.__name__: f for f in (F.relu, F.relu6, F.elu, F.gelu, F.hardtanh, F.logsigmoid, F.rrelu, F.softplus)},
    "random rrelu": lambda x: F.rrelu(x, training=True),
    "prelu": lambda x: F.prelu(x, ones(x)),
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.5),
    "masked_fill of rows": lambda x: x[:, :, :1].masked_fill(torch.ones(x.shape) > 0, 0.5),
    "log_softmax": lambda x: x.log_softmax(1),
    "softmax": lambda x: x.softmax(-1),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True),
    "mean": lambda x: x.mean(1, keepdim=True),
    "hardswish": F.hardswish,
    "glu": lambda x: F.glu(torch.cat((x, x), 1), 1),
    "sort": lambda x: x.sort(1)[0],
    "order": lambda x: x.argsort(1),
    "tril": lambda x: x.tril(),
    "zeros": torch.zeros_like,
    "noise": torch.randn_like,
    "a copy": lambda x: x.clone(),
    "float64": lambda x: x.double(),
    "some": lambda x: x[:, torch.tensor([0])],
    "written to": lambda x: x.index_put((torch.tensor([0]),), torch.zeros(())),
    "clamp by tensors": lambda x: x.clamp(-torch.ones(x.shape), ones(x).view(-1, 1, 1)),
    "product of a number": lambda x: torch.mul(x, 0.5),
    "remainder": lambda x: x % 0.5,
    "remainder of a number": lambda x: torch.remainder(0.5, x),
    "poisson": lambda x: torch.poisson(x.abs()),
    "infinite": torch.isinf,
    "floor": lambda x: x // x.transpose(2, 3).contiguous().transpose(2, 3),
    "and": lambda x: torch.logical_and(x, x),
    "absolute": torch.abs,
    "turned": lambda x: x.rot90(1, (2, 3)),
    "loss of pixels": lambda x: F.nll_loss(x, torch.zeros(x[:, 0].shape, dtype=torch.int64), reduction="none"),
    "pads": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "shuffled pixels": lambda x: F.pixel_shuffle(x, 1),
    **{f.__name__: loss(f) for f in (F.mse_loss, F.smooth_l1_loss, F.huber_loss)},
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), torch.ones(x.shape), reduction="none"),
    "with logits": lambda x: F.binary_cross_entropy_with_logits(x, torch.ones(x.shape), reduction="none"),
    **{mode: interpolated(mode) for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_strides_are_those_with_data(operator: str, shape: tuple[int, int, int, int]) -> None:
    inputs = {name: make(*shape) for name, make in INPUTS.items()}
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Operators(Silent()):
        without = {name: OPERATORS[operator](torch.empty_strided(x.shape, x.stride())) for name, x in inputs.items()}
    for name, x in inputs.items():
        assert without[name].stride() == OPERATORS[operator](x).stride(), name


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape) + x


@pytest.mark.parametrize(
    "between", [nn.Identity(), nn.BatchNorm2d(4).eval(), nn.GroupNorm(2, 4), nn.ChannelShuffle(2), nn.LogSigmoid()]
)
@pytest.mark.parametrize("n", [1, 2])
def test_attention_behind_attention(between: nn.Module, n: int) -> None:
    model = nn.Sequential(Attention(4), between, Attention(4))
    for x in (torch.randn(n, 4, 8, 6), torch.randn(n, 8, 6, 4).permute(0, 3, 1, 2)):
        without, with_data = (fk.explain(model, x, measure=measure).bytes_kept for measure in (False, True))
        assert without == with_data


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.scale = nn.MaxPool1d(2), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.pool(x) * self.scale).transpose(-1, -2).reshape(-1) * self.scale


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 4), (1, 6, 4), (6, 4)])
def test_max_pool1d(shape: tuple[int, ...], learns: bool) -> None:
    """Torch has a kernel for it that no gradient needs, and that it does not take where a mode looks on."""
    model = Pooled()
    x = torch.randn(shape).transpose(-1, -2).requires_grad_(learns)
    kept = [fk.explain(model, x, measure=measure).bytes_kept for measure in (False, True)]
    assert kept == [bytes_saved(lambda: model(x), model.parameters())] * 2
