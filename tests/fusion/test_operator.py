"""frozen_conv2d: its contract with torch, apart from models."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freezekit import _C
from freezekit.functional import conv2d_dgrad
from freezekit.tuning import choices, dump_choices, load_choices
from tests.observe import Calls, bytes_kept
from tests.proof.stand_in import SLOWER, stand_in

frozen = torch.ops.freezekit.frozen_conv2d.default
ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}
SETTINGS = [
    {},
    {"padding": [1]},
    {"stride": [2], "padding": [1]},
    {"padding": [2], "dilation": [2], "groups": 2},
    {"stride": [2, 1], "padding": [0, 1], "groups": 4},
]


def tensors(dtype: torch.dtype, settings: dict, device: str, channels_last: bool) -> tuple[Tensor, ...]:
    """Small integers: input, weight, bias and a residual of the output's size."""
    make = lambda *size: torch.randint(-2, 3, size).to(device, dtype)  # noqa: E731
    x, w, b = make(2, 4, 7, 6), make(8, 4 // settings.get("groups", 1), 3, 3), make(8)
    r = make(*F.conv2d(x.double(), w.double(), b.double(), **settings).shape)
    if channels_last:
        x, w, r = (t.to(memory_format=torch.channels_last) for t in (x, w, r))
    return x, w, b, r


def reference(x: Tensor, w: Tensor, b: Tensor, r: Tensor | None, activation: str, settings: dict) -> list[Tensor]:
    # On a CPU: cuDNN may take transforms that are not exact on integers.
    x, w, b = x.double().cpu().detach().requires_grad_(), w.double().cpu(), b.double().cpu()
    r = r.double().cpu().detach().requires_grad_() if r is not None else None
    y = F.conv2d(x, w, b, **settings)
    y = ACTIVATIONS[activation](y if r is None else y + r)
    return [y, *torch.autograd.grad(y, [x] if r is None else [x, r], cotangent(y))]


def cotangent(y: Tensor) -> Tensor:
    return (torch.arange(y.numel(), device=y.device) % 5 - 2).to(y.dtype).view(y.shape)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_integers_are_exact(
    settings: dict, activation: str, dtype: torch.dtype, channels_last: bool, place: tuple[str, str]
) -> None:
    backend, device = place
    x, w, b, r = tensors(dtype, settings, device, channels_last)
    for residual in (None, r):
        leaves = [t.detach().requires_grad_() for t in (x, *([residual] if residual is not None else []))]
        y, bits = frozen(leaves[0], w, b, *leaves[1:], activation=activation, **settings, backend=backend)
        ours = [y, *torch.autograd.grad(y, leaves, cotangent(y))]
        assert bits.numel() == (0 if activation == "none" else (y.numel() + 31) // 32)
        for mine, exact in zip(ours, reference(x, w, b, residual, activation, settings), strict=True):
            assert torch.equal(mine.double().cpu(), exact.to(dtype).double())


@pytest.mark.parametrize("layouts", [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_layout_of_the_result(layouts: tuple[bool, bool], place: tuple[str, str]) -> None:
    """ATen's rule: channels_last if an operand is."""
    backend, device = place
    x, w = (tensors(torch.float32, {}, device, last)[i] for i, last in enumerate(layouts))
    y, _ = frozen(x, w, None, None, "relu", backend=backend)
    assert y.is_contiguous(memory_format=torch.channels_last) is any(layouts)


@pytest.mark.parametrize("state", ["graph", "none"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation: str, residual: bool, channels_last: bool, state: str) -> None:
    x, w, b, r = tensors(torch.float32, {"padding": [1]}, "cpu", channels_last)
    x.requires_grad_(state == "graph")
    args = (x, w, b, r.requires_grad_(state == "graph") if residual else None, activation, [1], [1])
    torch.library.opcheck(frozen, args)
    torch.library.opcheck(frozen, args, {"keep_mask": True})


def test_opcheck_of_dgrad() -> None:
    x, w, b, _ = tensors(torch.float32, {}, "cpu", False)
    y, _ = frozen(x, w, b, None, "relu")
    op = torch.ops.freezekit.frozen_conv2d_dgrad.default
    mask = torch.randint(-(2**31), 2**31 - 1, ((x.numel() + 31) // 32,), dtype=torch.int32)
    for dy in (y, y.clone().requires_grad_()):
        torch.library.opcheck(op, (dy, w, x.shape, torch.randn_like(x), mask))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_any_order(activation: str, place: tuple[str, str]) -> None:
    backend, device = place
    shapes = [t.shape for t in tensors(torch.float64, {}, device, False)]
    x, w, b, r = (torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes)
    f = lambda x, r: frozen(x, w, b, r, activation, backend=backend)[0]  # noqa: E731
    assert torch.autograd.gradcheck(f, (x.requires_grad_(), r.requires_grad_()), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, r), fast_mode=True)


def test_only_bits_are_kept() -> None:
    w, b = torch.randn(8, 8, 3, 3), torch.randn(8)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    assert bytes_kept(lambda x: frozen(x, w, b, None, "relu", [1], [1])[0], x) == x.numel() // 8
    assert bytes_kept(lambda x: frozen(x, w, b, None, "none", [1], [1])[0], x) == 0
    assert bytes_kept(lambda x: frozen(x, w, b, None, "relu", [1], [1])[0], x.detach()) == 0


def test_a_trainable_weight_is_refused() -> None:
    x, w, b, _ = tensors(torch.float32, {}, "cpu", False)
    with pytest.raises(RuntimeError, match="weight must not require grad"):
        frozen(x, w.requires_grad_(), b)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"residual": torch.zeros(1)}, "residual must have the size of the output"),
        ({"residual": torch.zeros(2, 8, 5, 4, dtype=torch.float64)}, "residual has dtype"),
        ({"bias": torch.zeros(7)}, "bias must have size"),
        ({"activation": "gelu"}, "activation must be 'none', 'relu' or 'relu6', got 'gelu'"),
    ],
)
def test_errors_name_the_argument(change: dict, text: str) -> None:
    x, w, b, _ = tensors(torch.float32, {}, "cpu", False)
    with pytest.raises((RuntimeError, ValueError), match=text):
        frozen(**{"input": x, "weight": w, "bias": b, **change})


def test_transforms_take_atens_formulas() -> None:
    x, w, b, r = tensors(torch.float32, {}, "cpu", False)
    f = lambda x: frozen(x, w, b, r, "relu")[0].square().sum()  # noqa: E731
    g = lambda x: F.relu(F.conv2d(x, w, b) + r).square().sum()  # noqa: E731
    assert torch.equal(torch.func.grad(f)(x), torch.func.grad(g)(x))
    assert torch.equal(torch.vmap(f)(torch.stack([x, -x])), torch.stack([g(x), g(-x)]))
    assert torch.equal(torch.func.jvp(f, (x,), (x,))[1], torch.func.jvp(g, (x,), (x,))[1])


def test_autocast() -> None:
    x, w, b, r = tensors(torch.float32, {}, "cpu", False)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = frozen(x.requires_grad_(), w, b, r, "relu")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), F.relu(F.conv2d(x, w, b) + r))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_compiled_as_eager(channels_last: bool) -> None:
    x, w, b, r = tensors(torch.float32, {"padding": [1]}, "cpu", channels_last)

    def f(x: Tensor) -> Tensor:
        y = frozen(x, w, b, r, "relu", [1], [1])[0]
        return frozen(y, torch.flip(w.expand(8, 4, 3, 3), [0]).repeat(1, 2, 1, 1), b, None, "relu6", [1], [1])[0]

    outcomes = []
    for call in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_the_kernels_mask_costs_no_pass_between_two() -> None:
    x, w, b, _ = tensors(torch.float32, {"padding": [1]}, "cpu", True)
    w = w.repeat(1, 2, 1, 1)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    block = partial(frozen, weight=w, bias=b, activation="relu", stride=[1], padding=[1], backend="emulated")
    y = block(block(x)[0])[0]
    with Calls() as calls:
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert calls.count["freezekit::gate"] == 1
    assert calls.count["freezekit::frozen_conv2d_dgrad"] == 2


