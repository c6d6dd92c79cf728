"""Tensors as bit patterns: equality and checksums that see -0.0, NaN payloads and every other bit.

The checksum of a tensor with elements b_0, b_1, ... (their bit patterns as integers, in logical order) is

    sum_i mix(b_i + (i + 1) * ODD)  mod 2^64,   mix: two rounds of multiply and shift-xor

Adding the index tells permutations apart, and the mixing keeps changes of many elements from cancelling: flipping the
sign bit of an even number of float64 elements adds a multiple of 2^64 to any sum that is linear in the patterns.
Integer arithmetic is exact, so the value is the same on every device and for every memory layout.
"""

from collections.abc import Sequence

import torch

from freezekit._storages import sparse_parts

_CHUNK = 1 << 20  # elements per pass: 8 MiB of int64 scratch, whatever the size of the tensor
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of ``tensor`` in logical order as integers of their width, flat; a view where the layout allows.

    >>> bits(torch.tensor([0.0, -0.0])).tolist()
    [0, -2147483648]
    """
    tensor = local(tensor).detach()
    if tensor.layout != torch.strided:
        return torch.cat([bits(part).to(torch.int64) for part in sparse_parts(tensor)])
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().reshape(-1).view(_INTEGER[tensor.element_size()])


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of ``tensor`` on this rank: itself, or the local shard of a distributed one."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shape, dtype and every bit agree; NaN equals itself and 0.0 is not -0.0."""
    a, b = local(a), local(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    first, second = bits(a), bits(b)
    return first.shape == second.shape and torch.equal(first, second.to(first.device))


def checksums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The checksum of each tensor; one transfer to the host per device.

    >>> x = torch.arange(4.0)
    >>> checksums([x])[0] == checksums([x.flip(0)])[0]
    False
    """
    sums = [_checksum(tensor) for tensor in tensors]
    found = [0] * len(sums)
    for device in {total.device for total in sums}:
        here = [i for i, total in enumerate(sums) if total.device == device]
        for i, value in zip(here, torch.stack([sums[i] for i in here]).tolist(), strict=True):
            found[i] = value
    return found


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    flat = bits(tensor)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        index = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64, device=flat.device)
        mixed = index.mul_(_ODD).add_(part)
        for multiplier, shift in zip(_MULTIPLIERS, (30, 27), strict=True):
            mixed.bitwise_xor_(mixed >> shift).mul_(multiplier)
        total += mixed.bitwise_xor_(mixed >> 31).sum()
    return total
