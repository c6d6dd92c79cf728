"""Which gradients are None, which are zeros, which require grad: stock's pattern and values, up to the third order.

A backward pass through gradients alone (lazy R1) gives a bias behind a ReLU zeros and no None: Adam moves it by its
momentum, DDP counts it as used, `autograd.grad` returns it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
import freezekit.functional as ff

Call = Callable[..., Tensor]
MEAN, VAR = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
IMAGES = (2, 3, 6, 6)


def seeded(function: Call) -> Call:
    def call(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return function(x, 0.4)

    return call


# name -> freezekit's call, stock's, sizes of the operands
LAYERS: dict[str, tuple[Call, Call, Sequence[tuple[int, ...]]]] = {
    "conv2d": (
        lambda x, w, b: ff.conv2d(x, w, b, 2, 1),
        lambda x, w, b: F.conv2d(x, w, b, 2, 1),
        [IMAGES, (4, 3, 3, 3), (4,)],
    ),
    "conv2d without bias": (ff.conv2d, F.conv2d, [IMAGES, (4, 3, 3, 3)]),
    "conv1d": (ff.conv1d, F.conv1d, [(2, 3, 6), (4, 3, 3), (4,)]),
    "conv3d": (ff.conv3d, F.conv3d, [(1, 2, 3, 3, 3), (2, 2, 2, 2, 2), (2,)]),
    "conv_transpose2d": (
        lambda x, w, b: ff.conv_transpose2d(x, w, b, 2, 1, 1),
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1),
        [(2, 3, 4, 4), (3, 2, 3, 3), (2,)],
    ),
    "relu": (ff.relu, F.relu, [IMAGES]),
    "relu in place": (lambda x: ff.relu(x * 1, inplace=True), lambda x: F.relu(x * 1, inplace=True), [IMAGES]),
    "relu in place on a view": (
        lambda x: ff.relu((x * 1)[:, :2], inplace=True),
        lambda x: F.relu((x * 1)[:, :2], inplace=True),
        [IMAGES],
    ),
    "relu6": (lambda x: ff.relu6(x * 5), lambda x: F.relu6(x * 5), [IMAGES]),
    "hardtanh in place": (
        lambda x: ff.hardtanh(x * 1, inplace=True),
        lambda x: F.hardtanh(x * 1, inplace=True),
        [IMAGES],
    ),
    "leaky_relu": (ff.leaky_relu, F.leaky_relu, [IMAGES]),
    "leaky_relu in place": (
        lambda x: ff.leaky_relu(x * 1, 0.1, True),
        lambda x: F.leaky_relu(x * 1, 0.1, True),
        [IMAGES],
    ),
    "prelu": (ff.prelu, F.prelu, [IMAGES, (3,)]),
    "prelu with one slope": (ff.prelu, F.prelu, [IMAGES, (1,)]),
    "dropout": (seeded(ff.dropout), seeded(F.dropout), [IMAGES]),
    "max_pool2d": (lambda x: ff.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1), [IMAGES]),
    "max_pool2d with indices": (
        lambda x: ff.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        [IMAGES],
    ),
    "max_pool3d": (lambda x: ff.max_pool3d(x, 2, 1), lambda x: F.max_pool3d(x, 2, 1), [(1, 2, 3, 4, 3)]),
    "avg_pool1d": (lambda x: ff.avg_pool1d(x, 2), lambda x: F.avg_pool1d(x, 2), [(2, 3, 6)]),
    "avg_pool2d": (lambda x: ff.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2), [IMAGES]),
    "avg_pool3d": (lambda x: ff.avg_pool3d(x, 2), lambda x: F.avg_pool3d(x, 2), [(1, 2, 4, 4, 4)]),
    "adaptive_avg_pool2d": (
        lambda x: ff.adaptive_avg_pool2d(x, 4),
        lambda x: F.adaptive_avg_pool2d(x, 4),
        [IMAGES],
    ),
    "adaptive_avg_pool3d": (
        lambda x: ff.adaptive_avg_pool3d(x, 2),
        lambda x: F.adaptive_avg_pool3d(x, 2),
        [(1, 2, 3, 3, 3)],
    ),
    "reflect": (
        lambda x: ff.pad(x, (1, 2, 0, 1), "reflect"),
        lambda x: F.pad(x, (1, 2, 0, 1), "reflect"),
        [IMAGES],
    ),
    "replicate": (
        lambda x: ff.pad(x, (1, 2, 0, 1), "replicate"),
        lambda x: F.pad(x, (1, 2, 0, 1), "replicate"),
        [IMAGES],
    ),
    "batch_norm": (
        lambda x, w, b: ff.batch_norm(x, MEAN, VAR, w, b),
        lambda x, w, b: F.batch_norm(x, MEAN, VAR, w, b),
        [IMAGES, (3,), (3,)],
    ),
    "batch_norm without affine": (
        lambda x: ff.batch_norm(x, MEAN, VAR),
        lambda x: F.batch_norm(x, MEAN, VAR),
        [IMAGES],
    ),
    "layer_norm": (
        lambda x, w, b: ff.layer_norm(x, (6,), w, b),
        lambda x, w, b: F.layer_norm(x, (6,), w, b),
        [(2, 3, 6), (6,), (6,)],
    ),
    "group_norm": (
        lambda x, w, b: ff.group_norm(x, 1, w, b),
        lambda x, w, b: F.group_norm(x, 1, w, b),
        [(2, 3, 4), (3,), (3,)],
    ),
}


def compare(
    ours: Tensor, stock: Tensor, ours_of: list[Tensor], stock_of: list[Tensor], orders: int, where: str
) -> None:
    """Every gradient of this tensor, and in turn every gradient of each of those."""
    torch.testing.assert_close(ours, stock, msg=lambda text: f"{where}: {text}")
    if orders == 0:
        return
    assert ours.requires_grad or not stock.requires_grad, f"{where} does not require grad, unlike stock's"
    if not stock.requires_grad:
        # ATen's own operators, where gradients are made of them, link a gradient to more than stock's: to no effect.
        if ours.requires_grad:
            found = torch.autograd.grad(ours.sum(), ours_of, retain_graph=True, allow_unused=True)
            assert all(gradient is None for gradient in found), where
        return
    for learns in (True, False):
        cotangent = torch.randn(stock.shape, dtype=stock.dtype, generator=torch.Generator().manual_seed(orders))
        lists: list[tuple[list[Tensor], tuple[Tensor | None, ...]]] = []
        errors = []
        for result, leaves in ((ours, ours_of), (stock, stock_of)):
            v = cotangent.clone().requires_grad_(learns)
            known = [*leaves, v] if learns else leaves
            try:
                lists.append((known, torch.autograd.grad(result, known, v, create_graph=True, allow_unused=True)))
            except RuntimeError as error:  # torch 2.14 has no third order of a batch norm in train mode
                errors.append(str(error))
        if errors:
            assert len(errors) == 2, f"{where}: raised by one of both alone: {errors[0]}"
            assert errors[0] == errors[1], where
            continue
        (ours_known, ours_grads), (stock_known, stock_grads) = lists
        for i, (a, b) in enumerate(zip(ours_grads, stock_grads, strict=True)):
            here = f"{where}, gradient {i} by {'a learning' if learns else 'a constant'} cotangent"
            assert (a is None) == (b is None), f"{here}: {'None' if a is None else 'not None'}, unlike stock's"
            if a is not None and b is not None:
                compare(a, b, ours_known, stock_known, orders - 1, here)


def states(name: str) -> list[tuple[bool, ...]]:
    return [state for state in product((False, True), repeat=len(LAYERS[name][2])) if any(state)]


@pytest.mark.parametrize(
    ("name", "state"),
    [(name, state) for name in LAYERS for state in states(name)],
    ids=lambda v: v if isinstance(v, str) else "".join("01"[s] for s in v),
)
def test_stock_s_pattern_of_none_and_zeros(name: str, state: tuple[bool, ...]) -> None:
    layer, stock, sizes = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]
    leaves = [[t.clone().requires_grad_(s) for t, s in zip(operands, state)] for _ in range(2)]
    results = [function(*of) for function, of in zip((layer, stock), leaves)]
    learning = [[leaf for leaf in of if leaf.requires_grad] for of in leaves]
    # Larger trees of gradients take minutes; where several operands learn, two orders show how they combine.
    compare(results[0], results[1], learning[0], learning[1], 3 if len(learning[0]) == 1 else 2, name)


def test_hooks_and_retained_gradients_of_a_result_see_what_stock_s_see() -> None:
    """Stock's relu reads its result: zeros reach that tensor too."""
    for function in (F.relu, ff.relu):
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        y = function(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        of_y, of_x = torch.autograd.grad(gradient.sum(), (y, x))
        assert torch.equal(of_y, torch.zeros_like(y))
        assert torch.equal(of_x, torch.zeros_like(x))


@pytest.mark.parametrize("frozen", [(), (0,), (0, 3), (1, 4)], ids=str)
def test_a_penalty_on_the_gradient_alone(frozen: tuple[int, ...]) -> None:
    """Lazy R1: values, None and zeros of a whole network's parameters, and so what Adam does with them."""

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8).eval(),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8).eval(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 1),
            nn.Hardtanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 1, 1),
        ).double()

    stock = network()
    for i in frozen:
        stock[i].requires_grad_(False)
    ours = fk.convert(copy.deepcopy(stock))
    for model in (stock, ours):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        image = torch.linspace(-1, 1, 2 * 3 * 12 * 12, dtype=torch.float64).view(2, 3, 12, 12)
        model(image).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        leaf = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(a, b)
