"""What a ResNet-101 keeps for backward on 224 x 224 images, against torch and the least that formulas allow."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch import Tensor

import freezekit as fk
from tests.models.regimes import REGIMES, Minimum, all_learn
from tests.models.resnet import ResNet, resnet101
from tests.observe import bytes_kept

SIZE = (2, 3, 224, 224)


@cache
def parameters() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return resnet101().state_dict()


def network(dtype: torch.dtype = torch.float32) -> ResNet:
    with torch.device("meta"):
        model = resnet101()
    model.load_state_dict({k: v.clone() for k, v in parameters().items()}, assign=True)
    return model.to(dtype).eval()


# A processor without bfloat16 takes a minute for the larger images, of which the same share is kept.
@pytest.mark.parametrize(
    ("dtype", "size", "share"),
    [(torch.float32, SIZE, 0.017), (torch.bfloat16, (1, 3, 64, 64), 0.034)],
    ids=["float32", "bfloat16"],
)
def test_all_frozen_keeps_bits(dtype: torch.dtype, size: tuple[int, ...], share: float) -> None:
    x = torch.randn(size, dtype=dtype, requires_grad=True)
    stock = bytes_kept(network(dtype).requires_grad_(False), x)
    kept = bytes_kept(fk.convert(network(dtype)).requires_grad_(False), x)
    print(f"\n{dtype}: {kept / 2**20:.3f} MiB of {stock / 2**20:.1f}, {kept / stock:.5f}")
    assert kept <= share * stock


@pytest.mark.parametrize("regime", REGIMES)
def test_kept_bytes_are_the_least_that_formulas_allow(regime: str) -> None:
    model, x = network(), torch.randn(SIZE)
    model = REGIMES[regime](model, x)
    least = Minimum(model).run(x)
    kept = bytes_kept(fk.convert(model), x)
    print(f"\n{regime}: {kept / 2**20:.3f} MiB, least {least / 2**20:.3f}")
    assert least <= kept <= 1.05 * least


def test_all_trainable_keeps_at_most_one_bit_an_activation_more_than_torch() -> None:
    model, x = all_learn(network(), torch.empty(0)).train(), torch.randn(SIZE)
    model.load_state_dict(parameters())
    bits = 0

    def count(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal bits
        bits += (output.numel() + 31) // 32 * 4

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, torch.nn.ReLU)]
    stock = bytes_kept(model, x)
    for handle in handles:
        handle.remove()
    kept = bytes_kept(fk.convert(model), x)
    print(f"\nall trainable: {kept / 2**20:.1f} MiB, torch {stock / 2**20:.1f}, bits {bits / 2**20:.2f}")
    assert kept <= stock + bits


RESIDENT = """
import sys, torch, freezekit as fk
from tests.models.resnet import resnet101
torch.set_num_threads(1)
model = resnet101().eval().requires_grad_(False)
if sys.argv[1] == "converted":
    fk.convert(model)
x = torch.randn(2, 3, 224, 224, requires_grad=True)
with torch.no_grad():
    model(x)  # what the libraries allocate once
model(torch.randn(1, 3, 64, 64, requires_grad=True))  # what a first call that keeps something imports
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
before = resident()
y = model(x)
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_of_a_process() -> None:
    # Without this, glibc keeps freed blocks of this size for later, and resident memory is not what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}

    def grown(kind: str) -> int:
        run = subprocess.run(
            [sys.executable, "-c", RESIDENT, kind], capture_output=True, text=True, check=True, env=env
        )
        return int(run.stdout)

    stock, converted = grown("stock"), grown("converted")
    print(f"\nresident: {converted / 2**20:.1f} MiB of {stock / 2**20:.1f}, {converted / stock:.4f}")
    assert stock > 200 * 2**20
    assert converted <= 0.06 * stock
