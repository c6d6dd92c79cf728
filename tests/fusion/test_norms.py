"""Norms of other libraries, activations beyond ReLU, and what the report says of a norm that is left outside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freezekit.conversion import convert
from freezekit.explanation import explain
from freezekit.fusion import fuse, fusion_report, norms
from freezekit.fusion.layers import NORMS
from tests.fusion.alike import assert_alike, kept
from tests.fusion.nets import settled

EPS = 2.0**-17  # exact in float32


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 have it: all of it buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).view(1, -1, 1, 1)
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


class DoublingNorm2d(FrozenBatchNorm2d):
    """By its name a norm, and none by what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm has it."""

    def __init__(self, channels: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above under the libraries' names; what is learnt of them is forgotten after."""
    for kind, fixed in ((FrozenBatchNorm2d, True), (DoublingNorm2d, True), (BatchNormAct2d, False)):
        monkeypatch.setitem(norms._NAMES, f"{kind.__module__}.{kind.__qualname__}", fixed)
    monkeypatch.setattr(norms, "_refused", set())
    monkeypatch.setattr(norms, "_registered", {})
    before = dict(NORMS)
    yield
    NORMS.clear()
    NORMS.update(before)


def image(grad: bool = True) -> Tensor:
    return torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=grad)


def net(norm: nn.Module, *more: nn.Module) -> nn.Module:
    return settled(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm, *more, nn.Conv2d(4, 4, 1))).double()


def check(stock: nn.Module, *rows: str) -> nn.Module:
    fused = fuse(copy.deepcopy(stock))
    assert [str(row) for row in fusion_report(fused)] == list(rows)
    for grad in (True, False):
        assert_alike(fused, stock, (image(grad),))
    for model in (fused, stock):
        model.train()
    assert_alike(fused, stock, (image(),))
    return fused.eval()


def test_a_frozen_batch_norm_is_taken_in() -> None:
    fused = check(net(FrozenBatchNorm2d(4), nn.ReLU()), "0 + 1 + relu: fused", "3: fused, the convolution alone")
    assert kept(fused, (image(),)) == -(-2 * 4 * 6 * 5 // 32) * 4  # one bit per element, in words
    assert all(row.fused for row in fusion_report(fused.train()))


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_a_buffer_that_learns(name: str) -> None:
    stock = net(FrozenBatchNorm2d(4), nn.ReLU())
    fused = fuse(copy.deepcopy(stock))
    gradients = []
    for model in (fused, stock):
        learns = getattr(model[1], name).requires_grad_()
        x = torch.linspace(-1, 1, 2 * 4 * 30, dtype=torch.float64).view(2, 4, 6, 5)
        gradients.append(torch.autograd.grad(model(x).square().sum(), learns)[0])
    torch.testing.assert_close(*gradients)
    assert fusion_report(fused)[0].reason == "the batch norm is trainable"


def test_hooks_do_not_see_how_a_norm_is_met() -> None:
    stock, seen = net(FrozenBatchNorm2d(4), nn.ReLU()), []
    handle = stock[1].register_forward_hook(lambda module, args, y: seen.append(y) or 2 * y)
    fused = fuse(copy.deepcopy(stock))
    assert not seen
    handle.remove()
    assert FrozenBatchNorm2d not in norms._refused
    check(stock, "0 + 1 + relu: fused", "3: fused, the convolution alone")
    assert_alike(fused, fused, (image(),))


def test_a_name_is_not_enough() -> None:
    check(
        net(DoublingNorm2d(4), nn.ReLU()),
        "0: fused, but 1 behind it runs on its own",
        "3: fused, the convolution alone",
    )


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, BatchNormAct2d])
def test_a_norm_is_first_met_where_there_is_no_data(norm: type[nn.Module]) -> None:
    model = net(norm(4), *[nn.ReLU()] * (norm is FrozenBatchNorm2d))
    explain(model, image())
    check(model, "0 + 1 + relu: fused", f"{len(model) - 1}: fused, the convolution alone")


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.Identity])
def test_a_norm_with_an_activation(act: type[nn.Module]) -> None:
    row = "0 + 1 + relu: fused" if act is nn.ReLU else "0 + 1: fused"
    fused = check(net(BatchNormAct2d(4, act)), row, "2: fused, the convolution alone")
    fused[1].drop, x = nn.Dropout(0.5).train(), image(False)
    torch.manual_seed(0)
    ours = fused(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, fused[2](fused[1](fused[0](x))))


