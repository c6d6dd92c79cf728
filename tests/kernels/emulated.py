"""Builds the kernels for the CPU emulator with g++ and calls them on torch tensors, without the torch extension."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.emulator.build import MODES, Program, build, kernel_host_sources, kernel_sources

PROGRAM = Program("kernels", kernel_sources(), (*kernel_host_sources(), "tests/kernels/driver.cpp"), shared=True)
OPERATORS = ("fprop", "dgrad", "wgrad")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
STATUS = ("success", "unsupported", "invalid_argument", "launch_failed")
FAMILIES = {"direct": 1, "implicit_gemm": 2, "depthwise": 3, "hopper": 4}


class KernelError(RuntimeError):
    """A launcher returned something else than success."""


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated kernels with the driver, built where a source changed."""
    loaded = ctypes.CDLL(str(build(PROGRAM, MODES["plain"])))
    loaded.freezekit_last_error.restype = ctypes.c_char_p
    loaded.freezekit_emulator_counter.restype = ctypes.c_uint64
    return loaded


@dataclass(frozen=True)
class Problem:
    """One convolution, named as in csrc/core/problem.h; pairs are (height, width)."""

    n: int = 2
    c: int = 8
    h: int = 6
    w: int = 7
    k: int = 8
    r: int = 3
    s: int = 3
    pad: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def p(self) -> int:
        return (self.h + 2 * self.pad[0] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def q(self) -> int:
        return (self.w + 2 * self.pad[1] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1

    def __str__(self) -> str:
        sizes = f"n{self.n}c{self.c}h{self.h}w{self.w}k{self.k}r{self.r}s{self.s}"
        p, s, d = (f"{a}x{b}" for a, b in (self.pad, self.stride, self.dilation))
        return f"{sizes}-pad{p}-stride{s}-dil{d}-g{self.groups}"

    @property
    def sizes(self) -> dict[str, tuple[int, int, int, int]]:
        """Sizes in torch's order, (N, C, H, W) and (K, C/G, R, S)."""
        return {
            "x": (self.n, self.c, self.h, self.w),
            "filter": (self.k, self.c // self.groups, self.r, self.s),
            "y": (self.n, self.k, self.p, self.q),
        }

    @property
    def flat(self) -> list[int]:
        head = [self.n, self.c, self.h, self.w, self.k, self.r, self.s, self.p, self.q]
        return [*head, *self.pad, *self.stride, *self.dilation, self.groups]


@dataclass
class Epilogue:
    """The tensors of csrc/kernels/api.h's Epilogue; masks are int32, one bit per element in NHWC order.

    A bias of another dtype than the other tensors' is one of the accumulators'. filter_scale is Conv2dTensors'.
    """

    scale: Tensor | None = None
    filter_scale: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False
    relu_end: float = float("inf")
    mask_out: Tensor | None = None
    mask_in: Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """What a choice depends on, parts of the choice to force, and the emulator's schedule."""

    sm: int = 80
    sm_count: int = 4
    allow_tf32: bool = False
    deterministic: bool = False
    hopper: bool = False
    family: str | None = None
    config: int = -1
    split_k: int = -1
    seed: int = 0
    cp_async: str = "lazy"

    @property
    def target(self) -> list[int]:
        return [self.sm, self.sm_count, self.allow_tf32, self.deterministic, self.hopper]


@contextlib.contextmanager
def counters() -> Iterator[dict[str, int]]:
    """The emulator's counters over the body, filled in at its end."""
    counted: dict[str, int] = {}
    library().freezekit_emulator_reset_counters()
    yield counted
    library().freezekit_emulator_counter_name.restype = ctypes.c_char_p
    index = 0
    while name := library().freezekit_emulator_counter_name(index):
        counted[name.decode()] = library().freezekit_emulator_counter(name)
        index += 1


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def poisoned(size: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
    """A channels_last tensor of NaN that begins `offset` elements after an aligned address."""
    n, c, h, w = size
    flat = torch.full((n * c * h * w + offset,), float("nan"), dtype=dtype)
    return flat[offset:].view(n, h, w, c).permute(0, 3, 1, 2)


def nhwc(tensor: Tensor, offset: int = 0) -> Tensor:
    """A dense NHWC copy of an (N, C, H, W) tensor, `offset` elements after an aligned address."""
    copy = poisoned(tuple(tensor.shape), tensor.dtype, offset)
    return copy.copy_(tensor)


def run_conv2d(
    operator: str,
    problem: Problem,
    first: Tensor,
    second: Tensor,
    epilogue: Epilogue | None = None,
    settings: Settings | None = None,
    offset: int = 0,
) -> tuple[Tensor, str]:
    """The result and the name of the kernel. first, second: (x, w) for fprop, (dy, w) for dgrad, (dy, x) for wgrad."""
    epilogue, settings = epilogue or Epilogue(), settings or Settings()
    names = {"fprop": ("x", "filter", "y"), "dgrad": ("y", "filter", "x"), "wgrad": ("y", "x", "filter")}[operator]
    tensors = {names[0]: nhwc(first, offset), names[1]: nhwc(second, offset)}
    result = tensors[names[2]] = poisoned(problem.sizes[names[2]], first.dtype, offset)
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == problem.sizes[name], (name, tensor.shape, problem)
    residual = None if epilogue.residual is None else nhwc(epilogue.residual, offset)
    given = [pointer(t) for t in (epilogue.bias, residual, epilogue.mask_out, epilogue.mask_in)]
    given += [pointer(epilogue.scale), pointer(epilogue.filter_scale)]
    wide_bias = epilogue.bias is not None and epilogue.bias.dtype != first.dtype
    family = FAMILIES[settings.family] if settings.family else -1
    options = [*settings.target, family, settings.config, settings.split_k]
    library().freezekit_emulator_set_seed(settings.seed)
    assert library().freezekit_emulator_set_cp_async(settings.cp_async.encode())
    kernel = ctypes.c_char_p()
    status = library().driver_conv2d(
        OPERATORS.index(operator),
        DTYPES[first.dtype],
        (ctypes.c_int64 * 16)(*problem.flat),
        (ctypes.c_int * 8)(*options),
        (ctypes.c_void_p * 3)(*(pointer(tensors[name]) for name in ("x", "filter", "y"))),
        (ctypes.c_void_p * 6)(*given),
        int(wide_bias),
        int(epilogue.relu),
        ctypes.c_float(epilogue.relu_end),
        ctypes.byref(kernel),
    )
    check(status)
    return result, (kernel.value or b"").decode()


@dataclass(frozen=True)
class Selection:
    """What select() answered; sizes in bytes."""

    family: str
    config: int
    split_k: int
    workspace: int
    kernel: str
    reason: str


def select(operator: str, problem: Problem, dtype: torch.dtype, settings: Settings | None = None) -> Selection:
    """The library's choice for a problem on the device that settings describe; nothing runs."""
    settings = settings or Settings()
    numbers = (ctypes.c_int64 * 4)()
    kernel, reason = ctypes.c_char_p(), ctypes.c_char_p()
    library().driver_select(
        OPERATORS.index(operator),
        DTYPES[dtype],
        (ctypes.c_int64 * 16)(*problem.flat),
        (ctypes.c_int * 5)(*settings.target),
        numbers,
        ctypes.byref(kernel),
        ctypes.byref(reason),
    )
    family = {0: "none", **{number: name for name, number in FAMILIES.items()}}[numbers[0]]
    rest = (int(numbers[1]), int(numbers[2]), int(numbers[3]))
    return Selection(family, *rest, (kernel.value or b"").decode(), (reason.value or b"").decode())


def run_bias_grad(dy: Tensor, seed: int = 0) -> Tensor:
    """db of a (rows, k) matrix."""
    library().freezekit_emulator_set_seed(seed)
    db = torch.full(dy.shape[1:], float("nan"), dtype=dy.dtype)
    rows, k = dy.shape
    check(
        library().driver_bias_grad(
            ctypes.c_void_p(pointer(dy)),
            ctypes.c_void_p(pointer(db)),
            ctypes.c_int64(rows),
            ctypes.c_int64(k),
            DTYPES[dy.dtype],
        )
    )
    return db


def check(status: int) -> None:
    if STATUS[status] != "success":
        raise KernelError(f"{STATUS[status]}: {library().freezekit_last_error().decode()}")
