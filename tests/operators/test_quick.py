"""The short way into layers' functions: the same values and nodes, and only for calls that have nothing unusual."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import freezekit as fk
from bench import overhead
from bench.memory import bytes_kept
from freezekit import _C
from tests.observe import Calls

X, W, B = torch.randn(2, 4, 6, 6), nn.Parameter(torch.randn(6, 2, 3, 3)), torch.randn(6)


class Sub(Tensor):
    pass


class Watch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(func)
        return func(*args, **(kwargs or {}))


seen: list[Any] = []


def conv2d(**changes: Any) -> Any:
    call = dict(input=X, weight=W, bias=B, stride=(1, 2), padding=1, dilation=(1, 1), groups=2)
    return _C.quick.conv2d(*{**call, **changes}.values())


def test_a_convolution_is_the_operator() -> None:
    expected = torch.ops.freezekit.conv2d(X, W, B, (1, 2), (1,), (1, 1), 2)
    y = conv2d()
    assert torch.equal(y, expected)
    assert y.grad_fn.name() == expected.grad_fn.name()
    with Calls() as calls:
        assert torch.equal(conv2d(), expected)
    assert calls.count["aten::convolution"] == 1  # which computes it
    assert torch.equal(conv2d(bias=None), torch.ops.freezekit.conv2d(X, W, None, (1, 2), (1,), (1, 1), 2))


MEAN, WEIGHT = torch.full((4,), 1.5), torch.rand(4)
STATISTICS = (MEAN, MEAN.square())
# The function's arguments after the input, and how many of them may be left out.
CALLS: dict[str, tuple[tuple[Any, ...], int]] = {
    "adaptive_avg_pool2d": ((2,), 0),
    "avg_pool2d": (((2, 1), None, 0, False, True, None), 5),
    "batch_norm": ((*STATISTICS, WEIGHT, None, False, 0.1, 1e-5), 5),
    "conv_transpose2d": ((torch.randn(4, 2, 3, 3), None, 2, (1, 1), 1, 1, 1), 6),
    "dropout": ((0.5, True, False), 3),
    "gelu": (("tanh",), 1),
    "group_norm": ((2, WEIGHT, WEIGHT, 1e-5), 3),
    "hardswish": ((False,), 1),
    "hardtanh": ((-0.5, 0.5, False), 3),
    "layer_norm": (((6, 6), None, None, 1e-5), 3),
    "leaky_relu": ((0.25, False), 2),
    "max_pool2d": ((3, (2, 1), 1, 1, True, False), 5),
    "mish": ((False,), 1),
    "pad": (((1, 2, 0, 1), "reflect", None), 1),
    "prelu": ((torch.tensor([0.25]),), 0),
    "relu": ((False,), 1),
    "silu": ((False,), 1),
}
ROWS: dict[str, tuple[tuple[Any, ...], int]] = {
    "adaptive_avg_pool1d": ((2,), 0),
    "avg_pool1d": (((2,), None, 1, True, False), 4),
    "conv1d": ((torch.randn(2, 4, 3), None, 1, 1, 1, 1), 5),
    "max_pool1d": ((3, 2, 1, 1, True, False), 5),
    "conv_transpose1d": ((torch.randn(4, 2, 3), None, 2, 1, 1, 1, 1), 6),
}
VOLUMES: dict[str, tuple[tuple[Any, ...], int]] = {
    "adaptive_avg_pool3d": (((2, 3, 1),), 0),
    "avg_pool3d": (((2, 1, 3), None, 0, False, True, None), 5),
    "conv3d": ((torch.randn(2, 4, 3, 3, 3), None, 1, 1, 1, 1), 5),
    "conv_transpose3d": ((torch.randn(4, 2, 3, 3, 3), None, 2, 1, 1, 1, 1), 6),
    "max_pool3d": ((3, 2, 1, 1, True, False), 5),
}
ALL = [
    *((name, X, *call) for name, call in CALLS.items()),
    *((name, X[..., 0], *call) for name, call in ROWS.items()),
    *((name, X[..., None].repeat(1, 1, 1, 1, 3), *call) for name, call in VOLUMES.items()),
]


def test_every_function_is_tried() -> None:
    assert {name for name, *_ in ALL} == {n for n in dir(_C.quick) if not n.startswith("_")} - {"conv2d", "set_backend"}


@pytest.mark.parametrize(("name", "x", "settings", "optional"), ALL, ids=[name for name, *_ in ALL])
@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_values_nodes_and_gradients_are_those_of_the_function(
    name: str, x: Tensor, settings: tuple[Any, ...], optional: int, backend: Any
) -> None:
    function, quick = getattr(fk.functional, name), getattr(_C.quick, name)
    if name == "gelu":  # which takes its setting by name

        def function(x: Tensor, *given: str) -> Tensor:
            return fk.functional.gelu(x, **dict(zip(["approximate"], given)))

    for count in range(len(settings) - optional, len(settings) + 1):
        found = []
        for call in (quick, function):
            torch.manual_seed(0)
            ours = x.clone().requires_grad_()
            with fk.backend(backend):
                with contextlib.nullcontext() if call is quick else Watch():  # which sends calls the long way
                    y = call(ours, *settings[:count])
                assert y is not None
                (dx,) = torch.autograd.grad(y, ours, torch.linspace(-1, 1, y.numel()).view_as(y))
            found.append((y.detach(), dx, y.grad_fn.name()))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
        assert found[0][2] == found[1][2]
    assert quick(x, *settings, None) is None  # one argument too many


@pytest.mark.parametrize(("name", "x", "settings", "optional"), ALL, ids=[name for name, *_ in ALL])
def test_unusual_calls_are_left_to_python_whatever_they_are(
    name: str, x: Tensor, settings: tuple[Any, ...], optional: int
) -> None:
    quick = getattr(_C.quick, name)
    for place in range(len(settings) + 1):
        arguments: list[Any] = [x, *settings]
        for odd in ("text", 1j, X.as_subclass(Sub)):
            arguments[place] = odd
            assert quick(*arguments) is None
    assert quick() is None


def test_in_place_gives_the_tensor_itself() -> None:
    settings_of = {"relu": (), "hardtanh": (-1.0, 1.0), "leaky_relu": (0.5,), "dropout": (0.5, True)}
    for name, settings in {**settings_of, **dict.fromkeys(["silu", "hardswish", "mish"], ())}.items():
        x = X.clone()
        assert getattr(_C.quick, name)(x, *settings, True) is x
        assert x._version > 0


@pytest.mark.parametrize("case", overhead.CASES, ids=lambda case: case.name)
def test_what_the_bench_times_is_the_quick_way(case: overhead.TinyLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    def goes_on(*arguments: object) -> bool:
        raise LookupError(case.name)

    monkeypatch.setattr("freezekit.functional._torch._learns", goes_on)
    monkeypatch.setattr("freezekit.functional._conv2d.has_torch_function_variadic", goes_on)
    layer = fk.convert(case.make())
    x = torch.ones(1, case.channels, 8, 8, requires_grad=True)
    assert layer(x).requires_grad
    if not isinstance(layer, nn.BatchNorm2d):  # by batch statistics it is torch's alone
        with Watch(), pytest.raises(LookupError):
            layer(x)


@pytest.mark.parametrize("name", ["silu", "gelu", "hardswish", "mish"])
@pytest.mark.parametrize("around", [contextlib.nullcontext, Watch, fk.enabled])
def test_a_chain_is_made_on_either_way(name: str, around: Any) -> None:
    norm, call = fk.convert(nn.GroupNorm(2, 8)), getattr(fk.functional, name)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    with around():
        kept = bytes_kept(lambda x: call(norm(x)), x)
    assert x.nbytes <= kept < 1.1 * x.nbytes


@pytest.mark.parametrize("name", ["silu", "hardswish", "mish"])
@pytest.mark.parametrize("part", [lambda y: y[:], lambda y: y.view(2, 8, -1), lambda y: y[:, :4]])
def test_in_place_of_a_view_of_a_norm_s_result(name: str, part: Any) -> None:
    found = []
    for call in (getattr(nn.functional, name), getattr(fk.functional, name)):
        torch.manual_seed(0)
        x = torch.randn(2, 8, 16, 16, requires_grad=True)
        y = fk.functional.group_norm(x, 2)
        z = call(part(y), inplace=True)
        found.append((z.detach(), *torch.autograd.grad(z.square().sum() + y.sum(), x)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    "changes",
    [
        {"input": None}, {"input": X[0]}, {"input": X.as_subclass(Sub)}, {"weight": 3}, {"weight": W.as_subclass(Sub)},
        {"bias": 1.0}, {"bias": B.as_subclass(Sub)}, {"stride": [1, 1]}, {"stride": (1,)}, {"stride": (1, 2.0)},
        {"padding": "same"}, {"dilation": True}, {"dilation": 2**63}, {"groups": (1, 1)}, {"groups": 1.0},
    ],
    ids=lambda changes: " ".join(f"{n} {type(v).__name__ if isinstance(v, Tensor) else v}" for n, v in changes.items()),
)  # fmt: skip
def test_unusual_convolutions_are_left_to_python(changes: dict[str, Any]) -> None:
    assert conv2d(**changes) is None


def test_a_demand_for_kernels_is_left_to_python() -> None:
    with fk.backend("native"):
        assert conv2d() is None
        assert _C.quick.relu(X) is None


def test_what_torch_refuses_is_left_to_it() -> None:
    assert _C.quick.batch_norm(X, *STATISTICS, None, None, True) is None
    assert _C.quick.batch_norm(X, *STATISTICS, None, None, False, 0.1, -1.0) is None
    assert _C.quick.dropout(X, 1.5) is None
    assert _C.quick.hardtanh(X, 1.0, -1.0) is None
    assert _C.quick.group_norm(torch.ones(1, 4), 4) is None
    assert _C.quick.group_norm(X, 0) is None


def test_a_plain_call_is_refused_as_one_that_is_looked_at() -> None:
    """The first is checked in plain numbers, and only then in the words that the second is always told."""
    draw, refused = random.Random(0), 0

    def outcome(*call: Any) -> tuple[int, ...] | str:
        try:
            y = _C.quick.conv2d(*call)
        except RuntimeError as error:
            return str(error).split("\n")[0]
        return "left to torch" if y is None else (*y.shape, *y.stride(), y.requires_grad)  # of no input channels

    def mostly(usual: list[int], *odd: int) -> int:
        return draw.choice(odd if draw.random() < 0.05 else usual)

    for _ in range(2000):
        groups, channels, filters = mostly([1, 1, 2], -1, 0, 2**31), mostly([2, 4], 0, 1), mostly([2, 4], 0, 1)
        x = torch.ones(mostly([1, 2], 0), channels, mostly([4, 5], 0, 1), 5, requires_grad=draw.random() < 0.7)
        w = torch.ones(filters, channels // max(groups, 1), mostly([1, 3], 0, 7), 3)
        b = draw.choice([None, torch.ones(filters), torch.ones(mostly([filters], 3)), torch.ones([1] * mostly([1], 2))])
        if draw.random() < 0.05:
            w = w.double()
        if b is not None and draw.random() < 0.05:
            b = b.double()
        settings = [tuple(mostly([1, 1, 2], -1, 0, 2**31) for _ in range(2)) for _ in range(3)]
        call = (x, w, b, *settings, groups)
        found = outcome(*call)
        with Calls():
            assert outcome(*call) == found, call
        refused += isinstance(found, str)
    assert 500 < refused < 1500


def test_errors_are_the_operator_s() -> None:
    with pytest.raises(RuntimeError, match="groups"):
        conv2d(groups=5)
    with pytest.raises(ValueError, match="backend"):
        _C.quick.set_backend("cudnn")
    with pytest.raises(TypeError):
        _C.quick.set_backend(None)


def test_a_profiler_and_modes_see_the_operators() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fk.functional.relu(X.clone().requires_grad_()).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"freezekit::activation", "freezekit::activation_bits", "freezekit::gate"} <= names


def test_function_modes_see_the_calls() -> None:
    seen.clear()
    with Watch():
        fk.functional.conv2d(X, W, B, groups=2)
        fk.functional.relu(X.clone().requires_grad_())
    assert fk.functional.conv2d in seen
    assert fk.functional.relu in seen or fk.functional.relu.__wrapped__ in seen


@pytest.mark.parametrize("name", ["activation_bits", "conv2d", "dropout_bits", "max_pool2d_taps", "gate"])
def test_a_plain_step_steps_past_the_dispatcher_and_one_that_is_looked_at_does_not(name: str) -> None:
    """Forward and backward, while a gradient is recorded: a kernel in the step's place is met in a profile alone."""

    def step() -> None:
        x = X.clone().requires_grad_()
        y = fk.functional.conv2d(fk.functional.relu(x), W.detach(), None, 1, 1, 1, 2)
        torch.autograd.grad(fk.functional.max_pool2d(fk.functional.dropout(y, 0.5), 2).sum(), x)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        raise LookupError(name)

    with torch.library._scoped_library("freezekit", "IMPL") as library:
        library.impl(name, replaced, "CPU")
        step()
        with pytest.raises(LookupError, match=name), torch.profiler.profile():
            step()


def test_below_autograd_nothing_is_recorded() -> None:
    with torch._C._AutoDispatchBelowAutograd():
        assert _C.quick.relu(X.clone().requires_grad_(), False) is None
        assert not fk.functional.relu(X.clone().requires_grad_()).requires_grad
