"""torch.library.opcheck for every operator, in every requires_grad state, in both layouts, with dynamic shapes too."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import freezekit  # noqa: F401 -- registers the operators

OPS = torch.ops.freezekit
SIZES = {"x": (2, 4, 7, 6), "w": (6, 2, 3, 3), "y": (2, 6, 4, 2), "b": (6,)}
SETTINGS = dict(stride=[2, 3], padding=[1, 1], dilation=[1, 1], groups=2)
# Operands of each operator, and what its third argument is.
OPERANDS = {"conv2d": ("x", "w", "b"), "conv2d_dgrad": ("y", "w"), "conv2d_wgrad": ("y", "x")}
SIZE_OF = {"conv2d_dgrad": "x", "conv2d_wgrad": "w"}


def operands(op: str, state: tuple[bool, ...], channels_last: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = []
    for name, needs_grad in zip(OPERANDS[op], state):
        tensor = torch.randn(SIZES[name], dtype=dtype)
        if channels_last and tensor.dim() == 4:
            tensor = tensor.to(memory_format=torch.channels_last)
        made.append(tensor.requires_grad_(needs_grad))
    return made


STATES = [(op, state) for op in OPERANDS for state in product((False, True), repeat=len(OPERANDS[op]))]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("op", "state"), STATES, ids=lambda v: v if isinstance(v, str) else "".join("01"[s] for s in v)
)
def test_opcheck(op: str, state: tuple[bool, ...], channels_last: bool) -> None:
    arguments: list[Any] = operands(op, state, channels_last)
    if op in SIZE_OF:
        arguments.append(SIZES[SIZE_OF[op]])
    # test_aot_dispatch_dynamic among them traces with symbolic sizes.
    torch.library.opcheck(getattr(OPS, op).default, tuple(arguments), SETTINGS)


@pytest.mark.parametrize("backend", ["aten", "emulated"])
@pytest.mark.parametrize("op", OPERANDS)
def test_opcheck_of_a_named_backend(op: str, backend: str) -> None:
    arguments: list[Any] = operands(op, (True, True, True), channels_last=False)
    if op in SIZE_OF:
        arguments.append(SIZES[SIZE_OF[op]])
    torch.library.opcheck(getattr(OPS, op).default, tuple(arguments), {**SETTINGS, "backend": backend})


@pytest.mark.parametrize("op", OPERANDS)
def test_a_trace_with_symbolic_sizes_serves_other_sizes(op: str) -> None:
    def call(*tensors: Tensor) -> Tensor:
        if op == "conv2d":
            return OPS.conv2d(*tensors, padding=[1])
        first, second, like = tensors
        return getattr(OPS, op)(first, second, like.shape, padding=[1])

    def make(n: int, h: int) -> list[Tensor]:
        x, w, y = torch.randn(n, 4, h, h), torch.randn(6, 4, 3, 3), torch.randn(n, 6, h, h)
        return {"conv2d": [x, w], "conv2d_dgrad": [y, w, x], "conv2d_wgrad": [y, x, w]}[op]

    traced = make_fx(call, tracing_mode="symbolic")(*make(2, 8))
    other = make(5, 11)
    assert torch.equal(traced(*other), call(*other))


def test_the_batch_may_be_unknown() -> None:
    """No check guards on the batch: a size that only the data tells (a mask's count) goes through."""

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, keep: Tensor, w: Tensor) -> Tensor:
            return OPS.conv2d(x[keep], w)

    x, w = torch.randn(6, 3, 8, 8), torch.randn(4, 3, 3, 3)
    keep = torch.tensor([True, False, True, True, False, False])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        program = torch.export.export(Net(), (x, keep, w))
    assert torch.equal(program.module()(x, ~keep, w), OPS.conv2d(x[~keep], w))
