"""What a layer of a block has of its own, or somebody has put into its class, is what runs."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import freezekit as fk
from freezekit.fusion.norms import register_norm


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)


def circular(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def own_conv_forward(net: nn.Sequential) -> None:
    net[0]._conv_forward = circular.__get__(net[0], nn.Conv2d)


def own_forward(net: nn.Sequential) -> None:
    forward = net[1].forward
    net[1].forward = lambda x: forward(x) + 1


def own_call(net: nn.Sequential) -> None:
    forward = net[1].forward
    net[1]._call_impl = lambda x: forward(x) + 1


def own_compiled_call(net: nn.Sequential) -> None:
    net[2]._compiled_call_impl = lambda x: x - 1


def own_statistics(net: nn.Sequential) -> None:
    net[1].__dict__["running_mean"] = torch.ones(4)


def own_weight(net: nn.Sequential) -> None:
    net[0].__dict__["weight"] = torch.ones(4, 3, 3, 3)


CHANGES = [own_conv_forward, own_call, own_compiled_call, own_statistics, own_weight]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_a_layer_has_of_its_own_runs(change: Callable[[nn.Sequential], None], after: bool) -> None:
    x, stock, ours = torch.randn(2, 3, 6, 6), block(), block()
    if after:
        fk.fuse(ours)
    untouched = stock(x)
    for net in (stock, ours):
        change(net)
    if not after:
        fk.fuse(ours)
    assert not torch.equal(stock(x), untouched)
    assert torch.equal(ours(x), stock(x))


@pytest.mark.parametrize("change", [own_forward, own_conv_forward], ids=lambda f: f.__name__)
def test_compiled_code_looks_again(change: Callable[[nn.Sequential], None]) -> None:
    x, ours = torch.randn(2, 3, 6, 6), fk.fuse(block())
    compiled = torch.compile(ours, backend="eager")
    compiled(x)
    change(ours)
    torch.testing.assert_close(compiled(x), ours(x))
    torch.compiler.reset()


PLACES = [
    *[(nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.BatchNorm2d, "forward"), (nn.ReLU, "forward")],
    *[(kind, name) for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU) for name in ("__call__", "_call_impl")],
    *[(nn.Module, "_call_impl"), (F, "conv2d"), (F, "batch_norm"), (F, "relu"), (torch, "batch_norm")],
]


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=lambda part: getattr(part, "__name__", part))
def test_what_was_put_into_a_class_or_library_runs(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, stock, ours = torch.randn(2, 3, 6, 6), block(), fk.fuse(block())
    original, untouched = getattr(owner, name), stock(x)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *arguments, **more: original(*arguments, **more) + 1)
        assert not torch.equal(stock(x), untouched)
        assert torch.equal(ours(x), stock(x))
    torch.testing.assert_close(ours(x), stock(x))


def test_a_check_that_was_put_into_a_class_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, seen = fk.fuse(block()), []
    monkeypatch.setattr(nn.BatchNorm2d, "_check_input_dim", lambda self, x: seen.append(x.dim()))
    ours(torch.randn(2, 3, 6, 6))
    assert seen == [4]


@pytest.mark.parametrize("add", [operator.add, operator.iadd], ids=["__add__", "__iadd__"])
def test_another_addition_runs(add: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            if self.in_place:
                y += x
                return y
            return y + x

    stock = Sum().requires_grad_(False)
    stock.in_place = add is operator.iadd
    ours, x = fk.fuse(copy.deepcopy(stock)), torch.randn(2, 3, 6, 6)
    monkeypatch.setattr(Tensor, f"__{add.__name__}__", lambda a, b: torch.sub(a, b))
    assert torch.equal(ours(x), stock(x))


def test_a_mode_s_function_runs() -> None:
    class Doubles(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            return 2 * result if func is F.conv2d else result

    x, stock, ours = torch.randn(2, 3, 6, 6), block(), fk.fuse(block())
    with Doubles():
        assert torch.equal(ours(x), stock(x))
    with torch.device("cpu"):  # a mode of torch's own
        assert ours(x.requires_grad_()).grad_fn.name() == "FreezekitFrozenConv2dBackward"


class Doubled(Tensor):
    """As quantised and scaled weights are: what is computed of it is not what its memory says."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, F.batch_norm, torch.batch_norm):
            meant = lambda one: 2 * one.as_subclass(Tensor) if isinstance(one, cls) else one  # noqa: E731
            return func(*map(meant, args), **{name: meant(one) for name, one in (kwargs or {}).items()})
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("path", ["0.weight", "0.bias", "1.weight", "1.running_mean"])
def test_a_tensor_of_another_class_computes_by_it(path: str) -> None:
    layer, _, name = path.partition(".")
    x, stock, ours = torch.randn(2, 3, 6, 6), block(), fk.fuse(block())
    untouched = stock(x)
    for net in (stock, ours):
        of = net[int(layer)]
        own = getattr(of, name).detach().as_subclass(Doubled)
        setattr(of, name, nn.Parameter(own, requires_grad=False) if name in of._parameters else own)
    assert path == "1.running_mean" or not torch.equal(stock(x), untouched)  # a mean of zeros
    assert torch.equal(ours(x), stock(x))


