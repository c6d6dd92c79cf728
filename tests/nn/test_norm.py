"""Norms: torch's values and gradients in every state; what each state keeps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck

import freezekit as fk
from freezekit import nn as layers
from freezekit.conversion import conversion_report
from tests.observe import bytes_kept

STATES = list(itertools.product([False, True], repeat=3))  # weight learns, bias learns, input needs grad
BATCH_NORMS = {2: layers.FreezableBatchNorm2d, 1: layers.FreezableBatchNorm1d, 3: layers.FreezableBatchNorm3d}
SIZES = {1: (4, 6, 5), 2: (4, 6, 5, 3), 3: (2, 6, 3, 4, 5)}


def settled(norm: nn.Module) -> nn.Module:
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "bias" not in name else nn.init.uniform_(tensor, -1, 1)
    return norm


def twin(norm: nn.Module) -> nn.Module:
    """The stock layer with the same everything."""
    return fk.conversion.revert(copy.deepcopy(norm))


def step(norm: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_(x.requires_grad)
    y = norm(x)
    wanted = [t for t in (x, *norm.parameters()) if t.requires_grad]
    return [y.detach(), *(grad(y, wanted, g) if wanted else ())]


def check(norm: nn.Module, x: Tensor) -> None:
    stock = twin(norm)
    g = torch.randn(x.shape).to(x.dtype)
    exact = step(twin(norm).double(), x.double().requires_grad_(x.requires_grad), g.double())
    for a, b, c in zip(step(norm, x, g), step(stock, x, g), exact, strict=True):
        assert a.dtype == b.dtype
        if x.dtype == torch.bfloat16:  # no further from the truth than torch is, rounding aside
            error, allowed = (a.double() - c).abs().max(), (b.double() - c).abs().max()
            assert error <= allowed + 2**-8 * c.abs().max()
        else:
            torch.testing.assert_close(a, b)
    for a, b in zip(norm.buffers(), stock.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("axes", BATCH_NORMS)
def test_batch_norm_is_torch_s(axes: int, state: tuple[bool, bool, bool], training: bool) -> None:
    norm = settled(BATCH_NORMS[axes](6)).train(training)
    norm.weight.requires_grad_(state[0])
    norm.bias.requires_grad_(state[1])
    check(norm, torch.randn(SIZES[axes]).requires_grad_(state[2]))
    assert norm(torch.randn(SIZES[axes])).requires_grad == (state[0] or state[1])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("axes", BATCH_NORMS)
def test_instance_norm_is_torch_s(axes: int, statistics: bool, training: bool) -> None:
    kind = getattr(layers, f"FreezableInstanceNorm{axes}d")
    norm = settled(kind(6, affine=True, track_running_stats=statistics)).train(training)
    for state in STATES:
        norm.weight.requires_grad_(state[0])
        norm.bias.requires_grad_(state[1])
        check(norm, torch.randn(SIZES[axes]).requires_grad_(state[2]))
    norm.requires_grad_(False)
    x = torch.randn(SIZES[axes], requires_grad=True)
    own = training or not statistics
    copies = 2 * 6 * 4  # of weight and variance
    assert (bytes_kept(norm, x) == copies) == (not own)
    unbatched = x.detach()[0]
    torch.testing.assert_close(norm(unbatched), twin(norm)(unbatched))


@pytest.mark.parametrize("learns", [False, True])
def test_instance_norm_by_given_statistics_is_contiguous_as_torch_s(learns: bool) -> None:
    norm = settled(layers.FreezableInstanceNorm2d(6, affine=True, track_running_stats=True)).eval()
    norm.weight.requires_grad_(False)
    norm.bias.requires_grad_(learns)
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y, expected = norm(x), twin(norm)(x)
    assert y.stride() == expected.stride() == (120, 20, 4, 1)
    dy = torch.ones_like(x)
    assert grad(y, x, dy)[0].stride() == grad(expected, x, dy)[0].stride()


def write_data(norm: nn.Module, x: Tensor) -> None:
    for tensor in (norm.weight, norm.running_mean, norm.running_var):
        tensor.data.mul_(3)


def write_in_place(norm: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        norm.weight.add_(1)


def train_once(norm: nn.Module, x: Tensor) -> None:
    norm.train()(x)


@pytest.mark.parametrize("write", [write_data, write_in_place, train_once])
@pytest.mark.parametrize("learns", [False, True])
def test_instance_norm_keeps_copies_of_its_vectors_as_torch_s(write: Callable[..., None], learns: bool) -> None:
    torch.manual_seed(0)
    stock = settled(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)).eval().requires_grad_(learns)
    x, gradients = torch.randn(2, 6, 5, 5, requires_grad=True), []
    for norm in (stock, fk.convert(copy.deepcopy(stock))):
        y = norm(x)
        write(norm, x.detach())
        gradients.append(torch.autograd.grad(y, [x, norm.weight] if learns else x, x.detach()))
    for expected, found in zip(*gradients):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "kind", ["no affine", "no statistics", "cumulative", "channels_last", "float64", "bfloat16", "mixed"]
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batch_norm_of_every_kind(kind: str, training: bool) -> None:
    settings = {
        "no affine": {"affine": False},
        "no statistics": {"track_running_stats": False},
        "cumulative": {"momentum": None},
    }
    norm = settled(layers.FreezableBatchNorm2d(6, **settings.get(kind, {}))).train(training).requires_grad_(False)
    x = torch.randn(SIZES[2])
    if kind == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16, "mixed": torch.bfloat16}.get(kind, torch.float32)
    if kind != "mixed":
        norm = norm.to(dtype)
    check(norm, x.to(dtype).requires_grad_())


def test_what_batch_norm_keeps() -> None:
    norm = settled(BATCH_NORMS[2](6)).eval()
    x = torch.randn(SIZES[2], requires_grad=True)
    for (weight, bias, needs), training in itertools.product(STATES, [False, True]):
        norm.train(training)
        norm.weight.requires_grad_(weight)
        norm.bias.requires_grad_(bias)
        t = x if needs else x.detach()
        kept = bytes_kept(norm, t)
        if weight or (training and (bias or needs)):
            assert kept == bytes_kept(twin(norm), t)
        else:
            assert kept == 0, (weight, bias, needs)


def test_a_frozen_batch_norm_keeps_its_statistics_after_train() -> None:
    model = fk.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    fk.freeze(model)
    model.train()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    before = [b.clone() for b in model.buffers()]
    assert bytes_kept(model, x) == 2 * 4 * 64 // 8
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    fk.unfreeze(model)
    assert model[1].training
    fk.freeze(model, norm="batch")
    model(x)
    assert not torch.equal(before[0], next(model.buffers()))
    (said,) = [row.reason for row in conversion_report(model) if row.layer == "FreezableBatchNorm2d"]
    assert "normalises by batch" in said


def test_batch_norm_derivatives_and_double_backward() -> None:
    norm = settled(layers.FreezableBatchNorm2d(6)).double().eval()
    norm.weight.requires_grad_(False)
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t, b: norm(t * t), (x, norm.bias))
    assert gradgradcheck(lambda t: norm(t * t), x)


def test_batch_norm_zero_batch_and_errors() -> None:
    norm = layers.FreezableBatchNorm2d(6).eval().requires_grad_(False)
    x = torch.randn(0, 6, 3, 3, requires_grad=True)
    assert grad(norm(x).sum(), x)[0].shape == x.shape
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.randn(2, 6))
    with pytest.raises(RuntimeError, match="running_mean should contain 5 elements"):
        norm(torch.randn(2, 5, 3, 3, requires_grad=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_gradient_narrower_than_the_norm_is_one_product(layout: torch.memory_format) -> None:
    norm = settled(layers.FreezableBatchNorm2d(6)).eval().requires_grad_(False)
    x = torch.randn(SIZES[2]).bfloat16().contiguous(memory_format=layout).requires_grad_()
    y = norm(x)
    dy = torch.randn_like(y)
    with torch.profiler.profile(record_shapes=True) as profile:
        (dx,) = grad(y, x, dy)
    scale = torch.rsqrt(norm.running_var + norm.eps) * norm.weight
    assert torch.equal(dx, (dy * scale.view(1, -1, 1, 1)).bfloat16())
    assert dx.stride() == x.stride()
    operands = [len(event.input_shapes) for event in profile.events() if event.name == "aten::mul"]
    assert operands == [3]  # the third is the result: no float32 tensor is stored for a cast to read


def test_editing_the_input_of_a_frozen_batch_norm_is_fine() -> None:
    norm = layers.FreezableBatchNorm2d(6).eval().requires_grad_(False)
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    hidden = x * 1
    y = norm(hidden)
    hidden.add_(1)
    y.sum().backward()
    y = norm(x)
    norm.running_var.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "make", [lambda: layers.FreezableLayerNorm((5, 3)), lambda: layers.FreezableGroupNorm(2, 6)], ids=["layer", "group"]
)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_layer_and_group_norm(state: tuple[bool, bool, bool], make: type[nn.Module]) -> None:
    norm = settled(make())
    norm.weight.requires_grad_(state[0])
    norm.bias.requires_grad_(state[1])
    x = torch.randn(SIZES[2]).requires_grad_(state[2])
    check(norm, x)
    kept = bytes_kept(norm, x)
    assert kept == 0 if not (state[0] or state[2]) else kept == bytes_kept(twin(norm), x)
    check(norm.bfloat16(), x.detach().bfloat16().requires_grad_(state[2]))


def test_layer_and_group_norm_errors_are_torch_s() -> None:
    for norm, x in (
        (layers.FreezableGroupNorm(2, 2), torch.ones(1, 2)),
        (layers.FreezableLayerNorm(3), torch.ones(2, 2)),
    ):
        norm.weight.requires_grad_(False)
        with pytest.raises((RuntimeError, ValueError)) as ours:
            norm(x)
        with pytest.raises((RuntimeError, ValueError)) as stock:
            twin(norm)(x)
        assert str(ours.value) == str(stock.value)


def test_transforms_and_opcheck() -> None:
    norm = settled(layers.FreezableBatchNorm2d(6)).eval().requires_grad_(False)
    stock = twin(norm)
    x, t = torch.randn(SIZES[2]), torch.randn(SIZES[2])
    for f in (torch.func.vmap(lambda v: v), torch.func.grad):
        a, b = ((f(lambda v, n=n: n(v).square().sum())(x) if f is torch.func.grad else n(x)) for n in (norm, stock))
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.func.jvp(norm, (x,), (t,)), torch.func.jvp(stock, (x,), (t,)))
    ops, w = torch.ops.freezekit, torch.rand(6)
    torch.library.opcheck(ops.batch_norm, (x.requires_grad_(), w, w.clone().requires_grad_(), w, w, 1e-5))
    torch.library.opcheck(ops.layer_norm, (t, [3], None, torch.rand(3).requires_grad_(), 1e-5))
    torch.library.opcheck(ops.group_norm, (t, 2, None, torch.rand(6).requires_grad_(), 1e-5))


def test_parameters_whose_sign_is_not_in_memory() -> None:
    weight = torch.complex(torch.zeros(3), torch.tensor([-0.5, 2.0, 1.0])).conj().imag
    assert weight.is_neg()
    x, mean, var = torch.randn(2, 3, 4, 4, requires_grad=True), torch.zeros(3), torch.ones(3)
    y = fk.functional.batch_norm(x, mean, var, weight)
    expected = nn.functional.batch_norm(x, mean, var, weight)
    assert torch.equal(y, expected)
    (dx,), (stock,) = (torch.autograd.grad(z.sum(), x) for z in (y, expected))
    torch.testing.assert_close(dx, stock)
