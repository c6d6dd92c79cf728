"""torch's own samples, error inputs and module inputs of every layer that freezekit swaps, conv2d aside."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import freezekit as fk
from freezekit.conversion.swap import SWAPS

invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="needs expecttest")
from torch.testing._internal.common_modules import module_db  # noqa: E402

# Importing those forbids to set torch.backends' flags in the whole process, which other tests do.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

NAMES = set(fk.functional.__all__) - {"conv2d", "conv2d_bias_grad", "conv2d_dgrad", "conv2d_wgrad"}
OPS = [
    info
    for info in invocations.op_db
    if info.name.removeprefix("nn.functional.") in NAMES and info.name.startswith("nn.functional.")
]
MODULES = [info for info in module_db if info.module_cls in SWAPS and info.module_cls is not nn.Conv2d]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64]
MOST = 40  # samples of one operator: max_pool2d alone has 1,440


def name_of(info: Any) -> str:
    return info.full_name


def pair(info: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """freezekit's function and torch's: `info.op` itself may set a seed."""
    name = info.name.removeprefix("nn.functional.")
    return getattr(fk.functional, name), getattr(F, name)


def run(call: Callable[..., Any], tree: Any, frozen: bool) -> list[Any]:
    """Outputs and gradients of a call with leaves of its own; `frozen`: only the first tensor needs a gradient."""
    leaves: list[Tensor] = []

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        learns = (value.is_floating_point() or value.is_complex()) and value.requires_grad
        copy = value.detach().clone(memory_format=torch.preserve_format)
        if learns and not (frozen and leaves):
            leaves.append(copy.requires_grad_())
        return copy

    torch.manual_seed(0)
    args, kwargs = tree_map(own, tree)
    made = call(*args, **kwargs)
    outputs = list(made) if isinstance(made, tuple) else [made]
    found = [*outputs, *(value for value in args if isinstance(value, Tensor))]  # running statistics, in-place results
    if leaves and outputs[0].requires_grad:
        g = torch.arange(outputs[0].numel()).view(outputs[0].shape) % 5 - 2
        found += torch.autograd.grad(outputs[0], leaves, g.to(outputs[0].dtype), allow_unused=True)
    return found


# Torch has no samples of prelu for integers.
SAMPLED = [(op, dtype) for op in OPS for dtype in DTYPES if op.name != "nn.functional.prelu" or dtype != torch.int64]


@pytest.mark.parametrize(("info", "dtype"), SAMPLED, ids=[f"{name_of(op)}-{dtype}" for op, dtype in SAMPLED])
def test_op_samples(info: Any, dtype: torch.dtype) -> None:
    """Results, gradients and strides are torch's, and where it refuses a dtype, so does freezekit."""
    learns = dtype.is_floating_point or dtype.is_complex
    try:
        samples = list(info.sample_inputs("cpu", dtype, requires_grad=learns))
    except (RuntimeError, TypeError):
        pytest.fail(f"{info.full_name} has no samples of {dtype}")
    samples = samples[:: max(1, len(samples) // MOST)]
    assert len(samples) >= 3
    ours_s, torch_s = pair(info)
    for sample in samples:
        tree = ((sample.input, *sample.args), sample.kwargs)
        for frozen in (False, True):
            try:
                stock = run(torch_s, tree, frozen)
            except Exception as error:
                with pytest.raises(type(error)):
                    run(ours_s, tree, frozen)
                continue
            ours = run(ours_s, tree, frozen)
            assert len(ours) == len(stock)
            for a, b in zip(ours, stock):
                assert (a is None) == (b is None), sample
                if b is None:
                    continue
                torch.testing.assert_close(a, b, **tolerance(b))
                assert a.stride() == b.stride(), (sample, frozen)


def tolerance(stock: Tensor) -> dict[str, float]:
    """Sums in another order differ by roundings of their terms, which may be as large as the largest result."""
    if not (stock.dtype.is_floating_point or stock.dtype.is_complex) or not stock.numel():
        return dict(rtol=0, atol=0)
    eps = torch.finfo(stock.dtype).eps
    largest = stock.abs().nan_to_num(0, 0, 0).max().item()
    return dict(rtol=16 * eps, atol=eps * max(64.0, largest), equal_nan=True)


@pytest.mark.parametrize("info", [info for info in OPS if info.error_inputs_func], ids=name_of)
def test_op_error_inputs(info: Any) -> None:
    found = list(info.error_inputs("cpu"))
    assert found
    for bad in found:
        given = bad.sample_input
        for call in pair(info):
            with pytest.raises(bad.error_type):
                call(given.input, *given.args, **given.kwargs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
def test_module_inputs(info: Any, training: bool) -> None:
    kind, checked = info.module_cls, 0
    for dtype in info.dtypes:
        for given in info.module_inputs_func(info, "cpu", dtype, True, training):
            arguments, keywords = given.constructor_input.args, given.constructor_input.kwargs
            typed = dict(keywords, dtype=dtype) if "dtype" in signature(kind.__init__).parameters else keywords
            stock, ours = kind(*arguments, **typed), SWAPS[kind](*arguments, **typed)
            ours.load_state_dict(stock.state_dict())
            assert repr(ours).replace("Freezable", "") == repr(stock)
            for frozen in (False, True):
                results = []
                for module in (ours, stock):
                    module.train(training).requires_grad_(not frozen).zero_grad()
                    call = (given.forward_input.args, given.forward_input.kwargs)
                    results.append(
                        [*run(module, call, False), *(p.grad for p in module.parameters()), *module.buffers()]
                    )
                assert len(results[0]) == len(results[1])
                for a, b in zip(*results):
                    assert (a is None) == (b is None)
                    if b is not None:
                        torch.testing.assert_close(a, b, **tolerance(b))
                checked += 1
    assert checked >= 4


@pytest.mark.parametrize(
    "info", [info for info in MODULES if info.module_error_inputs_func], ids=lambda i: i.module_cls.__name__
)
def test_module_error_inputs(info: Any) -> None:
    for bad in info.module_error_inputs_func(info, "cpu", torch.float32, False, True):
        made = bad.module_error_input

        def use(kind: type[nn.Module], made: Any = made) -> None:
            module = kind(*made.constructor_input.args, **made.constructor_input.kwargs)
            module(*made.forward_input.args, **made.forward_input.kwargs)

        for kind in (info.module_cls, SWAPS[info.module_cls]):
            with pytest.raises(bad.error_type, match=bad.error_regex):
                use(kind)


def test_every_layer_that_is_swapped_is_among_them() -> None:
    assert {info.module_cls for info in MODULES} == set(SWAPS) - {nn.Conv2d, nn.Dropout}  # torch lists no nn.Dropout
    assert {info.name.removeprefix("nn.functional.") for info in OPS} == NAMES
