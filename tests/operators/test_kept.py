"""What each state of freezing keeps and runs: the table that freezekit promises, line by line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

import freezekit as fk
from freezekit.functional import conv2d
from tests.conftest import on
from tests.observe import Calls, bytes_kept

# (weight learns, bias learns, input needs grad) -> what backward runs: dgrad, wgrad, db
TABLE = {
    (True, False, True): (1, 1, 0),
    (True, False, False): (0, 1, 0),
    (False, False, True): (1, 0, 0),
    (False, True, True): (1, 0, 1),
    (False, True, False): (0, 0, 1),
    (True, True, True): (1, 1, 1),
    (True, True, False): (0, 1, 1),
}
STATES = [*TABLE, (False, False, False)]


def layer(weight: bool, bias: bool) -> fk.FreezableConv2d:
    conv = fk.FreezableConv2d(4, 8, 3, padding=1)
    conv.weight.requires_grad_(weight)
    conv.bias.requires_grad_(bias)
    return conv


@pytest.mark.parametrize("backend", ["aten", "emulated"])
@pytest.mark.parametrize(("weight", "bias", "needs_dx"), STATES)
def test_kept_bytes(weight: bool, bias: bool, needs_dx: bool, backend: str) -> None:
    conv = layer(weight, bias)
    x = torch.randn(2, 4, 8, 8, requires_grad=needs_dx)
    with on(backend):
        assert bytes_kept(conv, x) == (x.untyped_storage().nbytes() if weight else 0)


@pytest.mark.parametrize("backend", ["aten", "emulated"])
@pytest.mark.parametrize(("state", "ran"), TABLE.items())
def test_backward_runs(state: tuple[bool, bool, bool], ran: tuple[int, int, int], backend: str) -> None:
    conv = layer(*state[:2])
    x = torch.randn(2, 4, 8, 8, requires_grad=state[2])
    with on(backend):
        y = conv(x)
    g = torch.ones_like(y)
    with Calls() as calls:
        y.backward(g)
    db = "freezekit::conv2d_bias_grad" if backend == "emulated" else "aten::sum.dim_IntList"
    assert (*calls.gradients, calls.count[db]) == ran
    assert calls.count["aten::convolution_backward"] == 0 or backend == "aten"
    assert (conv.weight.grad is None, conv.bias.grad is None, x.grad is None) == tuple(not s for s in state)


def test_frozen_and_no_gradient_needed_makes_no_node() -> None:
    assert layer(False, False)(torch.randn(1, 4, 8, 8)).grad_fn is None


def test_a_frozen_weight_is_kept_only_for_dgrad() -> None:
    x, conv = torch.randn(1, 4, 8, 8), layer(False, True)
    weight = conv.weight.detach() * 1
    reference = torch.multiprocessing.reductions.StorageWeakRef(weight.untyped_storage())
    y = conv2d(x, weight, conv.bias, padding=1)
    del weight
    assert y.requires_grad
    assert reference.expired()


@pytest.mark.parametrize("asked", ["x", "weight", "bias"])
def test_a_subset_of_gradients_runs_no_more_than_asked(asked: str) -> None:
    conv, x = layer(True, True), torch.randn(2, 4, 8, 8, requires_grad=True)
    y = conv(x)
    g = torch.ones_like(y)
    with Calls() as calls:
        grad(y, x if asked == "x" else getattr(conv, asked), g)
    assert calls.gradients == (asked == "x", asked == "weight")
    assert calls.count["aten::sum.dim_IntList"] == (asked == "bias")


def test_never_a_tensor_of_the_input_s_size_in_backward() -> None:
    conv, x = layer(False, True), torch.randn(2, 4, 32, 32)
    y = conv(x)  # bias alone learns: no gradient of x's or the weight's size is made
    g = torch.ones_like(y)
    sizes: list[int] = []

    class Sizes(Calls):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor))
            return result

    with Sizes():
        y.backward(g)
    assert max(sizes) < x.numel()


def test_gradients_are_accumulated_once_each() -> None:
    net = nn.Sequential(*(fk.FreezableConv2d(3, 3, 3, padding=1) for _ in range(3)))
    net[1].requires_grad_(False)
    with Calls() as calls:
        net(torch.randn(1, 3, 24, 24)).mean().backward()
    assert calls.gradients == (2, 2)
    assert net[1].weight.grad is None


@pytest.mark.parametrize("kind", ["Conv2d", "FreezableConv2d"])
def test_backward_twice_and_in_place_edits_as_stock(kind: str) -> None:
    make = {"Conv2d": nn.Conv2d, "FreezableConv2d": fk.FreezableConv2d}[kind]
    conv, x = make(3, 3, 3), torch.randn(1, 3, 8, 8, requires_grad=True)
    y = conv(x * 1)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    hidden = x * 1
    y = conv(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_editing_the_input_of_a_frozen_layer_is_fine_since_nobody_reads_it() -> None:
    conv, x = layer(False, False), torch.randn(1, 4, 8, 8, requires_grad=True)
    hidden = x * 1
    y = conv(hidden)
    hidden.add_(1)
    y.sum().backward()
    assert x.grad is not None


PEAK = """
import sys, torch, freezekit as fk
from torch import nn
kind, depth = getattr(fk if sys.argv[1] == "FreezableConv2d" else nn, sys.argv[1]), 12
torch.set_num_threads(1)
net = nn.Sequential(*(kind(8, 8, 1) for _ in range(depth))).requires_grad_(False)
x = torch.zeros(1, 8, 512, 1024, requires_grad=True)  # 16 MiB
net[0](x[:, :, :8, :8]).sum().backward()
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
net(x).sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_a_frozen_chain() -> None:
    # Without this, glibc keeps freed blocks of this size for later, and resident memory is not what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    peak = {
        kind: int(
            subprocess.run(
                [sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True, env=env
            ).stdout
        )
        for kind in ("Conv2d", "FreezableConv2d")
    }
    one = 16 * 2**20
    assert peak["Conv2d"] > 12 * one
    assert peak["FreezableConv2d"] < 5 * one
