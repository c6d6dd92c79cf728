"""Nothing wrong is let through, and nothing right is stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import freezekit as fk
from bench import compare, document, sides, verify
from bench.layer_lists import layers_of
from bench.measure import Case, Contestant
from bench.sections.layers import tolerance
from bench.settings import Settings
from bench.verify import WrongResult, check, largest_error


def test_equal_results_have_no_error() -> None:
    y = torch.randn(3, 4)
    assert check("case", "ours", {"y": y}, {"y": y.clone()}, {"y": 1e-6}) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_fails(bad: float) -> None:
    y = torch.ones(3)
    wrong = torch.tensor([1.0, bad, 1.0])
    with pytest.raises(WrongResult, match="ours's y differs"):
        check("case", "ours", {"y": wrong}, {"y": y}, {"y": 1e9})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"y": torch.zeros(2)}, r"float32 \(2,\)"),
        ({"y": torch.zeros(3).double()}, "float64"),
        ({}, "gave"),
        ({"y": torch.zeros(3), "dx": torch.zeros(3)}, "gave"),
    ],
)
def test_shape_dtype_and_names_must_be_stocks(result: dict[str, Tensor], message: str) -> None:
    with pytest.raises(WrongResult, match=message):
        check("case", "ours", result, {"y": torch.zeros(3)}, {"y": 1.0, "dx": 1.0})


def test_error_is_relative_to_the_largest_element() -> None:
    assert largest_error(torch.tensor([10.0, 1.0]), torch.tensor([10.0, 0.0])) == pytest.approx(0.1)
    assert largest_error(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert largest_error(torch.empty(0), torch.empty(0)) == 0.0


class Nudged(nn.Conv2d):
    """As a convolution that sums in another order may: what is next to zero gets to the other side of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 2e-7


class WrongInOnePlace(torch.autograd.Function):
    """The gradient of one element is lost."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        dx = dy.clone()
        dx[0, 0, 0, 0] = 0
        return dx


class NudgedAndWrong(Nudged):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(WrongInOnePlace.apply(x))


def rectified(conv: type[nn.Module]) -> tuple[Contestant, Contestant]:
    """Stock's and a side's convolution by one and ReLU, whose input has one element next to zero."""
    stock = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU()).requires_grad_(False)
    stock[0].weight.fill_(1.0)
    x = torch.linspace(0.5, 1.0, 16).reshape(1, 1, 4, 4)
    x[0, 0, 2, 1] = 1e-7
    case = Case("blocks", "", "", "", "", stock, x.requires_grad_(), lambda name: 1e-3)

    def plant(module: nn.Module) -> nn.Module:
        module[0].__class__ = conv
        return module

    contestant = Contestant(sides.SIDES["stock"], case, torch.ones(1, 1, 4, 4))
    return contestant, Contestant(sides.Side("other", plant), case, contestant.dy)


def test_a_relu_on_the_other_side_of_zero_is_told_from_a_wrong_kernel() -> None:
    stock, nudged = rectified(Nudged)
    bounds = {"y": 1e-3, "dx": 1e-3}
    assert largest_error(nudged.results()["dx"], stock.results()["dx"]) == 1.0
    with pytest.raises(WrongResult, match="dx differs"):
        check("case", "other", nudged.results(), stock.results(), bounds)
    moved = stock.moves(tf32=False)
    assert (moved["dx"] > 0.5).nonzero().tolist() == [[0, 0, 2, 1]]
    assert check("case", "other", nudged.results(), stock.results(), bounds, lambda: moved) < 1
    stock, wrong = rectified(NudgedAndWrong)
    with pytest.raises(WrongResult, match="dx differs"):
        check("case", "other", wrong.results(), stock.results(), bounds, lambda: moved)


def test_stock_is_asked_how_it_moves_only_where_an_element_is_beyond_its_tolerance() -> None:
    y = torch.ones(3)
    check("case", "ours", {"y": y}, {"y": y.clone()}, {"y": 1e-6}, lambda: pytest.fail("asked"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tolerance_lets_another_summation_order_pass(dtype: torch.dtype) -> None:
    x, w = torch.randn(16, 4096), torch.randn(4096, 16)
    stock = (x.to(dtype) @ w.to(dtype)).double()
    order = torch.randperm(4096)
    result = (x[:, order].to(dtype) @ w[order].to(dtype)).double()
    assert largest_error(result, stock) <= verify.tolerance(dtype, 4096)


def test_tolerance_stops_one_lost_product() -> None:
    """The smallest bug of a kernel, one product left out of each sum, in the longest sums of ResNet-50."""
    settings = Settings(torch.device("cpu"), torch.float32)
    for layer in layers_of("resnet50"):
        length = layer.in_channels // layer.groups * layer.kernel**2
        a, b = torch.randn(64, length).double(), torch.randn(64, length).double()
        whole = (a * b).sum(1)
        assert largest_error(whole - a[:, 0] * b[:, 0], whole) > tolerance(layer, 2, settings, "y")


class Halved(torch.autograd.Function):
    """A wrong backward pass: half the gradient, in half the time."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy / 2


class WrongBackward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Halved.apply(x))


class WrongForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class SlightlyWrongForward(nn.Conv2d):
    """Beyond what sums of this length round to, and less than a network may move."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.00002


@pytest.mark.parametrize(("wrong", "name"), [(WrongBackward, "dx"), (WrongForward, "y"), (SlightlyWrongForward, "y")])
def test_a_planted_wrong_kernel_never_gets_a_time(
    wrong: type[nn.Module], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def plant(module: nn.Module) -> nn.Module:
        module.__class__ = wrong
        return module

    monkeypatch.setitem(sides.SIDES, "freezekit", sides.Side("freezekit", plant))
    console = Console(record=True, width=200)
    path = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--section", "layers", "--layers", "tiny", "--repeat", "1", "--json", str(path)]
    assert compare.main(arguments, console) == 1
    text = console.export_text()
    assert "WRONG RESULT" in text
    assert f"freezekit's {name} differs from stock's" in text
    ours = [row for row in document.read(path)["rows"] if row["side"] == "freezekit" and row["case"] == "dense"]
    assert ours
    assert all(row["seconds"] is None and row["failure"].startswith("WRONG RESULT") for row in ours)


def test_a_wrong_count_of_kernels_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def thaw(module: nn.Module) -> nn.Module:
        return fk.convert(module.requires_grad_(True))

    monkeypatch.setitem(sides.SIDES, "freezekit", sides.Side("freezekit", thaw))
    console = Console(record=True, width=200)
    assert compare.main(["--device", "cpu", "--section", "kernels", "--quick"], console) == 1
    assert "WRONG RESULT" in console.export_text()
