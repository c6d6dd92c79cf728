"""Settings that a trace with dynamic shapes makes of sizes: symbols go wherever ATen takes them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import freezekit.functional as ff

X, W, B = torch.randn(2, 4, 9, 9), torch.randn(4, 2, 3, 3), torch.randn(4)

# Each computes a setting from a size of the input, n.
CALLS: dict[str, Callable[..., Tensor]] = {
    "conv2d, stride": lambda f, x, n: f.conv2d(x, W, B, stride=n - 7, groups=2),
    "conv2d, stride of two": lambda f, x, n: f.conv2d(x, W, B, stride=(n - 7, 1), groups=2),
    "conv2d, padding": lambda f, x, n: f.conv2d(x, W, B, padding=n // 4, groups=2),
    "conv2d, dilation": lambda f, x, n: f.conv2d(x, W, B, dilation=(1, n // 4), groups=2),
    "conv2d, groups": lambda f, x, n: f.conv2d(x, W, B, groups=x.shape[1] // 2),
    "conv1d, padding": lambda f, x, n: f.conv1d(x.flatten(2), W[..., 0], B, padding=n // 3, groups=2),
    "conv1d, groups": lambda f, x, n: f.conv1d(x.flatten(2), W[..., 0], B, groups=x.shape[1] // 2),
    "conv_transpose2d, stride": lambda f, x, n: f.conv_transpose2d(x, W, stride=n - 7),
    "max_pool2d, kernel_size": lambda f, x, n: f.max_pool2d(x, n // 3, n // 4, n // 8),
    "max_pool3d, kernel_size": lambda f, x, n: f.max_pool3d(x.unsqueeze(2), (1, n // 3, 2), n // 4),
    "avg_pool2d, kernel_size": lambda f, x, n: f.avg_pool2d(x, n // 3, n // 4),
    "avg_pool2d, divisor": lambda f, x, n: f.avg_pool2d(x, 2, divisor_override=n),
    "adaptive_avg_pool2d": lambda f, x, n: f.adaptive_avg_pool2d(x, (n // 2, 3)),
    "pad": lambda f, x, n: f.pad(x, (n // 3, 1, 0, n // 4), "reflect"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_compiled_with_dynamic_shapes(call: Callable[..., Tensor]) -> None:
    def run(f: object, x: Tensor) -> Tensor:
        return call(f, x, x.shape[2])

    torch.compiler.reset()
    compiled = torch.compile(lambda x: run(ff, x), backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (9, 8, 10):
        x = torch.randn(2, 4, size, 9, requires_grad=True)
        stock = x.detach().clone().requires_grad_()
        y, expected = compiled(x), run(F, stock)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy)
        torch.testing.assert_close(x.grad, stock.grad)


@pytest.mark.parametrize("name", ["conv2d", "conv2d_dgrad", "conv2d_wgrad", "convolution", "frozen_conv2d"])
def test_schemas_have_symbols_where_aten_s_do(name: str) -> None:
    schema = str(getattr(torch.ops.freezekit, name).default._schema)
    for setting in ("stride", "padding", "dilation"):
        assert re.search(rf"SymInt\[2?\] {setting}\b", schema), schema
    assert re.search(r"SymInt groups\b", schema), schema
