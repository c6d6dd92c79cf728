"""Counts as people read them."""

from __future__ import annotations


def bytes_text(count: int) -> str:
    """
    >>> bytes_text(0), bytes_text(1536), bytes_text(3 << 30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def flops_text(count: int) -> str:
    """
    >>> flops_text(640), flops_text(1_234_000), flops_text(4_100_000_000)
    ('640 FLOP', '1.23 MFLOP', '4.1 GFLOP')
    """
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count} FLOP"