def test_a_norm_that_comes_later_brings_its_activation() -> None:
    fused, stock = (net(nn.BatchNorm2d(4)) for _ in range(2))
    stock.load_state_dict(fuse(fused).state_dict())
    for model in (fused, stock):
        torch.manual_seed(0)
        model[1] = settled(nn.Sequential(BatchNormAct2d(4)))[0].double()
    norms.is_norm(stock[1])
    assert_alike(fused, stock, (image(),))
    fused, stock = (net(BatchNormAct2d(4)) for _ in range(2))
    stock.load_state_dict(fuse(fused).state_dict())
    for model in (fused, stock):
        model[1] = nn.BatchNorm2d(4).double().eval().requires_grad_(False)
    assert_alike(fused, stock, (image(),))


@pytest.mark.parametrize("act", [nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU])
def test_other_activations_keep_one_tensor(act: type[nn.Module]) -> None:
    stock = net(nn.BatchNorm2d(4), act())
    fused = check(stock, "0 + 1: fused", "3: fused, the convolution alone")
    x = image()
    assert kept(fused, (x,)) == x.numel() * x.element_size()
    assert kept(stock, (x,)) > 2 * x.numel() * x.element_size()


def test_a_norm_outside_is_named() -> None:
    check(
        net(nn.GroupNorm(2, 4), nn.ReLU()),
        "0: fused, but 1 behind it runs on its own",
        "3: fused, the convolution alone",
    )


class Renormalised(nn.BatchNorm2d):
    pass


class Activated(FrozenBatchNorm2d):
    """With an activation, and nothing that drops out."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class NoNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_registered_norm_is_held_to_its_word() -> None:
    for kind in (Activated, DoublingNorm2d, NoNorm):
        norms.register_norm(kind, always_fixed=True)
    check(net(Activated(4)), "0 + 1: fused", "2: fused, the convolution alone")
    check(net(DoublingNorm2d(4)), "0: fused, but 1 behind it runs on its own", "2: fused, the convolution alone")
    check(net(NoNorm()), "0: fused, but 1 behind it runs on its own", "2: fused, the convolution alone")


def test_norms_can_be_registered() -> None:
    model = net(Renormalised(4), nn.ReLU())
    check(model, "0: fused, but 1 behind it runs on its own", "3: fused, the convolution alone")
    norms.register_norm(Renormalised, always_fixed=False)
    check(model.eval(), "0 + 1 + relu: fused", "3: fused, the convolution alone")
    wrong: Any = nn.ReLU()
    with pytest.raises(TypeError, match=r"kind must be a class of nn.Module, got ReLU\(\.\.\.\)"):
        norms.register_norm(wrong, always_fixed=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(3, 4), (40, 4)], ids=["few positions", "many"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("running_var", v) for v in (-EPS, 0.0, -1.0, float("inf"), float("nan"))]
    + [("running_mean", v) for v in (float("inf"), float("nan"))]
    + [("weight", v) for v in (0.0, float("inf"), float("nan"))]
    + [("bias", v) for v in (float("inf"), float("nan"))],
)
def test_statistics_that_are_out_of_order(
    name: str, value: float, size: tuple[int, int], layout: torch.memory_format
) -> None:
    """One channel is divided by 0 or worse: infinities and NaN are where stock has them, in gradients too."""
    torch.manual_seed(0)
    for bias, relu in ((True, False), (True, True), (False, True)):
        layers = [nn.Conv2d(3, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4, eps=EPS), *[nn.ReLU()] * relu]
        stock = settled(nn.Sequential(*layers)).to(memory_format=layout)
        with torch.no_grad():
            getattr(stock[1], name)[1] = value
            stock[1].running_mean[2] = 0
        x = torch.randn(2, 3, *size).to(memory_format=layout)
        found = []
        for model in (fuse(copy.deepcopy(stock)), stock):
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            assert (y.grad_fn.name() == "FreezekitFrozenConv2dBackward") is (model is not stock)
            found.append([y, torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel()).view(y.shape))[0]])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("how", [fuse, convert])
def test_a_batch_norm_s_eps_of_0_is_for_torch_to_take_or_refuse(how: Callable[[nn.Module], nn.Module]) -> None:
    """Torch 2.11 refuses it, 2.13 divides by the root of the variance."""

    def outcome(model: nn.Module) -> Tensor | str:
        try:
            return model(torch.ones(1, 3, 5, 5, requires_grad=True))
        except ValueError as error:
            return str(error)

    torch.manual_seed(0)
    stock = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.0), nn.ReLU()))
    ours, expected = outcome(how(copy.deepcopy(stock))), outcome(stock)
    if isinstance(expected, str):
        assert ours == expected
    else:
        torch.testing.assert_close(ours, expected)


def test_a_frozen_norm_s_eps_of_0_is_fused() -> None:
    """Torchvision sets it for the weights that its detectors load."""
    stock = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), FrozenBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).double()
    cast("FrozenBatchNorm2d", stock[1]).eps = 0.0
    check(stock.eval().requires_grad_(False), "0 + 1 + relu: fused", "3: fused, the convolution alone")
