"""Convolution problems and the tensors for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One convolution: sizes and settings as F.conv2d takes them."""

    n: int = 2
    c: int = 4
    h: int = 7
    w: int = 6
    k: int = 6
    r: int = 3
    s: int = 3
    settings: dict[str, Any] = field(default_factory=dict)
    bias: bool = True

    def __str__(self) -> str:
        settings = ",".join(f"{k}={v}" for k, v in self.settings.items()).replace(" ", "")
        return f"{self.n}x{self.c}x{self.h}x{self.w}-{self.k}x{self.r}x{self.s}-{settings}"

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return self.k, self.c // self.settings.get("groups", 1), self.r, self.s

    def tensors(
        self, dtype: torch.dtype, device: str = "cpu", integers: bool = False, channels_last: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """input, weight and bias; small integers make every sum exact in every dtype."""

        def make(*size: int) -> Tensor:
            values = torch.randint(-2, 3, size).double() if integers else torch.randn(size, dtype=torch.float64)
            return values.to(device=device, dtype=dtype)

        x, w = make(*self.input_size), make(*self.weight_size)
        if channels_last:
            x, w = x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)
        return x, w, make(self.k) if self.bias else None


CASES = [
    Case(settings={}),
    Case(settings={"padding": 1}),
    Case(settings={"stride": 2, "padding": 1}),
    Case(h=9, settings={"stride": (3, 2), "padding": (0, 2)}),
    Case(h=9, w=9, settings={"dilation": 2, "padding": 1}),
    Case(h=11, w=10, settings={"dilation": (1, 3), "stride": 2, "padding": 3}),
    Case(settings={"groups": 2, "padding": 1}),
    Case(c=6, k=6, settings={"groups": 6, "padding": 1, "stride": 2}),
    Case(c=4, k=8, settings={"groups": 4}),
    Case(c=3, k=5, r=1, s=1, settings={}, bias=False),
    Case(c=3, k=5, r=1, s=1, settings={"stride": 2}),
    Case(c=1, k=1, r=5, s=2, settings={"padding": (4, 1)}, bias=False),
    Case(n=1, h=3, w=3, settings={}),
    Case(n=3, c=5, h=8, w=13, k=7, r=7, s=7, settings={"padding": 3, "stride": 2}),
    Case(n=0, settings={"padding": 1}),
]
