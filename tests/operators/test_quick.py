"""The short way into conv2d, norms and activations: the same operator, and only for calls that have nothing unusual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import freezekit as fk
from freezekit import _C
from tests.observe import Calls

X, W, B = torch.randn(2, 4, 6, 6), nn.Parameter(torch.randn(6, 2, 3, 3)), torch.randn(6)


class Sub(Tensor):
    pass


class Watch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(func)
        return func(*args, **(kwargs or {}))


seen: list[Any] = []


def conv2d(**changes: Any) -> Any:
    call = dict(input=X, weight=W, bias=B, stride=(1, 2), padding=1, dilation=(1, 1), groups=2, backend="auto")
    return _C.quick.conv2d(*{**call, **changes}.values())


def test_plain_calls_are_the_operator() -> None:
    expected = torch.ops.freezekit.conv2d(X, W, B, (1, 2), (1,), (1, 1), 2)
    with Calls() as calls:
        y = conv2d()
    assert torch.equal(y, expected)
    assert y.grad_fn.name() == expected.grad_fn.name()
    assert calls.count["freezekit::conv2d"] == 1
    assert torch.equal(conv2d(bias=None), torch.ops.freezekit.conv2d(X, W, None, (1, 2), (1,), (1, 1), 2))
    x, one = X.clone().requires_grad_(), torch.full((4,), 1.5)
    for weight in (None, one):
        norm = (x, weight, None, one, one, 1e-3)
        y, expected = _C.quick.batch_norm(*norm), torch.ops.freezekit.batch_norm(*norm)
        assert torch.equal(y, expected)
        assert y.grad_fn.name() == "FreezekitBatchNormBackward"
    y = _C.quick.activation(x, "leaky_relu", 0.5, 0.0, False, "auto")
    assert torch.equal(y, torch.where(X > 0, X, X / 2))
    assert y.grad_fn.name() == "FreezekitActivationBackward"
    z = X.clone()
    assert _C.quick.activation(z, "relu", 0.0, 0.0, True, "auto") is z
    assert torch.equal(z, X.relu())


@pytest.mark.parametrize(
    "changes",
    [
        {"input": None}, {"input": X[0]}, {"input": X.as_subclass(Sub)}, {"weight": 3}, {"weight": W.as_subclass(Sub)},
        {"bias": 1.0}, {"bias": B.as_subclass(Sub)}, {"stride": [1, 1]}, {"stride": (1,)}, {"stride": (1, 2.0)},
        {"padding": "same"}, {"dilation": True}, {"dilation": 2**63}, {"groups": (1, 1)}, {"groups": 1.0},
    ],
    ids=lambda changes: " ".join(f"{n} {type(v).__name__ if isinstance(v, Tensor) else v}" for n, v in changes.items()),
)  # fmt: skip
def test_unusual_calls_are_left_to_python(changes: dict[str, Any]) -> None:
    assert conv2d(**changes) is None


def test_unusual_activations_are_left_to_python() -> None:
    for input, a, inplace in ((None, 0.0, False), (X.as_subclass(Sub), 0.0, False), (X, 0, False), (X, 0.0, 1)):
        assert _C.quick.activation(input, "relu", a, 0.0, inplace, "auto") is None


def test_unusual_norms_are_left_to_python() -> None:
    one = torch.ones(4)
    for place, value in ((0, None), (0, X.as_subclass(Sub)), (1, 2.0), (2, one.as_subclass(Sub)), (4, None), (5, 1)):
        arguments: list[Any] = [X, one, one, one, one, 1e-5]
        arguments[place] = value
        assert _C.quick.batch_norm(*arguments) is None


def test_errors_are_the_operator_s() -> None:
    with pytest.raises(RuntimeError, match="groups"):
        conv2d(groups=5)
    with pytest.raises(ValueError, match="backend"):
        conv2d(backend="cudnn")
    with pytest.raises(ValueError, match="kind"):
        _C.quick.activation(X, "gelu", 0.0, 0.0, False, "auto")
    with pytest.raises(TypeError):
        conv2d(backend=None)


def test_function_modes_see_the_calls() -> None:
    seen.clear()
    with Watch():
        fk.functional.conv2d(X, W, B, groups=2)
        fk.functional.relu(X.clone().requires_grad_())
    assert fk.functional.conv2d in seen
    assert fk.functional.relu in seen or fk.functional.relu.__wrapped__ in seen
