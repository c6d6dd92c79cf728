"""torch's own samples and error inputs for F.conv2d and nn.Conv2d, run on freezekit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from freezekit.functional import conv2d
from tests.conftest import on

invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="needs expecttest")
from torch.testing._internal.common_modules import module_db  # noqa: E402

# Importing those forbids to set torch.backends' flags in the whole process, which other tests do.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

OP = next(op for op in invocations.op_db if op.name == "nn.functional.conv2d")
MODULE = next(info for info in module_db if info.module_cls is nn.Conv2d)
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHERS = [torch.complex64, torch.complex128, torch.int64]  # ATen's alone
PLACES = [
    *[pytest.param(dtype, "aten", "cpu", id=f"aten-{dtype}") for dtype in FLOATS + OTHERS],
    *[pytest.param(dtype, "emulated", "cpu", id=f"emulated-{dtype}") for dtype in FLOATS],
    *[pytest.param(dtype, "native", "cuda", id=f"native-{dtype}", marks=pytest.mark.gpu) for dtype in FLOATS],
]
STATES = [(False,) * 3, (True,) * 3, (True, False, False), (False, True, True), (True, False, True)]


def tolerance(stock: Tensor) -> dict[str, float]:
    """Sums in another order differ by roundings of their terms, which may be as large as the largest result."""
    if stock.dtype == torch.int64 or not stock.numel():
        return dict(rtol=0, atol=0)
    eps = torch.finfo(stock.dtype).eps
    return dict(rtol=16 * eps, atol=eps * max(64.0, stock.abs().max().item()))


def results(conv: Any, sample: Any, needs: tuple[bool, ...]) -> list[Tensor]:
    """Output and the gradients that are asked for; the gradient of the output is the same at every call."""
    tensors = [sample.input, *sample.args]
    leaves = [t.detach().clone().requires_grad_(n) if isinstance(t, Tensor) else t for t, n in zip(tensors, needs)]
    y = conv(*leaves, **sample.kwargs)
    if not any(isinstance(t, Tensor) and t.requires_grad for t in leaves):
        return [y]
    seed = torch.Generator().manual_seed(0)
    g = torch.randint(-2, 3, y.shape, generator=seed).to(device=y.device, dtype=y.dtype)
    return [y, *torch.autograd.grad(y, [t for t in leaves if isinstance(t, Tensor) and t.requires_grad], g)]


@pytest.mark.parametrize(("dtype", "backend", "device"), PLACES)
def test_op_samples(dtype: torch.dtype, backend: str, device: str) -> None:
    states = STATES if dtype.is_floating_point or dtype.is_complex else STATES[:1]
    samples = list(OP.sample_inputs(device, dtype, requires_grad=False))
    assert len(samples) >= 20
    for sample, needs in product(samples, states):
        with on(backend):
            ours = results(conv2d, sample, needs)
        for a, b in zip(ours, results(F.conv2d, sample, needs), strict=True):
            torch.testing.assert_close(a, b, **tolerance(b))
            assert a.stride() == b.stride(), (sample, needs)


def test_op_error_inputs() -> None:
    for bad in OP.error_inputs("cpu"):
        with pytest.raises(bad.error_type):
            F.conv2d(bad.sample_input.input, *bad.sample_input.args, **bad.sample_input.kwargs)
        with pytest.raises(bad.error_type):
            conv2d(bad.sample_input.input, *bad.sample_input.args, **bad.sample_input.kwargs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", MODULE.dtypes, ids=str)
def test_module_inputs(dtype: torch.dtype, training: bool) -> None:
    inputs = MODULE.module_inputs_func(MODULE, "cpu", dtype, True, training)
    assert inputs
    for given in inputs:
        arguments, keywords = given.constructor_input.args, given.constructor_input.kwargs
        stock = nn.Conv2d(*arguments, dtype=dtype, **keywords)
        ours = fk.FreezableConv2d(*arguments, dtype=dtype, **keywords)
        ours.load_state_dict(stock.state_dict())
        assert repr(ours).replace("FreezableConv2d", "Conv2d") == repr(stock)
        x = given.forward_input.args[0].detach()
        for freeze in (False, True):
            stock.requires_grad_(not freeze), ours.requires_grad_(not freeze)
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            outputs = [m(leaf) for m, leaf in zip((stock, ours), leaves)]
            torch.testing.assert_close(outputs[1], outputs[0])
            for y in outputs:
                y.square().sum().backward()
            torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
            for p, q in zip(stock.parameters(), ours.parameters()):
                torch.testing.assert_close(q.grad, p.grad)
            stock.zero_grad(), ours.zero_grad()
