"""Pools and pads: torch's values, indices, layouts and gradients; a byte per output element kept, or sizes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_leaves

import freezekit.functional as ff
from tests.observe import bytes_kept

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
MAX_POOLS: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 3), "ceil_mode": True},
    {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    {"kernel_size": 17, "stride": 4, "padding": 8},
    {"kernel_size": (1, 5), "stride": 1, "padding": (0, 2)},
    {"kernel_size": 20},
]
# function's name, input size, arguments
LINEAR: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("avg_pool1d", (2, 3, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("avg_pool2d", (2, 3, 8, 9), {"kernel_size": (3, 2)}),
    (
        "avg_pool2d",
        (2, 3, 8, 9),
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "divisor_override": 2},
    ),
    ("avg_pool2d", (2, 3, 8, 9), {"kernel_size": 3, "padding": 1, "count_include_pad": False}),
    ("avg_pool3d", (2, 3, 5, 6, 7), {"kernel_size": 2, "ceil_mode": True}),
    ("adaptive_avg_pool1d", (2, 3, 9), {"output_size": 4}),
    ("adaptive_avg_pool2d", (2, 3, 9, 8), {"output_size": (4, None)}),
    ("adaptive_avg_pool2d", (2, 3, 9, 8), {"output_size": 1}),
    ("adaptive_avg_pool3d", (2, 3, 5, 6, 7), {"output_size": 2}),
    *(("pad", (2, 3, 9), {"pad": (1, 2), "mode": m}) for m in ("reflect", "replicate")),
    *(("pad", (2, 3, 8, 9), {"pad": (1, 2, 0, 3), "mode": m}) for m in ("reflect", "replicate", "circular")),
    *(("pad", (2, 3, 5, 6, 7), {"pad": (1, 2, 0, 3, 2, 1), "mode": m}) for m in ("reflect", "replicate")),
]


def special(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random values with ties, NaN and windows of nothing but -inf."""
    x = torch.randint(-9, 9, size).to(dtype)
    x[0, 0, 3, :5] = float("nan")
    x[1] = -float("inf")
    return x


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))


