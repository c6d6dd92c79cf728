"""Memory is counted to the byte, whoever holds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import freezekit as fk
from bench.memory import Memory, bytes_kept, trace

CPU = torch.device("cpu")


def test_kept_and_peak_are_exact() -> None:
    def work() -> Tensor:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first
        third = torch.empty(700, dtype=torch.uint8)
        del second
        return third

    assert trace(CPU, work) == Memory(kept=700, peak=1500)


def test_older_memory_does_not_count() -> None:
    old = [torch.empty(1 << 20)]

    def work() -> Tensor:
        old.clear()
        return torch.empty(10, dtype=torch.uint8)

    assert trace(CPU, work) == Memory(kept=10, peak=10)


def test_older_memory_at_an_address_of_an_earlier_trace_does_not_count() -> None:
    """Torch's profiler believes that what an earlier trace allocated there is released."""

    def reused(nbytes: int) -> Tensor | None:
        held: list[Tensor] = []
        trace(CPU, lambda: held.append(torch.empty(nbytes, dtype=torch.uint8)))
        address = held.pop().data_ptr()
        again = torch.empty(nbytes + 8, dtype=torch.uint8)
        return again if again.data_ptr() == address else None

    old = [tensor for tensor in map(reused, range(1000, 20000, 64)) if tensor is not None]
    assert old  # An allocator hands out again what it has just got back.

    def work() -> Tensor:
        old.clear()
        return torch.empty(10, dtype=torch.uint8)

    assert trace(CPU, work) == Memory(kept=10, peak=10)


@pytest.mark.parametrize(("frozen", "layer", "expected"), [(False, "stock", 1), (True, "stock", 1), (False, "ours", 1)])
def test_convolutions_that_keep_their_input(frozen: bool, layer: str, expected: int) -> None:
    conv = nn.Conv2d(3, 4, 3).requires_grad_(not frozen)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    subject = conv if layer == "stock" else fk.FreezableConv2d.from_conv2d(conv)
    assert bytes_kept(subject, x) == expected * x.nbytes


def test_a_frozen_freezekit_layer_keeps_nothing() -> None:
    conv = fk.FreezableConv2d(3, 4, 3).requires_grad_(False)
    assert bytes_kept(conv, torch.randn(2, 3, 8, 8, requires_grad=True)) == 0


class Hidden(torch.autograd.Function):
    """Keeps its input where no hook on saved tensors sees it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.hidden = x.detach()
        return x + 1

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return dy


def test_what_hooks_do_not_see_counts() -> None:
    x = torch.randn(100, requires_grad=True)
    assert bytes_kept(Hidden.apply, x) == x.nbytes


def test_the_output_counts_if_the_graph_keeps_it() -> None:
    x = torch.randn(100, requires_grad=True)
    assert bytes_kept(torch.sigmoid, x) == x.nbytes
    assert bytes_kept(lambda t: t + 1, x) == 0


@pytest.mark.gpu
def test_cuda_counts_by_the_caching_allocator() -> None:
    x = torch.randn(1024, device="cuda", requires_grad=True)
    assert bytes_kept(torch.sigmoid, x) == x.nbytes
    assert trace(x.device, lambda: [torch.empty(1 << 20, dtype=torch.uint8, device="cuda")]) == Memory(1 << 20, 1 << 20)
