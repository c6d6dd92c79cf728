"""Malformed calls of every layer as a function: what torch refuses is refused, by an exception of its type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import freezekit as fk

NAN = float("nan")
X = {d: torch.linspace(-1, 1, 3 * 4**d).view(1, 3, *[4] * d) for d in (1, 2, 3)}
SIZES: list[Any] = [None, NAN, 0, -1, 1.5, "a", 2**31, [], [1] * 7, [NAN, NAN], (1, None), torch.tensor(1.5), 2**62]
TENSORS: list[Any] = [
    None, [1.0], 3, "x", torch.ones(()), torch.ones(3), torch.ones(3, 3), torch.ones([1] * 7), torch.ones(0, 3, 8, 8),
    X[2].bool(), X[2].to_sparse(), X[2].cfloat(), X[2].to(torch.int32),
]  # fmt: skip
FLOATS: list[Any] = [NAN, None, "a", -1.0, 2.0, 1j, [1.0], float("inf")]
COUNTS: list[Any] = [None, NAN, 0, -1, 7, "a", 2**62, [1]]

# torch's check of types takes no bool for an integer and no number for a flag; freezekit's sees less.
LENIENT = {"ceil_mode", "count_include_pad", "training", "momentum"}


def arguments() -> dict[str, list[tuple[str, Any, list[Any]]]]:
    """Function -> its arguments: name, a right value, wrong ones."""
    found: dict[str, list[tuple[str, Any, list[Any]]]] = {
        name: [("input", X[2], TENSORS)] for name in ("relu", "relu6", "hardtanh", "leaky_relu", "dropout")
    }
    found |= {name: [("input", X[2], TENSORS)] for name in ("silu", "hardswish", "mish")}
    found["gelu"] = [("input", X[2], TENSORS), ("approximate", "tanh", ["sigmoid", None, 3])]
    found["hardtanh"] += [("min_val", -1.0, FLOATS), ("max_val", 1.0, FLOATS)]
    found["leaky_relu"] += [("negative_slope", 0.1, FLOATS)]
    found["dropout"] += [("p", 0.5, FLOATS), ("training", True, ["a"])]
    found["prelu"] = [("input", X[2], TENSORS), ("weight", torch.ones(3), [*TENSORS, torch.ones(5)])]
    for d in (1, 2, 3):
        # torch's own max_pool1d never comes back from a window of 2**62.
        sizes = SIZES if d > 1 else SIZES[:-1]
        found[f"max_pool{d}d"] = [("input", X[d], TENSORS), ("kernel_size", 2, sizes), ("stride", 2, sizes)]
        found[f"max_pool{d}d"] += [("padding", 0, sizes), ("dilation", 1, sizes), ("ceil_mode", False, ["a"])]
    affine = [("weight", torch.ones(3), [*TENSORS, torch.ones(5)]), ("bias", torch.ones(3), [*TENSORS, torch.ones(5)])]
    eps = ("eps", 1e-5, [NAN, "a", None, -1.0])
    running = [(f"running_{what}", torch.ones(3), [*TENSORS, torch.ones(5)]) for what in ("mean", "var")]
    found["batch_norm"] = [("input", X[2], TENSORS), *running, *affine, eps]
    instance = [("input", X[2], TENSORS), *running, *affine, eps, ("use_input_stats", False, [])]
    found["instance_norm"] = instance
    shape = [None, 4, NAN, [], [7], [4, 4, 4, 4, 4], [-1], "a", [2**62]]
    found["layer_norm"] = [("input", X[2], TENSORS), ("normalized_shape", [4], shape), eps]
    found["layer_norm"] += [(name, torch.ones(4), TENSORS) for name in ("weight", "bias")]
    found["group_norm"] = [("input", X[2], TENSORS), ("num_groups", 3, COUNTS), *affine, eps]
    for d in (1, 2, 3):
        pool = [("input", X[d], TENSORS), ("kernel_size", 2, SIZES), ("stride", 2, SIZES), ("padding", 0, SIZES)]
        found[f"avg_pool{d}d"] = pool + ([("divisor_override", None, [0, NAN, "a"])] if d > 1 else [])
        found[f"adaptive_avg_pool{d}d"] = [("input", X[d], TENSORS), ("output_size", 2, SIZES)]
        for name, weight in (
            (f"conv{d}d", torch.ones(4, 3, *[2] * d)),
            (f"conv_transpose{d}d", torch.ones(3, 4, *[2] * d)),
        ):
            if name == "conv2d":
                continue  # test_bad_input.py
            sizes = [("stride", 1, SIZES), ("padding", 0, [*SIZES, "full"]), ("dilation", 1, SIZES)]
            sizes += [("output_padding", 0, SIZES)] if "transpose" in name else []
            both = [("weight", weight, TENSORS), ("bias", torch.ones(4), [*TENSORS, torch.ones(5)])]
            found[name] = [("input", X[d], TENSORS), *both, ("groups", 1, COUNTS), *sizes]
    pads = [None, NAN, 3, "a", [], [1], [1] * 9, [-9] * 4, [9] * 4, [1.5] * 4, [None] * 4]
    found["pad"] = [("input", X[2], TENSORS), ("pad", [1] * 4, pads), ("mode", "reflect", ["mirror", None, 3])]
    return found


ARGUMENTS = arguments()


def outcome(function: Any, given: dict[str, Any], learns: bool) -> Any:
    """The exception, or the result."""
    torch.manual_seed(0)
    own = {}
    for name, value in given.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
        own[name] = value.detach().clone().requires_grad_(learns and "running" not in name) if dense else value
    try:
        return function(**own)
    except Exception as error:
        return error


def calls(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    right = {argument: value for argument, value, _ in ARGUMENTS[name]}
    for argument, _, wrong in ARGUMENTS[name]:
        for value in wrong:
            yield argument, {**right, argument: value}


def allowed(argument: str, ours: Any) -> bool:
    """Where freezekit may differ: it is laxer with flags, and takes no size that products could overflow with."""
    if isinstance(ours, Tensor):
        return argument in LENIENT
    return isinstance(ours, RuntimeError) and "must be below 2147483648" in str(ours)


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learning"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_as_torch(name: str, learns: bool) -> None:
    wrong, refused = [], 0
    for argument, given in calls(name):
        stock, ours = (outcome(getattr(where, name), given, learns) for where in (F, fk.functional))
        refused += isinstance(stock, Exception)
        if type(ours) is not type(stock) and not allowed(argument, ours):
            wrong.append((argument, given[argument], ours, stock))
        elif isinstance(stock, Exception):
            assert str(ours), (name, argument)
        elif isinstance(ours, Tensor) and ours.layout == torch.strided:
            torch.testing.assert_close(ours, stock, equal_nan=True)
    assert not wrong, wrong
    assert refused >= 4


def test_every_layer_is_among_them() -> None:
    assert set(ARGUMENTS) == set(fk.functional.__all__) - {"conv2d", "conv2d_bias_grad", "conv2d_dgrad", "conv2d_wgrad"}


def test_a_call_that_torch_would_take_fails_with_freezekit_s_own_error() -> None:
    with fk.backend("native"), pytest.raises(RuntimeError, match="native"):
        fk.functional.relu(X[2].clone().requires_grad_())
    with pytest.raises(RuntimeError, match="input is on cpu, weight is on meta"):
        fk.functional.conv_transpose2d(X[2], torch.ones(3, 4, 2, 2, device="meta"))


def test_stride_0_is_no_stride_left_out() -> None:
    for function in (fk.functional.max_pool2d, fk.functional.avg_pool2d):
        assert torch.equal(function(X[2], 2, []), function(X[2], 2))
        with pytest.raises(RuntimeError, match="stride should not be zero"):
            function(X[2], 2, 0)
