"""The ptx:: wrappers beside CUTLASS's and CuTe's for the same instructions, as machine code of sm_90a."""

from __future__ import annotations

import functools
import re
import struct
from pathlib import Path

from tests.emulator.build import Planted

from . import nvidia
from .comparison import Comparison, Found

KERNEL = re.compile(r"^[A-Z_]+\((\w+),", re.MULTILINE)
INSTRUCTION = 16  # bytes


def names() -> tuple[str, ...]:
    """Of the kernels that both sources have, in their order."""
    mine, theirs = (tuple(KERNEL.findall((nvidia.HERE / source).read_text())) for source in nvidia.WRAPPERS)
    assert mine == theirs, f"only one side has {sorted(set(mine) ^ set(theirs))}, or the order differs"
    return mine


@functools.cache
def code(cubin: Path) -> dict[str, bytes]:
    """The machine code of each kernel of a cubin, by its name: sections .text.* of a 64-bit ELF file."""
    data = cubin.read_bytes()
    (at,) = struct.unpack_from("<Q", data, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, at + i * size) for i in range(count)]
    strings = data[headers[of_names][4] :]
    found = {}
    for name_at, _, _, _, start, length, *_ in headers:
        name = strings[name_at : strings.index(b"\0", name_at)].decode()
        if name.startswith(".text.of_"):
            found[name.removeprefix(".text.of_")] = data[start : start + length]
    return found


def compare(name: str, planted: Planted) -> Found:
    """Instructions that differ."""
    mine, theirs = (
        code(cubin)[name] for cubin in (nvidia.wrappers_of_freezekit(planted), nvidia.wrappers_of_cutlass())
    )
    starts = range(0, max(len(mine), len(theirs)), INSTRUCTION)
    differ = sum(mine[at : at + INSTRUCTION] != theirs[at : at + INSTRUCTION] for at in starts)
    return Found(differ, len(starts), "instructions")


COMPARISONS = tuple(Comparison(f"ptx::{name}", functools.partial(compare, name)) for name in names())