def outcome(net: nn.Module, x: Tensor) -> Tensor | tuple[type[Exception], str]:
    try:
        return net(x)
    except Exception as error:
        return type(error), str(error)


NUMBERS: list[tuple[str, Any]] = [
    *[("padding", value) for value in (1, (1,), (1, 1, 1), (-1, -1), (True, 1), 1.0, [1, 1])],
    *[("stride", value) for value in (2, (2,), (0, 1), 0, (1.0, 1.0))],
    *[("dilation", value) for value in (2, (0, 0), (2,))],
    *[("groups", value) for value in (0, 3, 1.0, True)],
]


@pytest.mark.parametrize(("name", "value"), NUMBERS, ids=str)
def test_numbers_of_a_convolution_are_taken_or_refused_as_torch_does(name: str, value: Any) -> None:
    x, stock, ours = torch.randn(2, 3, 6, 6), block(), fk.fuse(block())
    for net in (stock, ours):
        setattr(net[0], name, value)
    mine, theirs = outcome(ours, x), outcome(stock, x)
    assert type(mine) is type(theirs)
    torch.testing.assert_close(mine, theirs) if isinstance(theirs, Tensor) else None
    assert isinstance(theirs, Tensor) or mine == theirs


def vectors_of_one(net: nn.Sequential) -> None:
    net[1] = PlainNorm(1)


def three_channels(net: nn.Sequential) -> None:
    net[1] = nn.BatchNorm2d(3).eval()


def wide_bias(net: nn.Sequential) -> None:
    net[0].bias.data = net[0].bias.data.double()


def narrow_weight(net: nn.Sequential) -> None:
    net[0].weight.data = net[0].weight.data[:, :2].clone()


def fewer_filters(net: nn.Sequential) -> None:
    net[0].weight.data = net[0].weight.data[:1].clone()
    net[0].bias.data = net[0].bias.data[:1].clone()


@pytest.mark.parametrize("change", [vectors_of_one, three_channels, wide_bias, narrow_weight, fewer_filters])
def test_tensors_of_other_sizes_and_dtypes_are_the_layers_affair(change: Callable[[nn.Sequential], None]) -> None:
    x, stock = torch.randn(2, 3, 6, 6), block()
    ours = fk.fuse(copy.deepcopy(stock))
    for net in (stock, ours):
        torch.manual_seed(1)
        change(net)
    mine, theirs = outcome(ours, x), outcome(stock, x)
    assert isinstance(theirs, Tensor) or mine == theirs
    torch.testing.assert_close(mine, theirs) if isinstance(theirs, Tensor) else None


def test_an_input_in_the_layout_of_onednn() -> None:
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False)
    ours, x = fk.fuse(copy.deepcopy(stock)), torch.randn(2, 3, 6, 6).to_mkldnn()
    torch.testing.assert_close(ours(x).to_dense(), stock(x).to_dense())


def test_another_call_of_modules_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, original = fk.fuse(block()), nn.Module.__call__
    seen: list[type[nn.Module]] = []

    def call(module: nn.Module, *arguments: object) -> object:
        seen.append(type(module))
        return original(module, *arguments)

    monkeypatch.setattr(nn.Module, "__call__", call)
    ours(torch.randn(2, 3, 6, 6))
    assert seen[1:] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


class PlainNorm(nn.Module):
    """As torchvision's FrozenBatchNorm2d: torch's promotion decides on the dtype of its result."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


register_norm(PlainNorm, always_fixed=True)


@pytest.mark.parametrize("casts", [False, True], ids=["bfloat16 convolution", "autocast"])
def test_a_norm_of_plain_operators_promotes(casts: bool) -> None:
    stock = nn.Sequential(nn.Conv2d(3, 4, 1), PlainNorm(4), nn.ReLU()).requires_grad_(False)
    x = torch.randn(2, 3, 5, 5)
    if not casts:
        stock[0].bfloat16()
        x = x.bfloat16()
    ours = fk.fuse(copy.deepcopy(stock))
    with torch.autocast("cpu", torch.bfloat16, enabled=casts):
        expected, got = stock(x), ours(x)
    assert expected.dtype == got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "change",
    [lambda norm: norm.double(), lambda norm: norm.half(), lambda norm: setattr(norm, "eps", -1e-3)],
    ids=["float64", "float16", "negative eps"],
)
def test_what_a_batch_norm_refuses_is_refused(change: Callable[[nn.Module], object]) -> None:
    x, stock, ours = torch.randn(2, 3, 6, 6), block(), fk.fuse(block())
    for net in (stock, ours):
        change(net[1])
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        stock(x)
    with pytest.raises(type(theirs.value)) as mine:
        ours(x)
    assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("size", [1, 2])
def test_strides_of_a_small_result(size: int) -> None:
    stock = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
    x = torch.randn(2, 8, size, size)
    assert fk.fuse(copy.deepcopy(stock))(x).stride() == stock(x).stride()
