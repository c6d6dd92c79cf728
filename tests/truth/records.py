"""Tensor maps and bulk copies as both sides note them: the structures of record.h."""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass

import numpy as np

OPERATORS = ("fprop", "dgrad", "wgrad")
KINDS = ("bf16", "f16", "tf32")


class Map(ctypes.Structure):
    """The arguments of cuTensorMapEncode*."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("im2col", "type", "rank")),
        *((name, ctypes.c_int64 * n) for name, n in (("sizes", 4), ("strides", 3), ("traversal", 4), ("box", 4))),
        *((name, ctypes.c_int64 * 2) for name in ("lower", "upper")),
        *((name, ctypes.c_int64) for name in ("channels", "pixels", "swizzle", "interleave", "fill", "address")),
    ]

    def differing(self, other: Map, *ignored: str) -> list[str]:
        """Names of the arguments, but for those ignored, in which two maps differ."""

        def plain(value: object) -> object:
            return tuple(value) if isinstance(value, ctypes.Array) else value

        names = [field[0] for field in self._fields_]
        return [n for n in names if n not in ignored and plain(getattr(self, n)) != plain(getattr(other, n))]


COPY = np.dtype(
    [("map", "i4"), ("tile", "i4"), ("step", "i4"), ("to", "i4"), ("at", "i4", 4), ("offset", "i4", 2)], align=True
)


@dataclass(frozen=True)
class Problem:
    """A convolution as record.h has it; pairs are (h, w)."""

    op: str
    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    pad: tuple[int, int] = (0, 0)
    far_pad: tuple[int, int] | None = None  # of the far sides; None: as of the near ones
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    kind: str = "bf16"

    def __str__(self) -> str:
        def pair(of: tuple[int, int]) -> str:
            return f"{of[0]},{of[1]}"

        pad = f"pad {pair(self.pad)}" + (f" and {pair(self.far_pad)}" if self.far_pad is not None else "")
        size = f"{self.n}x{self.h}x{self.w}x{self.c} to {self.k}, {self.r}x{self.s}"
        steps = f"stride {pair(self.stride)}, dilation {pair(self.dilation)}"
        return f"{self.op} {self.kind} {size}, {pad}, {steps}"

    @property
    def out(self) -> tuple[int, int]:
        """P and Q."""
        far = self.pad if self.far_pad is None else self.far_pad
        sizes = zip((self.h, self.w), (self.r, self.s), self.pad, far, self.stride, self.dilation)
        p, q = ((size + near + off - d * (taps - 1) - 1) // step + 1 for size, taps, near, off, step, d in sizes)
        return p, q

    def as_record(self) -> ctypes.Array[ctypes.c_int32]:
        """The structure of record.h."""
        op, n, h, w, c, k, r, s, pad, far, stride, dilation, kind = astuple(self)
        values = (OPERATORS.index(op), KINDS.index(kind), n, h, w, c, k, r, s, *pad, *(far or pad), *stride, *dilation)
        return (ctypes.c_int32 * len(values))(*values)
