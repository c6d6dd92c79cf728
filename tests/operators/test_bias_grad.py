"""db: of every layout and dtype, exact on integers, made by freezekit's own reduction where that is asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import freezekit as fk
import freezekit._C as _C
from freezekit.functional import conv2d, conv2d_bias_grad
from tests.observe import Calls

OP = torch.ops.freezekit.conv2d_bias_grad.default
SIZE = (3, 5, 6, 7)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def channels_last(size: tuple[int, ...]) -> Tensor:
    return torch.randint(-2, 3, size).float().to(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "contiguous": lambda size: torch.randint(-2, 3, size).float(),
    "channels_last": channels_last,
    "expanded": lambda size: torch.ones(()).expand(size),
    "expanded over the batch": lambda size: torch.randint(-2, 3, (1, *size[1:])).float().expand(size),
    "a slice of channels": lambda size: channels_last((size[0], size[1] + 4, *size[2:]))[:, 2 : 2 + size[1]],
    "transposed": lambda size: torch.randint(-2, 3, (*size[:2], size[3], size[2])).float().transpose(2, 3),
    "off 16 bytes": lambda size: torch.randint(-2, 3, (torch.Size(size).numel() + 1,)).float()[1:].view(size),
}


def launched(call: Callable[[], object]) -> list[str]:
    _C.set_launch_log(True)
    try:
        call()
        return [row["operator"] for row in _C.take_launch_log()]
    finally:
        _C.set_launch_log(False)


@pytest.mark.parametrize("size", [SIZE, (0, 5, 6, 7), (1, 1, 1, 1), (2, 40, 1, 3), (70, 2, 20, 13)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_integers_are_exact(
    layout: Callable[[tuple[int, ...]], Tensor], size: tuple[int, ...], place: tuple[str, str]
) -> None:
    _, device = place
    base = layout(size).to(device)
    for dtype in DTYPES:
        dy = base.to(dtype)  # keeps strides
        db = conv2d_bias_grad(dy)
        # A sum past 256 is no integer of bfloat16: the exact one is rounded once.
        assert torch.equal(db, dy.double().sum((0, 2, 3)).to(dtype))
        assert db.shape == (size[1],)


def test_normals_are_within_rounding(place: tuple[str, str]) -> None:
    _, device = place
    for dtype in DTYPES:
        dy = torch.randn(8, 33, 14, 15, dtype=torch.float64).to(device, dtype)
        exact, size = dy.double().sum((0, 2, 3)), dy.double().abs().sum((0, 2, 3))
        terms = dy[:, 0].numel()
        unit = torch.finfo(dtype).eps / 2
        bound = size * terms * (2**-53 if dtype == torch.float64 else 2**-24) + exact.abs() * unit
        assert ((conv2d_bias_grad(dy).double() - exact).abs() <= bound).all()


def test_the_layout_does_not_change_a_bit_of_the_own_reduction() -> None:
    dy = torch.randn(8, 33, 14, 15)
    results = [
        OP(d, backend="emulated")
        for d in (dy, dy.to(memory_format=torch.channels_last), dy.transpose(2, 3).contiguous().transpose(2, 3))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_aten_s_sum_repeats(format: torch.memory_format, threads: int) -> None:
    dy = torch.randn(16, 64, 28, 28).to(memory_format=format)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = conv2d_bias_grad(dy, backend="aten")
        assert all(torch.equal(conv2d_bias_grad(dy.clone(), backend="aten"), first) for _ in range(20))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_s_db_comes_from_the_backend_s_own_kernel(dtype: torch.dtype, place: tuple[str, str]) -> None:
    backend, device = place
    x = torch.randint(-2, 3, (2, 4, 6, 6), device=device).to(dtype).requires_grad_()
    w = torch.randint(-2, 3, (5, 4, 3, 3), device=device).to(dtype).requires_grad_()
    b = torch.zeros(5, dtype=dtype, device=device, requires_grad=True)
    dy = torch.randint(-2, 3, (2, 5, 4, 4), device=device).to(dtype)
    results: list[Tensor] = []
    ran = launched(lambda: results.extend(grad(conv2d(x, w, b), (x, w, b), dy)))
    own = ["conv2d", "conv2d_dgrad", "conv2d_wgrad", "conv2d_bias_grad"]
    assert ran == ([] if backend == "aten" else own)
    assert torch.equal(results[2], dy.sum((0, 2, 3)))


def test_where_the_bias_alone_learns_nothing_else_runs() -> None:
    w, b = torch.randn(5, 4, 3, 3), torch.zeros(5, requires_grad=True)
    with fk.testing.emulated():
        y = conv2d(torch.randn(2, 4, 6, 6), w, b)
    dy = torch.randint(-2, 3, (2, 5, 4, 4)).float()
    assert launched(lambda: y.backward(dy)) == ["conv2d_bias_grad"]
    assert torch.equal(b.grad, dy.sum((0, 2, 3)))


@pytest.mark.parametrize("learns", ["xwb", "xb", "wb", "xw"])
def test_the_layout_of_dy_is_changed_once_for_all_gradients(learns: str) -> None:
    """Contiguous in and out; the gradients are contiguous again, as ATen's are."""
    leaves = {"x": torch.randn(2, 4, 6, 6), "w": torch.randn(5, 4, 3, 3), "b": torch.zeros(5)}
    asked = [leaves[name].requires_grad_() for name in learns]
    with fk.testing.emulated():
        y = conv2d(*leaves.values())
    dy = torch.randn_like(y)
    laid_out = 0

    class Copies(Calls):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal laid_out
            laid_out += func.name() == "aten::clone" and args[0].shape == dy.shape
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Copies():
        gradients = grad(y, asked, dy)
    assert laid_out == 1
    assert all(g.is_contiguous() for g in gradients)
    stock = grad(conv2d(*leaves.values(), backend="aten"), asked, dy)
    torch.testing.assert_close(gradients, stock)


