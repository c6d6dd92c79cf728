"""What one of two processes does in test_parallel.py; started by it, with the rank in the environment."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from freezekit.functional import conv2d
from tests.dropin.twins import turns


def train(net: nn.Module, frozen: bool) -> list[Tensor]:
    """Gradients and parameters after two steps on this rank's own data, the third layer frozen or not."""
    found = []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(2):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        optimizer.zero_grad()
        net(x.requires_grad_()).square().mean().backward()
        found += [x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]
        optimizer.step()
    full = [t.full_tensor() if isinstance(t, DTensor) else t for t in [*found, *net.parameters()]]
    assert any(p.grad is None for p in net.parameters()) == frozen
    return full


def same(ours: list[Tensor], stock: list[Tensor]) -> None:
    assert len(ours) == len(stock)
    for a, b in zip(ours, stock):
        torch.testing.assert_close(a, b)


def ddp(way: str) -> None:
    for frozen in (False, True):
        results = []
        for net in turns(way):
            net[2].requires_grad_(not frozen)
            results.append(train(DistributedDataParallel(net), frozen))
        same(*results)
    print(f"ddp-{way}")


def fsdp2(way: str) -> None:
    mesh = init_device_mesh("cpu", (2,))  # the default is the accelerator's, which gloo and one GPU do not serve
    for frozen in (False, True):
        results = []
        for net in turns(way):
            net[2].requires_grad_(not frozen)
            for layer in (net[0], net[2]):
                fully_shard(layer, mesh=mesh)
            fully_shard(net, mesh=mesh)
            results.append(train(net, frozen))
        same(*results)
    print(f"fsdp2-{way}")


def dtensor() -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    results = []
    for conv in (conv2d, F.conv2d):
        leaves = [
            distribute_tensor(t, mesh, [placement]).requires_grad_()
            for t, placement in ((x, Shard(0)), (w, Replicate()), (b, Replicate()))
        ]
        y = conv(*leaves, padding=1)
        assert isinstance(y, DTensor)
        y.square().sum().backward()
        results.append([y.full_tensor(), *(leaf.grad.full_tensor() for leaf in leaves)])
    same(*results)
    # A backend that was demanded is not left out silently.
    with pytest.raises(RuntimeError, match="backend='native' cannot compute conv2d: it does not take a DTensor"):
        conv2d(distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(w, mesh, [Replicate()]), backend="native")
    print("dtensor")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for part in (ddp, fsdp2):
        for way in ("converted", "enabled"):
            torch.manual_seed(0)
            part(way)
    dtensor()
    dist.destroy_process_group()
    # Gloo's threads may still drop tensors that Python knows while the interpreter is torn down, and the process aborts
    # (pytorch/pytorch#190489): leave without that.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
