"""What one of two processes does in test_parallel.py; started by it, with the rank in the environment."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import freezekit as fk
from bench.memory import bytes_kept
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


class Chained(nn.Module):
    """Two activations behind norms and a product behind an activation: each keeps a recipe while enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.groups = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.gate, self.norm = nn.Conv2d(4, 4, 1), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.groups(self.conv(x)))
        return F.gelu(self.norm(F.silu(self.gate(y)) * y))


def chains() -> None:
    """Under DDP and FSDP2, the second convolution frozen or not, to the bit."""
    fk._C.chains.set_least_bytes(0)
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    for shards in (False, True):
        for frozen in (False, True):
            results, sizes = [], []
            for enabled in (True, False):
                torch.manual_seed(0)
                net = Chained()
                net.gate.requires_grad_(not frozen)
                if shards:
                    fully_shard(net.conv, mesh=mesh)
                wrapped = fully_shard(net, mesh=mesh) if shards else DistributedDataParallel(net)
                with fk.enabled() if enabled else nullcontext():
                    results.append(train(wrapped, frozen))
                    sizes.append(bytes_kept(wrapped, x))
            ours, stock = results
            assert len(ours) == len(stock)
            assert all(map(torch.equal, ours, stock))
            assert sizes[0] < sizes[1] - 2.5 * 2 * 4 * 8 * 8 * 4, sizes  # three operands, but for small copies
    print("chains")


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
    chains()
    dtensor()
    dist.destroy_process_group()
    # Gloo's threads may still drop tensors that Python knows while the interpreter is torn down, and the process aborts
    # (pytorch/pytorch#190489): leave without that.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
