"""Activations, dropout and max pooling by freezekit's own kernels: emulated on a CPU, and on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import freezekit as fk
import freezekit.functional as ff
from freezekit import _C
from tests.conftest import gpu, on
from tests.observe import bytes_kept

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0]
# name -> (freezekit's, torch's, its keyword arguments, kernels of forward and backward)
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any], list[str]]] = {
    "relu": (ff.relu, F.relu, {}, ["activation_relu", "gate_select"]),
    "relu6": (ff.relu6, F.relu6, {}, ["activation_hardtanh", "gate_select"]),
    "hardtanh": (ff.hardtanh, F.hardtanh, {"min_val": -0.1, "max_val": 0.1}, ["activation_hardtanh", "gate_select"]),
    "leaky_relu": (ff.leaky_relu, F.leaky_relu, {"negative_slope": 0.3}, ["activation_leaky_relu", "gate_scale"]),
}
POOLS: list[dict[str, Any]] = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "ceil_mode": True},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 3)},
    {"kernel_size": 17, "stride": 4, "padding": 8},
]


@pytest.fixture(params=["emulated", gpu])
def own(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """(backend, device)"""
    return request.param, "cuda" if request.param == "native" else "cpu"


class Log:
    """The kernels that ran within the block."""

    def __enter__(self) -> list[str]:
        _C.set_launch_log(True)
        self.kernels: list[str] = []
        return self.kernels

    def __exit__(self, *_: object) -> None:
        self.kernels += [row["kernel"] for row in _C.take_launch_log()]
        _C.set_launch_log(False)


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))


def step(function: Callable[..., Tensor], x: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf * 1 if arguments.get("inplace") else leaf, **arguments)
    # Small integers: sums of them are exact in every dtype.
    g = torch.linspace(-2, 2, y.numel()).round().view(y.shape).to(y.device, y.dtype)
    return y.detach(), grad(y, leaf, torch.empty_like(y).copy_(g))[0]


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(
    name: str, dtype: torch.dtype, layout: torch.memory_format, inplace: bool, own: tuple[Any, str]
) -> None:
    ours, stock, arguments, kernels = ACTIVATIONS[name]
    x = torch.randn(2, 3, 5, 7).to(dtype).contiguous(memory_format=layout)
    # On a CPU torch's hardtanh gives NaN a gradient or not, depending on where in the tensor it stands.
    stray = torch.tensor(SPECIAL)
    x[0, 0, 0, :5] = stray.nan_to_num(1.0) if kernels[0] == "activation_hardtanh" else stray
    x = x.to(own[1])
    with Log() as launched, on(own[0]):
        actual = step(ours, x, {**arguments, "inplace": inplace})
    expected = step(stock, x, {**arguments, "inplace": inplace and name != "hardtanh"})
    assert launched == kernels
    for a, e in zip(actual, expected):
        assert equal(a, e)
        assert a.stride() == e.stride()


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 31, 33, 1000])
def test_every_size_keeps_one_bit_per_element(numel: int, own: tuple[Any, str]) -> None:
    x = torch.randn(numel, device=own[1])
    with on(own[0]):
        actual = step(ff.relu, x, {})
        kept = bytes_kept(ff.relu, x.clone().requires_grad_())
    assert all(map(torch.equal, actual, step(F.relu, x, {})))
    assert kept == (numel + 31) // 32 * 4


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_drops_what_torch_drops(dtype: torch.dtype, inplace: bool, own: tuple[Any, str]) -> None:
    x = torch.randn(3, 5, 7, 9).to(own[1], dtype)
    results = []
    for function in (ff.dropout, F.dropout):
        torch.manual_seed(3)
        with Log() as launched, on(own[0]):
            results.append(step(function, x, {"p": 0.3, "inplace": inplace}))
        after = torch.rand(3, device=own[1])
        results[-1] += (after,)
        if function is ff.dropout:
            packed = ["pack_bytes"] if own[0] == "native" else ["activation_relu", "gate_scale"]
            assert launched == [*packed, "gate_scale"]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arguments", POOLS, ids=lambda a: "-".join(f"{k}{v}" for k, v in a.items()))
def test_max_pool2d(
    arguments: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format, own: tuple[Any, str]
) -> None:
    x = torch.randint(-9, 9, (2, 3, 9, 12)).to(dtype)
    x[0, 0, 3, :5] = float("nan")
    x[1, 1] = -float("inf")
    x = x.contiguous(memory_format=layout).to(own[1])
    with Log() as launched, on(own[0]):
        actual = step(ff.max_pool2d, x, arguments)
    assert launched == ["max_pool", "max_pool_scatter"]
    for a, e in zip(actual, step(F.max_pool2d, x, arguments)):
        assert equal(a, e)
        assert a.stride() == e.stride()


def test_indices_are_torch_s(own: tuple[Any, str]) -> None:
    x = torch.randn(2, 3, 9, 12, device=own[1], requires_grad=True)
    with on(own[0]):
        y, indices = ff.max_pool2d(x, 3, 2, 1, return_indices=True)
    expected = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert torch.equal(y, expected[0])
    assert torch.equal(indices, expected[1])


def test_gradients_of_gradients(own: tuple[Any, str]) -> None:
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, device=own[1], requires_grad=True)
    functions = (ff.relu, ff.leaky_relu, lambda v: ff.max_pool2d(v, 3, 2, 1))
    with Log() as launched, on(own[0]):
        for function in functions:
            assert gradcheck(function, (x,))
            assert gradgradcheck(function, (x,))
    assert {"gate_scale", "gate_select", "max_pool_scatter", "max_pool_gather"} <= set(launched)


def test_batch_of_none(own: tuple[Any, str]) -> None:
    x = torch.randn(0, 3, 8, 8, device=own[1])
    with on(own[0]):
        for ours, stock in ((ff.relu, F.relu), (lambda v: ff.max_pool2d(v, 2), lambda v: F.max_pool2d(v, 2))):
            actual, expected = step(ours, x, {}), step(stock, x, {})
            assert [a.shape for a in actual] == [e.shape for e in expected]


def test_native_demands_its_kernels() -> None:
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    with fk.backend("native"):
        for function in (ff.relu, ff.leaky_relu, ff.dropout, lambda v: ff.max_pool2d(v, 2)):
            with pytest.raises(
                RuntimeError, match="backend='native' cannot compute .*: it needs CUDA tensors, got one on cpu"
            ):
                function(x)


@pytest.mark.parametrize("function", [ff.relu, ff.relu6, ff.dropout, lambda v: ff.max_pool2d(v, 2)])
def test_kernels_take_no_tensors_of_transforms(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 1, 2, 4, 4)
    calls = (
        lambda: torch.vmap(function, randomness="same")(x),
        lambda: torch.func.jvp(function, (x[0],), (x[1],)),
    )
    for call in calls:
        refused = pytest.raises(RuntimeError, match="a torch.func transform|a forward-mode gradient")
        with fk.testing.emulated(), refused:
            call()
        call()


def test_a_backward_pass_runs_on_what_its_forward_pass_ran_on() -> None:
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    with fk.testing.emulated():
        y = ff.max_pool2d(ff.relu(x), 2)
    with Log() as launched:
        y.sum().backward()
    assert launched == ["max_pool_scatter", "gate_select"]


@pytest.mark.gpu
def test_auto_takes_no_kernel_that_never_ran_on_a_gpu() -> None:
    x = torch.randn(1, 2, 4, 4, device="cuda", requires_grad=True)
    with Log() as launched:
        ff.max_pool2d(ff.relu(x), 2).sum().backward()
    assert launched == []
