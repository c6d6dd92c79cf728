"""torch's own samples and error inputs of every operator with a stand-in: enabled against stock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import freezekit as fk
from tests.enabled.helpers import tolerance

invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="needs expecttest")

# Importing it forbids to set torch.backends' flags in the whole process, which other tests do.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

NAMES = {
    *(f"nn.functional.conv{axes}d" for axes in (1, 2, 3)),
    *(f"nn.functional.conv_transpose{axes}d" for axes in (1, 2, 3)),
    *(f"nn.functional.avg_pool{axes}d" for axes in (1, 2, 3)),
    *(f"nn.functional.adaptive_avg_pool{axes}d" for axes in (1, 2, 3)),
    *(f"nn.functional.max_pool{axes}d" for axes in (1, 2, 3)),
    *(f"nn.functional.{name}" for name in ("batch_norm", "instance_norm", "layer_norm", "group_norm")),
    *(f"nn.functional.{name}" for name in ("relu", "relu6", "threshold", "hardtanh", "leaky_relu", "prelu", "rrelu")),
    *(f"nn.functional.{name}" for name in ("dropout", "dropout2d", "feature_alpha_dropout", "pad")),
    *(f"nn.functional.{name}" for name in ("silu", "gelu", "hardswish", "mish", "elu", "softplus")),
    "mul",
    "matmul",
    "linalg.vector_norm",
    "nn.functional.mse_loss",
    "pow",
    "native_batch_norm",
    "native_layer_norm",
}
OPS = [info for info in invocations.op_db if info.name in NAMES]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64]
MOST = 12  # samples of one operator and dtype: max_pool2d alone has 1,440


def test_all_of_them_are_found() -> None:
    assert {info.name for info in OPS} == NAMES


def run(call: Callable[..., Any], tree: Any, frozen: bool) -> list[Any] | tuple[type, str]:
    """Results, arguments and gradients of a call with leaves of its own, or its error.

    frozen: the first tensor alone learns.
    """
    leaves: list[Tensor] = []

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone(memory_format=torch.preserve_format)
        if value.requires_grad and not (frozen and leaves):
            leaves.append(copy.requires_grad_())
            return copy * 1  # in-place calls refuse leaves
        return copy

    torch.manual_seed(0)
    args, kwargs = tree_map(own, tree)
    try:
        made = call(*args, **kwargs)
        outputs = [value for value in tree_flatten(made)[0] if isinstance(value, Tensor)]
        found = [*outputs, *(value for value in args if isinstance(value, Tensor))]
        learns = [y for y in outputs if y.requires_grad]
        if leaves and learns:
            g = (torch.arange(learns[0].numel()).view(learns[0].shape) % 5 - 2).to(learns[0].dtype)
            found += torch.autograd.grad(learns[0], leaves, g, allow_unused=True)
        return [*found, [y.requires_grad for y in outputs]]
    except Exception as error:
        return type(error), str(error)


def compare(calls: list[tuple[Callable[..., Any], Any, bool]]) -> None:
    """Each (call, its arguments, frozen) in stock, then each while enabled: switching takes longer than a call."""
    expected = [run(*each) for each in calls]
    with fk.enabled():
        found = [run(*each) for each in calls]
    for each, ours, stock in zip(calls, found, expected, strict=True):
        if isinstance(stock, tuple):
            assert ours == stock, each
            continue
        assert isinstance(ours, list), (ours, each)
        assert len(ours) == len(stock)
        for a, b in zip(ours, stock):
            if not isinstance(b, Tensor):
                assert a == b, each
                continue
            torch.testing.assert_close(a, b, **tolerance(b))
            assert a.stride() == b.stride(), each


# Torch has no samples of prelu for integers.
SAMPLED = [(op, dtype) for op in OPS for dtype in DTYPES if op.name != "nn.functional.prelu" or dtype != torch.int64]


@pytest.mark.parametrize(("info", "dtype"), SAMPLED, ids=[f"{op.full_name}-{dtype}" for op, dtype in SAMPLED])
def test_samples(info: Any, dtype: torch.dtype) -> None:
    learns = dtype.is_floating_point or dtype.is_complex
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=learns))
    assert samples
    variants = [info.op, *([info.inplace_variant] if info.inplace_variant else [])]
    chosen = samples[:: max(1, len(samples) // MOST)]
    trees = [((sample.input, *sample.args), sample.kwargs) for sample in chosen]
    compare([(call, tree, frozen) for tree in trees for call in variants for frozen in (False, True)])


# Of mul there are some for GPUs alone.
REFUSING = [info for info in OPS if info.error_inputs_func and info.name != "mul"]


@pytest.mark.parametrize("info", REFUSING, ids=lambda info: info.full_name)
def test_error_inputs(info: Any) -> None:
    found = list(info.error_inputs("cpu"))
    assert found
    calls = []
    for bad in found:
        given = bad.sample_input
        tree = ((given.input, *given.args), given.kwargs)
        learning = tree_map(
            lambda v: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v, tree
        )
        calls += [(info.op, tree, True), (info.op, learning, True)]
    compare(calls)


MALFORMED: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("conv channels", lambda x: torch.conv2d(x, torch.ones(2, 5, 1, 1))),
    ("conv stride", lambda x: torch.conv2d(x, torch.ones(2, 3, 1, 1), stride=0)),
    ("conv stride of three", lambda x: torch.conv2d(x, torch.ones(2, 3, 1, 1), stride=(1, 1, 1))),
    ("conv padding", lambda x: torch.conv2d(x, torch.ones(2, 3, 1, 1), padding=-1)),
    ("conv kernel", lambda x: torch.conv2d(x, torch.ones(2, 3, 9, 9))),
    ("conv dtype", lambda x: torch.conv2d(x, torch.ones(2, 3, 1, 1, dtype=torch.double))),
    ("conv bias", lambda x: torch.conv2d(x, torch.ones(2, 3, 1, 1), torch.ones(3))),
    ("conv groups", lambda x: torch.conv2d(x, torch.ones(2, 3, 1, 1), groups=2)),
    ("conv groups of none", lambda x: torch.conv2d(x, torch.ones(2, 3, 1, 1), groups=0)),
    ("conv weight's rank", lambda x: torch.convolution(x, torch.ones(2, 3, 1), None, [1], [0], [1], False, [0], 1)),
    ("conv empty", lambda x: torch.conv2d(x[:, :, :0], torch.ones(2, 3, 1, 1))),
    ("transposed", lambda x: torch.conv_transpose2d(x, torch.ones(3, 2, 2, 2), output_padding=5)),
    ("norm's statistics", lambda x: F.batch_norm(x, torch.ones(2), torch.ones(2))),
    ("norm's weight", lambda x: F.batch_norm(x, torch.ones(3), torch.ones(3), torch.ones(9))),
    ("pool window", lambda x: torch.max_pool2d(x, 9)),
    ("pool window of three", lambda x: torch.max_pool2d(x, (1, 1, 1))),
    ("pool stride", lambda x: torch.max_pool2d(x, 2, 0)),
    ("pool padding", lambda x: torch.max_pool2d(x, 2, 2, 2)),
    ("pool far padding", lambda x: torch.max_pool2d(x, 2, 2, 1 << 40)),
    ("pool dilation", lambda x: torch.max_pool2d(x, 2, 2, 0, 0)),
    ("pool rank", lambda x: torch.max_pool2d(x[0, 0], 2)),
    ("pool batch of none", lambda x: torch.max_pool2d(x[:0], 2)),
    ("pool channels of none", lambda x: torch.max_pool2d(x[:, :0], 2)),
    ("average window", lambda x: F.avg_pool2d(x, 9)),
    ("average divisor", lambda x: F.avg_pool2d(x, 2, divisor_override=0)),
    ("average stride", lambda x: F.avg_pool2d(x, 2, (1, 1, 1))),
    ("adaptive size", lambda x: F.adaptive_avg_pool2d(x, -1)),
    ("adaptive size of none", lambda x: F.adaptive_avg_pool2d(x, 0)),
    ("reflection too far", lambda x: F.pad(x, (7, 7), "reflect")),
    ("reflection's rank", lambda x: F.pad(x, (1,), "reflect")),
    ("negative padding", lambda x: F.pad(x, (-1, -1, 0, 0), "reflect")),
    ("replication of none", lambda x: F.pad(x[:, :, :0], (1, 1, 1, 1), "replicate")),
    ("too much dropout", lambda x: torch.dropout(x, 1.5, True)),
    ("all dropped", lambda x: torch.dropout(x, 1.0, True)),
    ("ends crossed", lambda x: torch._C._nn.hardtanh(x, 1, -1)),
    ("ends of a complex number", lambda x: torch._C._nn.hardtanh(x, 1j, 2)),
    ("relu of views that overlap", lambda x: torch.relu_((x * 1).flatten()[:1].expand(4))),
    ("relu of integers", lambda x: torch.relu(x.long())),
]


@pytest.mark.parametrize(("name", "call"), MALFORMED, ids=[name for name, _ in MALFORMED])
def test_malformed_calls(name: str, call: Callable[[Tensor], Any]) -> None:
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    compare([(call, ((x,), {}), False), (call, ((x.detach(),), {}), False)])