@pytest.mark.parametrize("settings", MAX_POOLS, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool_is_torch_s(dtype: torch.dtype, memory_format: torch.memory_format, settings: dict[str, Any]) -> None:
    x = special((3, 70, 20, 21), dtype).to(memory_format=memory_format)
    ours, stock = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, indices = ff.max_pool2d(ours, **settings, return_indices=True)
    expected, expected_indices = F.max_pool2d(stock, **settings, return_indices=True)
    assert equal(y, expected)
    assert torch.equal(indices, expected_indices)
    assert y.stride() == expected.stride()
    g = torch.randint(-2, 3, y.shape).to(dtype)  # sums of these are exact
    for a, b in zip(grad(y, ours, g), grad(expected, stock, g), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize(("kernel", "size"), [(3, 1), (16, 1), (17, 2)])
def test_max_pool_keeps_the_place_in_the_window(kernel: int, size: int) -> None:
    x = torch.randn(2, 3, 40, 40, requires_grad=True)
    out = F.max_pool2d(x, kernel, 2).numel()
    assert bytes_kept(lambda t: ff.max_pool2d(t, kernel, 2), x) == out * size
    assert bytes_kept(lambda t: ff.max_pool2d(t, kernel, 2), x.detach()) == 0


def test_max_pool_of_no_batch_unbatched_and_windows_outside() -> None:
    x = torch.randn(3, 8, 8, requires_grad=True)
    assert torch.equal(ff.max_pool2d(x, 2), F.max_pool2d(x, 2))
    y, i = ff.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(i, F.max_pool2d(x, 2, return_indices=True)[1])
    empty = torch.randn(0, 3, 8, 8, requires_grad=True)
    y = ff.max_pool2d(empty, 2)
    assert y.shape == (0, 3, 4, 4)
    assert grad(y.sum(), empty)[0].shape == empty.shape
    # Both taps of the dilated window miss the one column: nothing is taken, and nothing gets the gradient.
    narrow = torch.randn(1, 1, 4, 1, requires_grad=True)
    y = ff.max_pool2d(narrow, (1, 2), 1, (0, 1), (1, 2))
    assert y.isneginf().all()
    assert not grad(y.sum(), narrow)[0].any()


@pytest.mark.parametrize(
    "settings",
    [{"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2, "dilation": 3, "ceil_mode": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool_of_one_dimension(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    x = torch.randint(-9, 9, (2, 3, 9)).to(dtype)
    x[0, 0, 3:5], x[1, 1] = float("nan"), -float("inf")
    for given in (x, x[0], x.transpose(0, 1).contiguous().transpose(0, 1)):
        leaves = [given.clone().requires_grad_() for _ in range(2)]
        pools = (ff.max_pool1d, F.max_pool1d)
        results = [pool(leaf, **settings, return_indices=True) for pool, leaf in zip(pools, leaves)]
        assert equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        g = torch.randint(-2, 3, results[0][0].shape).to(dtype)
        assert torch.equal(*(grad(y, leaf, g)[0] for (y, _), leaf in zip(results, leaves)))
    learns = torch.randn(2, 3, 40, requires_grad=True)
    assert bytes_kept(lambda t: ff.max_pool1d(t, 3, 2), learns) == 2 * 3 * 19


@pytest.mark.parametrize("mode", ["learns", "in no_grad", "needs none"])
@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_max_pools_lay_out_results_as_torch(axes: int, transposed: bool, indices: bool, mode: str) -> None:
    x = torch.randn(2, 4, *[9 + axis for axis in range(axes)])
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if transposed else x
    x.requires_grad_(mode != "needs none")
    with torch.set_grad_enabled(mode != "in no_grad"):
        pools = (getattr(module, f"max_pool{axes}d") for module in (ff, F))
        ours, stock = (pool(x, 2, 1, 0, 1, False, indices) for pool in pools)
    for result, expected in zip(tree_leaves(ours), tree_leaves(stock), strict=True):
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()


POOLS_3D: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": (1, 2, 3), "stride": (1, 2, 1), "padding": (0, 1, 1), "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3, 2), "dilation": (2, 1, 3), "padding": 1},
    {"kernel_size": 2, "dilation": 2, "padding": 1, "stride": 1},
    {"kernel_size": 7, "stride": 1},
]


@pytest.mark.parametrize("settings", POOLS_3D, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool_of_three_dimensions(dtype: torch.dtype, channels_last: bool, settings: dict[str, Any]) -> None:
    x = torch.randint(-9, 9, (2, 3, 9, 8, 10)).to(dtype)
    x[0, 0, 3:5] = float("nan")
    if channels_last:
        x = x.to(memory_format=torch.channels_last_3d)
    for given in (x, x[0], x[..., ::2], x.transpose(0, 1)):
        if given.dim() == 5 and settings["kernel_size"] == 7 and given.shape[-1] < 7:
            continue
        leaves = [given.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
        pools = (ff.max_pool3d, F.max_pool3d)
        results = [pool(leaf, **settings, return_indices=True) for pool, leaf in zip(pools, leaves)]
        for ours, stock in zip(*results):
            assert equal(ours, stock)
            assert ours.stride() == stock.stride()
        # Without indices nothing of torch's computes.
        results.append((ff.max_pool3d(leaves[0], **settings), results[0][1]))
        assert equal(results[2][0], results[1][0])
        assert results[2][0].stride() == results[1][0].stride()
        g = torch.randn(results[0][0].shape).to(dtype)
        gradients = [grad(y, leaf, g)[0] for (y, _), leaf in zip(results, (*leaves, leaves[0]))]
        for ours in (gradients[0], gradients[2]):
            assert torch.equal(ours, gradients[1])
            assert ours.stride() == gradients[1].stride()
        assert results[0][0].grad_fn.name() == results[2][0].grad_fn.name() == "FreezekitMaxPool3dBackward"


@pytest.mark.parametrize("settings", POOLS_3D, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_windows_of_nothing_but_minus_infinity_give_their_first_place_the_gradient(
    channels_last: bool, settings: dict[str, Any]
) -> None:
    """As torch does where it lays tensors out as NCDHW; its other kernel forgets the plane (and so do its indices)."""
    ours = torch.full((2, 3, 9, 8, 10), -float("inf"))
    stock = ours.clone().requires_grad_()
    if channels_last:
        ours = ours.to(memory_format=torch.channels_last_3d)
    y, expected = ff.max_pool3d(ours.requires_grad_(), **settings), F.max_pool3d(stock, **settings)
    g = torch.randint(-2, 3, y.shape).float()
    assert torch.equal(grad(y, ours, g)[0], grad(expected, stock, g)[0])


@pytest.mark.parametrize(("kernel", "size"), [(2, 1), (6, 1), (7, 2), ((32, 32, 33), 4)])
def test_max_pool3d_keeps_the_place_in_the_window(kernel: Any, size: int) -> None:
    x = torch.randn(2, 3, *((9, 10, 8) if isinstance(kernel, int) else (33, 32, 34)), requires_grad=True)
    out = F.max_pool3d(x, kernel, 1).numel()
    assert bytes_kept(lambda t: ff.max_pool3d(t, kernel, 1), x) == out * size
    assert bytes_kept(lambda t: ff.max_pool3d(t, kernel, 1), x.detach()) == 0
    ours, stock = (grad(pool(x, kernel, 1).sum(), x)[0] for pool in (ff.max_pool3d, F.max_pool3d))
    assert torch.equal(ours, stock)


def test_max_pool3d_of_no_batch_and_windows_outside() -> None:
    empty = torch.randn(0, 3, 4, 4, 4, requires_grad=True)
    y = ff.max_pool3d(empty, 2)
    assert y.shape == (0, 3, 2, 2, 2)
    assert grad(y.sum(), empty)[0].shape == empty.shape
    # Both taps of the dilated window miss the one column: nothing is taken, and nothing gets the gradient.
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        narrow = torch.randn(1, 2, 3, 4, 1).to(memory_format=memory_format).requires_grad_()
        y = ff.max_pool3d(narrow, (1, 1, 2), 1, (0, 0, 1), (1, 1, 2))
        assert y.isneginf().all()
        assert not grad(y.sum(), narrow)[0].any()


def test_windows_may_be_far_larger_than_the_input() -> None:
    far = 1 << 20
    for axes, ours, stock in ((2, ff.max_pool2d, F.max_pool2d), (3, ff.max_pool3d, F.max_pool3d)):
        x = torch.randn(2, 3, *(5,) * axes, requires_grad=True)
        settings = ((*(1,) * (axes - 1), 2 * far), 1, (*(0,) * (axes - 1), far))
        y, expected = ours(x, *settings), stock(x, *settings)
        assert torch.equal(y, expected)
        g = torch.randn_like(y)
        assert torch.equal(grad(y, x, g)[0], grad(expected, x, g)[0])


@pytest.mark.parametrize("settings", POOLS_3D[:4], ids=str)
def test_max_pool3d_derivatives_of_every_order(settings: dict[str, Any]) -> None:
    x = torch.randperm(2 * 6 * 5 * 7).double().view(1, 2, 6, 5, 7).requires_grad_()

    def f(t: Tensor) -> Tensor:
        return ff.max_pool3d(t * t / 50, **settings)

    assert gradcheck(f, x, fast_mode=True)
    assert gradgradcheck(f, x, fast_mode=True)


def test_max_pool3d_transforms_traces_and_errors() -> None:
    x, t = torch.randn(3, 2, 4, 4, 4), torch.randn(3, 2, 4, 4, 4)

    def ours(v: Tensor) -> Tensor:
        return ff.max_pool3d(v, 3, 2, 1)

    def stock(v: Tensor) -> Tensor:
        return F.max_pool3d(v, 3, 2, 1)

    assert torch.equal(torch.func.vmap(ours)(x), torch.func.vmap(stock)(x))
    assert torch.equal(torch.func.jvp(ours, (x,), (t,))[1], torch.func.jvp(stock, (x,), (t,))[1])
    leaf = x.requires_grad_()
    cotangents = torch.randn(4, 3, 2, 2, 2, 2)
    a, b = (grad(f(leaf), leaf, cotangents, is_grads_batched=True)[0] for f in (ours, stock))
    torch.testing.assert_close(a, b)
    meta = torch.empty(2, 3, 4, 4, 4, device="meta", requires_grad=True)
    assert grad(ff.max_pool3d(meta, 2).sum(), meta)[0].shape == meta.shape
    for arguments in ((5,), (2, 1, 2), (0,), ((1, 2),), (2, -1), (2, 1, -1), (2, 1, 1, 0)):
        with pytest.raises(RuntimeError):
            F.max_pool3d(leaf, *arguments)
        with pytest.raises(RuntimeError):
            ff.max_pool3d(leaf, *arguments)
    with pytest.raises(RuntimeError, match="kernel_size must be one number or three"):
        torch.ops.freezekit.max_pool3d(leaf, [2, 2])


@pytest.mark.parametrize("settings", [{"kernel_size": 2}, POOLS_3D[1], POOLS_3D[3]], ids=str)
def test_what_traces_record_of_max_pool3d_computes_the_same(settings: dict[str, Any]) -> None:
    """Traces see ATen's operators where tensors with data have a loop."""
    x = torch.randint(-9, 9, (2, 3, 9, 8, 10)).float()

    def gradient(t: Tensor, g: Tensor) -> Tensor:
        leaf = t.detach().requires_grad_()
        return grad(ff.max_pool3d(leaf, **settings), leaf, g)[0]

    g = torch.randint(-2, 3, F.max_pool3d(x, **settings).shape).float()
    traced = torch.fx.experimental.proxy_tensor.make_fx(gradient)(x, g)
    assert torch.equal(traced(x, g), gradient(x, g))
    other = x.flip(2, 3).contiguous()
    assert torch.equal(traced(other, g), gradient(other, g))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=["ncdhw", "ndhwc"])
def test_max_pool3d_opcheck(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 6, 8, 8).to(memory_format=memory_format).requires_grad_()
    torch.library.opcheck(torch.ops.freezekit.max_pool3d, (x, [3], [2], [1]))
    torch.library.opcheck(torch.ops.freezekit.max_pool3d_with_indices, (x, [3, 2, 3], [2], [1], [1, 2, 1]))


def test_max_pool_errors_are_torch_s() -> None:
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    for arguments in ((5,), (2, 1, 2), (0,), ((1, 2, 3),)):
        with pytest.raises(RuntimeError):
            F.max_pool2d(x, *arguments)
        with pytest.raises(RuntimeError):
            ff.max_pool2d(x, *arguments)
    with pytest.raises(RuntimeError, match="taps must have dtype"):
        torch.ops.freezekit.max_pool2d_scatter(x, x, [1, 1, 8, 8], [2])


def test_foreign_taps_write_nowhere() -> None:
    dy, taps = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    assert not torch.ops.freezekit.max_pool2d_scatter(dy, taps, [1, 1, 4, 4], [2]).any()


@pytest.mark.parametrize("settings", MAX_POOLS[:4], ids=str)
def test_max_pool_derivatives_of_every_order(settings: dict[str, Any]) -> None:
    x = torch.randperm(2 * 2 * 8 * 7).double().view(2, 2, 8, 7).requires_grad_()

    def f(t: Tensor) -> Tensor:
        return ff.max_pool2d(t * t / 50, **settings)

    assert gradcheck(f, x, fast_mode=True)
    assert gradgradcheck(f, x, fast_mode=True)


def test_max_pool_transforms() -> None:
    x, t = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8)

    def ours(v: Tensor) -> Tensor:
        return ff.max_pool2d(v, 3, 2, 1)

    def stock(v: Tensor) -> Tensor:
        return F.max_pool2d(v, 3, 2, 1)

    assert torch.equal(torch.func.vmap(ours)(x), torch.func.vmap(stock)(x))
    assert torch.equal(torch.func.jvp(ours, (x,), (t,))[1], torch.func.jvp(stock, (x,), (t,))[1])
    leaf = x.requires_grad_()
    cotangents = torch.randn(4, 3, 2, 4, 4)
    a, b = (grad(f(leaf), leaf, cotangents, is_grads_batched=True)[0] for f in (ours, stock))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_max_pool_opcheck(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 8, 8).to(memory_format=memory_format).requires_grad_()
    ops = torch.ops.freezekit
    torch.library.opcheck(ops.max_pool2d, (x, [3], [2], [1]))
    torch.library.opcheck(ops.max_pool2d_with_indices, (x, [3], [2], [1]))
    torch.library.opcheck(ops.max_pool2d_taps, (x.detach(), [3], [2], [1]))
    y, taps = ops.max_pool2d_taps(x.detach(), [3], [2], [1])
    torch.library.opcheck(ops.max_pool2d_scatter, (y.requires_grad_(), taps, x.shape, [3], [2], [1]))
    torch.library.opcheck(ops.max_pool2d_gather, (x, taps, x.shape, [3], [2], [1]))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_layers_are_torch_s(
    case: tuple[str, tuple[int, ...], dict[str, Any]], dtype: torch.dtype, channels_last: bool
) -> None:
    name, size, settings = case
    x = torch.randn(size).to(dtype)
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    elif channels_last or (dtype == torch.bfloat16 and name == "avg_pool3d"):
        return  # channels_last is of four dimensions; torch has no such pool
    ours, stock = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = getattr(ff, name)(ours, **settings), getattr(F, name)(stock, **settings)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    g = torch.randn(y.shape).to(dtype)
    a, b = grad(y, ours, g)[0], grad(expected, stock, g)[0]
    torch.testing.assert_close(a, b)
    assert a.stride() == b.stride() or settings.get("output_size") == 1


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_layers_keep_nothing(case: tuple[str, tuple[int, ...], dict[str, Any]]) -> None:
    name, size, settings = case
    x = torch.randn(size, requires_grad=True)
    assert bytes_kept(lambda t: getattr(ff, name)(t, **settings), x) == 0
    unbatched = torch.randn(size[1:], requires_grad=True)
    assert torch.equal(getattr(ff, name)(unbatched, **settings), getattr(F, name)(unbatched, **settings))


@pytest.mark.parametrize("case", LINEAR[::2], ids=str)
def test_linear_layers_derivatives(case: tuple[str, tuple[int, ...], dict[str, Any]]) -> None:
    name, size, settings = case
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)

    def f(t: Tensor) -> Tensor:
        return getattr(ff, name)(t * t, **settings)

    assert gradcheck(f, x, fast_mode=True)
    assert gradgradcheck(f, x, fast_mode=True)


def test_linear_layers_opcheck_and_transforms() -> None:
    ops = torch.ops.freezekit
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    torch.library.opcheck(ops.avg_pool, (x, [2, 2], [2, 2], [0, 0]))
    torch.library.opcheck(ops.adaptive_avg_pool, (x, [3, 3]))
    torch.library.opcheck(ops.reflection_pad, (x, [1, 1, 2, 2]))
    torch.library.opcheck(ops.replication_pad, (x, [1, 1, 2, 2]))
    t = torch.randn(2, 3, 8, 8)
    jvp = torch.func.jvp(lambda v: ff.avg_pool2d(v, 2), (t,), (t,))[1]
    assert torch.equal(jvp, F.avg_pool2d(t, 2))
    assert torch.equal(torch.func.vmap(lambda v: ff.pad(v, (1, 1), "reflect"))(t), F.pad(t, (1, 1, 0, 0), "reflect"))