ORDERS = [(0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("batch", [1, 8], ids=["scales the gradient", "scales the filter"])
def test_a_gradient_in_any_order_of_memory(batch: int, order: tuple[int, ...], place: tuple[str, str]) -> None:
    """Behind a norm without an activation, where nothing lays it out first: the scales are those of its channels."""
    backend, device = place
    x, w = (
        torch.randint(-2, 3, (batch, 4, 7, 6)).to(device).float(),
        torch.randint(-2, 3, (6, 4, 3, 3)).to(device).float(),
    )
    var, gamma = torch.full((6,), 1 - 2**-6, device=device), torch.tensor([1.0, -2, 4, 0.5, -1, 8], device=device)
    y, _ = frozen(
        x.requires_grad_(), w, norm_weight=gamma, running_mean=var, running_var=var, eps=2**-6, backend=backend
    )
    dy = cotangent(y)
    laid_out = dy.permute(order).contiguous().permute([order.index(i) for i in range(4)])
    for gradient in (laid_out, laid_out.expand(y.shape), laid_out[:1].expand(y.shape)):
        expected = conv2d_dgrad(gradient.contiguous() * gamma.view(1, -1, 1, 1), w, x.shape)
        assert torch.equal(torch.autograd.grad(y, x, gradient, retain_graph=True)[0], expected)


def test_bits_of_a_gradient_are_in_a_known_order() -> None:
    x, w, _, _ = tensors(torch.float32, {}, "cpu", False)
    y, bits = frozen(x, w, None, None, "relu", keep_mask=True)
    dy = y.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(RuntimeError, match="grad_output must be contiguous or channels_last under a grad_mask"):
        torch.ops.freezekit.frozen_conv2d_dgrad.default(dy, w, x.shape, grad_mask=bits)


@pytest.mark.parametrize("look", ["hook", "retain_grad", "grad"])
def test_who_looks_at_a_gradient_sees_it_unmasked(look: str) -> None:
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    w, b = torch.randn(8, 8, 1, 1), torch.randn(8)
    seen = []
    hidden = frozen(x, w, b, None, "relu")[0]
    if look == "hook":
        hidden.register_hook(lambda g: seen.append(g.clone()))
    elif look == "retain_grad":
        hidden.retain_grad()
    y = frozen(hidden, w, b)[0]
    dy = torch.randn_like(y)
    wanted = [x, hidden] if look == "grad" else [x]
    result = torch.autograd.grad(y, wanted, dy) if look == "grad" else y.backward(dy)
    found = {"hook": lambda: seen[0], "retain_grad": lambda: hidden.grad, "grad": lambda: result[1]}[look]()
    expected = conv2d_dgrad(dy, w, hidden.shape)
    torch.testing.assert_close(found, expected)
    dx = result[0] if look == "grad" else x.grad
    torch.testing.assert_close(dx, conv2d_dgrad(expected * (hidden > 0), w, x.shape))


def test_a_gradient_edited_on_its_way_is_masked_again() -> None:
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    w, b = torch.randn(8, 8, 1, 1), torch.randn(8)
    hidden = frozen(x, w, b, None, "relu")[0]
    y = frozen(hidden, w, b)[0] + 3 * hidden  # another reader: the sum is not what the one reader masked
    (dx,) = torch.autograd.grad(y.sum(), x)
    leaf = x.detach().requires_grad_()
    stock = F.relu(F.conv2d(leaf, w, b))
    torch.testing.assert_close(dx, torch.autograd.grad((F.conv2d(stock, w, b) + 3 * stock).sum(), leaf)[0])


def step(*arguments: object, backend: str = "auto") -> tuple[Tensor, list[str], Calls]:
    """A call and its backward: the input's gradient, what freezekit's kernels ran, and all that ran."""
    x = arguments[0].detach().requires_grad_()
    _C.set_launch_log(True)
    try:
        with Calls() as calls:
            y, _ = frozen(x, *arguments[1:], backend=backend)
            y.backward(cotangent(y))
        return x.grad, [row["operator"] for row in _C.take_launch_log()], calls
    finally:
        _C.set_launch_log(False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_do_it_all_in_one_launch_each_way(dtype: torch.dtype, activation: str) -> None:
    x, w, b, r = tensors(dtype, {"padding": [1]}, "cpu", True)
    _, launched, calls = step(x, w, b.float(), r, activation, [1], [1], backend="emulated")
    # The gradient comes from outside: it is masked on its own.
    assert launched == ["conv2d", *(["gate"] if activation != "none" else []), "conv2d_dgrad"]
    names = {"freezekit::frozen_conv2d", "freezekit::frozen_conv2d_dgrad", "freezekit::gate"}
    assert not {name for name in calls.count if "relu" in name or "hardtanh" in name}
    assert names >= {name for name in calls.count if name.startswith("freezekit::")}


def test_a_float32_bias_is_not_rounded_to_the_tensors_dtype(place: tuple[str, str]) -> None:
    backend, device = place
    x = torch.full((1, 1, 1, 1), 256.0, dtype=torch.bfloat16, device=device)
    w, b = torch.ones_like(x), torch.full((1,), 1.001, device=device)  # 257 is half way between 256 and 258
    assert frozen(x, w, b, backend=backend)[0].item() == 258


def launches_of(*arguments: object) -> tuple[Tensor, list[str]]:
    """As `step`, without a mode that watches: under one a layer with kernels is torch's own."""
    x = arguments[0].detach().requires_grad_()
    _C.set_launch_log(True)
    try:
        y, _ = frozen(x, *arguments[1:])
        y.backward(cotangent(y))
        return x.grad, [row["operator"] for row in _C.take_launch_log()]
    finally:
        _C.set_launch_log(False)


def test_what_was_decided_is_taken() -> None:
    x, w, b, r = tensors(torch.float32, {"padding": [1]}, "cpu", True)
    arguments = (x, w, b, r, "relu6", [1], [1])
    expected, nothing = launches_of(*arguments)
    assert nothing == []
    with stand_in():
        launches_of(*arguments)
        assert [c.problem.split()[0] for c in choices()] == [
            "activation",
            "conv2d+frozen+bias+residual+relu6+mask",
            "conv2d_dgrad+frozen",
        ]
        for seconds, launched in ((1e-6, ["conv2d", "gate", "conv2d_dgrad"]), (1.0, ["activation_bits", "gate"])):
            document = json.loads(dump_choices())
            for row in document["choices"]:
                if row["problem"].startswith("conv2d"):
                    row.update(native_seconds=seconds, aten_seconds=1e-3)
            load_choices(json.dumps(document))
            gradient, found = launches_of(*arguments)
            assert sorted(set(found) - {"activation_bits"}) == sorted(set(launched) - {"activation_bits"})
            assert torch.equal(gradient, expected)
        # In NCHW that is another decision, and bits are in the order of the result whoever computes it.
        laid_out = [
            t.detach().contiguous().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in arguments
        ]
        for _ in range(2):
            gradient, found = launches_of(*laid_out)
            torch.testing.assert_close(gradient, expected)
        assert set(found) == {"conv2d", "activation_bits", "gate", "conv2d_dgrad"}


def test_without_kernels_for_bits_a_block_is_stock_s() -> None:
    """It keeps what stock keeps."""
    for channels_last in (False, True):
        x, w, b, r = tensors(torch.float32, {"padding": [1]}, "cpu", channels_last)
        expected, _ = launches_of(x, w, b, r, "relu", [1], [1])
        with stand_in(SLOWER):
            launches_of(x, w, b, r, "relu", [1], [1])
            gradient, launched = launches_of(x, w, b, r, "relu", [1], [1])
            assert launched == []
            torch.testing.assert_close(gradient, expected)
            y, bits = frozen(x.requires_grad_(), w, b, r, "relu", padding=[1])
            assert type(y.grad_fn).__name__.startswith("Relu")
            assert bits.numel() == 0
            assert y.is_contiguous(memory_format=torch.channels_last) is channels_last


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_autograd(activation: str) -> None:
    x, w, b, r = tensors(torch.float32, {"padding": [1]}, "cpu", True)
    gradients = []
    for compiled in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, r)]
        y, _ = frozen(leaves[0], w, b, leaves[1], activation, [1], [1])
        loss = (y * cotangent(y)).sum()
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
        else:
            loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
    for eager, traced in zip(*gradients, strict=True):
        assert torch.equal(eager, traced)


def test_transforms_are_not_for_explicit_kernels() -> None:
    x, w, _, _ = tensors(torch.float32, {}, "cpu", False)
    with pytest.raises(RuntimeError, match="backend='emulated' cannot compute frozen_conv2d: it has no formulas"):
        torch.func.grad(lambda x: frozen(x, w, backend="emulated")[0].sum())(x)
