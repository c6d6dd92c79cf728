"""Several threads at one layer, or at one graph."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import freezekit as fk
from tests.dropin.twins import nets

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


@pytest.mark.parametrize("frozen", [False, True])
def test_threads_calling_one_module_at_once(frozen: bool) -> None:
    net = nets()[0]
    net[2].requires_grad_(not frozen)
    inputs = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    parameters = [p for p in net.parameters() if p.requires_grad]

    def step(x: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        return [y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])]

    expected = [step(x) for x in inputs]
    wrong: list[Any] = []

    def work(which: int) -> None:
        try:
            for _ in range(10):
                for a, b in zip(step(inputs[which]), expected[which]):
                    torch.testing.assert_close(a, b)
        except BaseException as caught:
            wrong.append(caught)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_graph_used_by_two_threads_at_once() -> None:
    conv = fk.FreezableConv2d(3, 4, 3)
    x = X.clone().requires_grad_()
    y = conv(x)
    expected = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    wrong = []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
