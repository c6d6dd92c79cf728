"""In every pattern the fused model gives the stock model's values and gradients, and what should be fused is."""

from __future__ import annotations

import copy
import operator
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from freezekit.fusion import fuse, fusion_report
from tests.conftest import on
from tests.fusion.nets import PATTERNS, Bottleneck, settled


def outcome(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of a loss that weighs every element differently."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return y.detach(), torch.autograd.grad(y, x, weights)[0]


def make_input(dtype: torch.dtype, channels_last: bool, device: str = "cpu") -> Tensor:
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64).to(dtype=dtype, device=device)
    return x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", PATTERNS)
def test_float64_is_exact(name: str, channels_last: bool, place: tuple[str, str]) -> None:
    backend, device = place
    stock = settled(PATTERNS[name]()).to(device, torch.float64)
    x = make_input(torch.float64, channels_last, device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    expected = outcome(stock, x)
    with on(backend):
        result = outcome(fuse(stock), x)
    assert all(row.fused for row in fusion_report(stock))
    for ours, theirs in zip(result, expected, strict=True):
        assert (ours - theirs).abs().max().item() <= 1e-12 * max(1, theirs.abs().max().item())
        # cuDNN answers float64 in NCHW, whatever comes in; freezekit keeps the layout.
        assert ours.is_contiguous(memory_format=layout) if device == "cuda" else ours.stride() == theirs.stride()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_no_further_from_float64_than_stock(
    name: str, dtype: torch.dtype, channels_last: bool, place: tuple[str, str]
) -> None:
    backend, device = place
    ratios: list[list[float]] = []
    for seed in range(25 if backend == "aten" else 9):
        torch.manual_seed(seed)
        exact = settled(PATTERNS[name]()).to(device)
        for tensor in [*exact.parameters(), *exact.buffers()]:  # what all three compute with is the same
            tensor.data = tensor.data.to(dtype).to(tensor.dtype)
        stock, x = copy.deepcopy(exact).to(dtype), make_input(dtype, channels_last, device)
        reference = outcome(exact.double(), x.double())
        with on(backend):
            # Own kernels are held to themselves, layer by layer: how stock's sum up depends on the processor.
            theirs = outcome(stock if backend == "aten" else fk.convert(copy.deepcopy(stock)), x)
            ours = outcome(fuse(stock), x)
        ratios.append([rms(a, c) / rms(b, c) for a, b, c in zip(ours, theirs, reference, strict=True)])
    # The median: values close to 0 fall to this or that side of a ReLU by chance, and carry much of one run's error.
    # In float32 the two sum up in other orders; in 16 bits what is rounded between the layers outweighs that.
    for ratio in zip(*ratios, strict=True):
        assert statistics.median(ratio) <= (1.1 if dtype == torch.float32 else 1.02)


def rms(value: Tensor, reference: Tensor) -> float:
    return (value.double() - reference).pow(2).mean().sqrt().item()


def test_the_report_names_every_layer_of_a_block() -> None:
    model = settled(nn.Sequential(Bottleneck(8, 16)))
    rows = [str(row) for row in fusion_report(fuse(model))]
    assert rows == [
        "0.conv1 + 0.bn1 + relu: fused",
        "0.conv2 + 0.bn2 + relu: fused",
        "0.conv3 + 0.bn3: fused",
        "0.downsample.0 + 0.downsample.1 + add + relu: fused",
    ]


class TwoReaders(nn.Module):
    """Somebody reads between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.conv2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        return F.relu(z) + y + z.sigmoid() * self.conv2(z)


class WrittenBetween(nn.Module):
    """The block's input is overwritten before the block's last layer: it must not run there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = fk.FreezableConv2d(8, 8, 1), nn.BatchNorm2d(8)  # stock's would keep the input
        self.act = nn.Sequential(nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn(self.conv(x))
        return F.relu(y + self.act(x))


class AddsIntoOther(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = x * 2
        y = operator.iadd(kept, self.conv(x))
        return F.relu(y) + kept


class Broadcasts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x.mean((2, 3), keepdim=True))


class ReadThrice(nn.Module):
    """Three convolutions and a pool read one result: each adds to the gradient of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 1)
        self.a, self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.a(x) * F.relu(self.b(x)) + self.c(x) + F.avg_pool2d(x, 3, 1, 1)


class OwnInput(nn.Module):
    """Input and residual are one tensor, and the result is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + x
        y.mul_(2)
        return F.relu(y)


@pytest.mark.parametrize("kind", [TwoReaders, WrittenBetween, AddsIntoOther, Broadcasts, ReadThrice, OwnInput])
def test_odd_dataflow(kind: type[nn.Module], place: tuple[str, str]) -> None:
    backend, device = place
    stock = settled(kind()).to(device, torch.float64)
    x = make_input(torch.float64, False, device)
    expected = outcome(stock, x)
    with on(backend):
        result = outcome(fuse(stock), x)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_nan_and_infinity_are_not_hidden() -> None:
    model = settled(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    x = make_input(torch.float32, True)
    x[0, 3, 4, 5] = float("nan")
    expected = model(x)
    ours = fuse(model)(x)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert ours.isnan().any()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_fold(affine: bool, bias: bool) -> None:
    norm = nn.BatchNorm2d(8, affine=affine, eps=0.1)
    nn.init.normal_(norm.running_mean)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding="valid", bias=bias), norm).eval().requires_grad_(False).double()
    same = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=bias), norm).eval().requires_grad_(False).double()
    x = make_input(torch.float64, False)
    for net in (model, same):
        expected = outcome(net, x)
        for ours, theirs in zip(outcome(fuse(net), x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