def test_derivatives(place: tuple[str, str]) -> None:
    _, device = place
    dy = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)

    def db(dy: Tensor) -> Tensor:
        return conv2d_bias_grad(dy)

    assert gradcheck(db, dy)
    assert gradgradcheck(db, dy)


@pytest.mark.parametrize("backend", ["auto", "aten", "emulated"])
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
def test_opcheck(layout: str, needs_grad: bool, backend: str) -> None:
    dy = LAYOUTS[layout](SIZE).requires_grad_(needs_grad)
    torch.library.opcheck(OP, (dy,), {"backend": backend})


def test_transforms_are_torch_s() -> None:
    dy = torch.randn(4, 2, 3, 5, 5)
    expected = dy.sum((1, 3, 4))
    torch.testing.assert_close(torch.vmap(conv2d_bias_grad)(dy), expected)
    torch.testing.assert_close(torch.func.jvp(conv2d_bias_grad, (dy[0],), (dy[1],))[1], expected[1])
    complex_dy = torch.randn(2, 3, 5, 5, dtype=torch.complex64)
    torch.testing.assert_close(conv2d_bias_grad(complex_dy), complex_dy.sum((0, 2, 3)))
    with pytest.raises(
        RuntimeError, match="backend='emulated' cannot compute conv2d_bias_grad: a tensor belongs to a torch.func"
    ):
        torch.vmap(lambda d: OP(d, backend="emulated"))(dy)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: conv2d_bias_grad(1.0), TypeError, "grad_output must be a Tensor, got float"),
        (lambda: conv2d_bias_grad(torch.ones(2, 3)), RuntimeError, r"grad_output must have 4 dimensions .*got 2"),
        (lambda: conv2d_bias_grad(torch.ones(1, 1, 1, 1), backend="cudnn"), ValueError, "got 'cudnn'"),
        (
            lambda: conv2d_bias_grad(torch.ones(1, 1, 1, 1), backend="native"),
            RuntimeError,
            "backend='native' cannot compute conv2d_bias_grad: it needs CUDA tensors, got one on cpu",
        ),
        (
            lambda: OP(torch.ones(1, 1, 1, 1, dtype=torch.int32), backend="emulated"),
            RuntimeError,
            "a tensor is not of a real floating dtype",
        ),
    ],
    ids=["number", "rank", "backend", "native on a CPU", "integers"],
)
def test_malformed_calls(call: Callable[[], object], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        call()
