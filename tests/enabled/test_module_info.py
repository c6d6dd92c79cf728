"""torch's own module inputs and every layout of a convolution's operands: stock classes, enabled against stock."""

from __future__ import annotations

from inspect import signature
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import freezekit as fk
from freezekit.conversion.swap import SWAPS
from tests.dropin.test_layouts import GRADS, INPUTS, PROBLEMS, WEIGHTS
from tests.dropin.test_layouts import run as run_laid_out
from tests.enabled.test_op_info import compare

modules = pytest.importorskip("torch.testing._internal.common_modules", reason="needs expecttest")

# Importing it forbids to set torch.backends' flags in the whole process, which other tests do.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

# What is swapped, and what else has a stand-in for its operator.
KINDS = set(SWAPS) | {nn.Threshold}
MODULES = [info for info in modules.module_db if info.module_cls in KINDS]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
def test_module_inputs(info: Any, training: bool) -> None:
    kind, calls = info.module_cls, []
    for dtype in info.dtypes:
        for given in info.module_inputs_func(info, "cpu", dtype, True, training):
            keywords = dict(given.constructor_input.kwargs)
            if "dtype" in signature(kind.__init__).parameters:
                keywords["dtype"] = dtype
            module = kind(*given.constructor_input.args, **keywords).train(training)

            def call(*arguments: Any, module: nn.Module = module, **keywords: Any) -> Any:
                *inputs, own = arguments
                return functional_call(module, own, tuple(inputs), keywords)

            own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            tree = ((*given.forward_input.args, own), given.forward_input.kwargs)
            calls += [(call, tree, False), (call, tree, True)]
    assert len(calls) >= 2
    compare(calls)


def test_every_kind_is_among_them() -> None:
    assert {info.module_cls for info in MODULES} == KINDS - {nn.Dropout}  # torch lists no nn.Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_layouts(problem: tuple[Any, Any, dict[str, Any]], dtype: torch.dtype) -> None:
    x_size, w_size, settings = problem
    made = torch.randint(-2, 3, x_size).to(dtype), torch.randint(-2, 3, w_size).to(dtype)

    def results() -> list[dict[str, Tensor]]:
        cases = product(INPUTS, WEIGHTS, GRADS, (False, True))
        return [run_laid_out(F.conv2d, made, case[:3], case[3], **settings) for case in cases]

    stock = results()
    with fk.enabled():
        ours = results()
    for a, b in zip(ours, stock, strict=True):
        for name in b:
            assert torch.equal(a[name], b[name]), name
            assert a[name].stride() == b[name].stride(), name
