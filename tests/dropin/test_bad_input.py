"""Malformed calls: the exception is of stock's type, its text names argument, expectation and value, nothing breaks."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import freezekit as fk
from freezekit.functional import conv2d_dgrad, conv2d_wgrad
from tests.conftest import on
from tests.dropin.malformed import HUGE, KINDS, NUMBERS, SIZES, STRICTER, B, Bad, W, X

TABLE = SIZES + KINDS + NUMBERS


def still_right() -> None:
    """After an error the library works as before."""
    assert torch.equal(fk.functional.conv2d(X, W, B, padding=1), F.conv2d(X, W, B, padding=1))


def error(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("backend", ["aten", "emulated"])
@pytest.mark.parametrize("bad", TABLE, ids=str)
def test_as_stock(bad: Bad, backend: str) -> None:
    with on(backend):
        ours, stock = error(lambda: bad.call(fk.functional.conv2d)), error(lambda: bad.call(F.conv2d))
    if bad.name == "bool tensors" and backend == "emulated":
        assert isinstance(ours, RuntimeError)  # the backend was demanded and does not take the dtype
    else:
        assert type(ours) is type(stock), f"{type(ours).__name__} ({ours}), stock {type(stock).__name__} ({stock})"
    missing = [text for text in bad.says if not re.search(text, str(ours))]
    assert not missing, f"{ours} lacks {missing}"
    still_right()


@pytest.mark.parametrize("bad", STRICTER, ids=str)
def test_stricter_than_stock(bad: Bad) -> None:
    bad.call(F.conv2d)
    ours = error(lambda: bad.call(fk.functional.conv2d))
    assert type(ours) is RuntimeError
    missing = [text for text in bad.says if not re.search(text, str(ours))]
    assert not missing, f"{ours} lacks {missing}"


def test_what_torch_takes_for_an_integer_is_taken() -> None:
    import numpy as np

    for two in (
        np.int64(2),
        torch.tensor(2),
        torch.tensor([2]),
        [np.int32(2), 2],
        [torch.tensor(2)],
        torch.Size([2, 2]),
    ):
        assert torch.equal(fk.functional.conv2d(X, W, stride=two), F.conv2d(X, W, stride=two))
    for one in (np.int64(1), torch.tensor(1)):
        assert torch.equal(fk.functional.conv2d(X, W, groups=one), F.conv2d(X, W, groups=one))


MODULE = [
    dict(in_channels=4, out_channels=6, kernel_size=3, groups=4),
    dict(in_channels=4, out_channels=6, kernel_size=3, groups=0),
    dict(in_channels=4, out_channels=6, kernel_size=3, padding="full"),
    dict(in_channels=4, out_channels=6, kernel_size=3, padding="same", stride=2),
    dict(in_channels=4, out_channels=6, kernel_size=3, padding_mode="mirror"),
    dict(in_channels=4, out_channels=6, kernel_size=-3),
    dict(in_channels=4, out_channels=-6, kernel_size=3),
    dict(in_channels="4", out_channels=6, kernel_size=3),
    dict(in_channels=4, out_channels=6, kernel_size=3, dtype="float"),
    dict(in_channels=4, out_channels=6, kernel_size=3, device="nowhere"),
    dict(in_channels=4, out_channels=6, kernel_size=3, dtype=torch.int32),
    dict(in_channels=4, out_channels=6),
    dict(in_channels=4, out_channels=6, kernel_size=3, dilations=2),
]


@pytest.mark.parametrize("arguments", MODULE, ids=lambda a: ",".join(f"{k}={v}" for k, v in a.items() if "ch" not in k))
def test_constructing_a_layer(arguments: dict[str, Any]) -> None:
    ours, stock = error(lambda: fk.FreezableConv2d(**arguments)), error(lambda: nn.Conv2d(**arguments))
    assert type(ours) is type(stock)
    assert str(ours).replace("FreezableConv2d", "Conv2d") == str(stock)


FORWARD = [
    (dict(stride=0), X),
    (dict(dilation=(1, -1)), X),
    (dict(stride=True), X),
    (dict(padding=1.5), X),
    (dict(stride=(1, 2, 3)), X),
    (dict(padding="same", dilation=(1, 2, 3)), X),
    (dict(padding=1, padding_mode="reflect"), torch.ones(2, 4, 1, 1)),
    (dict(padding=9, padding_mode="circular"), X),
    (dict(padding=1, padding_mode="replicate"), torch.ones(4, 8)),
    ({}, torch.ones(2, 3, 8, 8)),
    ({}, None),
    ({}, X.double()),
]


@pytest.mark.parametrize(("arguments", "x"), FORWARD, ids=str)
def test_calling_a_layer(arguments: dict[str, Any], x: Any) -> None:
    def make(kind: Callable[..., nn.Module]) -> Exception:
        return error(lambda: kind(4, 6, 3, **arguments)(x))

    ours, stock = make(fk.FreezableConv2d), make(nn.Conv2d)
    assert type(ours) is type(stock), f"{ours!r} against {stock!r}"
    still_right()


G = torch.ones(2, 6, 6, 6)  # what conv2d(X, W) gives
SIZE_LIES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("of length 3", (2, 4, 8), ("4 dimensions", r"\[2, 4, 8\]")),
    ("of length 0", (), ("4 dimensions", r"\[\]")),
    ("of length 5", (2, 4, 8, 8, 1), ("4 dimensions",)),
    ("negative", (2, 4, -8, 8), ("negative", "-8")),
    ("negative batch", (-2, 4, 8, 8), ("negative", "-2")),
    ("one row too many", (2, 4, 9, 8), ("grad_output must have size", r"\[2, 4, 9, 8\]", r"\[2, 6, 6, 6\]")),
    ("another batch", (3, 4, 8, 8), ("grad_output must have size", r"\[3, 4, 8, 8\]")),
    ("other channels", (2, 5, 8, 8), ("channels", "5")),
    ("zero height", (2, 4, 0, 8), ("height", "0")),
    ("more than memory", (2**20, 2**20, 2**20, 2**20), ("elements", str(2**20))),
    ("wrapping around", (2, 4, 2**61, 2**61), ("elements",)),
    ("beyond 64 bits when multiplied", (2, 4, 2**62 + 8, 8), ("elements|grad_output",)),
    ("the largest integer", (2, 4, 2**63 - 1, 8), ("elements|grad_output",)),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", ["aten", "emulated"])
@pytest.mark.parametrize(("size", "says"), [s[1:] for s in SIZE_LIES], ids=[s[0] for s in SIZE_LIES])
def test_an_input_size_that_lies(size: Any, says: tuple[str, ...], backend: str, device: str) -> None:
    g, w = G.to(device), W.to(device)
    for call in (conv2d_dgrad, partial(torch.ops.freezekit.conv2d_dgrad, backend=backend)):
        for tensor in (g, g.clone().requires_grad_()):
            with on(backend):
                ours = error(lambda call=call, tensor=tensor: call(tensor, w, size))
            assert type(ours) is RuntimeError
            assert all(re.search(text, str(ours)) for text in says), str(ours)
    still_right()


WEIGHT_LIES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("of length 3", (6, 4, 3), ("4 dimensions",)),
    ("negative", (6, 4, -3, 3), ("negative", "-3")),
    ("zero", (6, 4, 0, 3), ("empty", r"\[6, 4, 0, 3\]")),
    ("a larger kernel", (6, 4, 4, 3), ("grad_output must have size", r"\[6, 4, 4, 3\]")),
    ("other outputs", (7, 4, 3, 3), ("grad_output must have size",)),
    ("other inputs", (6, 3, 3, 3), ("channels",)),
    ("a kernel of 2^40 rows", (6, 4, 2**40, 3), ("kernel of at most", str(2**40))),
    ("channels that wrap around", (1, 2**59, 1, 1), ("channels|elements",)),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", ["aten", "emulated"])
@pytest.mark.parametrize(("size", "says"), [s[1:] for s in WEIGHT_LIES], ids=[s[0] for s in WEIGHT_LIES])
def test_a_weight_size_that_lies(size: Any, says: tuple[str, ...], backend: str, device: str) -> None:
    g, x = G.to(device), X.to(device)
    for call in (conv2d_wgrad, partial(torch.ops.freezekit.conv2d_wgrad, backend=backend)):
        with on(backend):
            ours = error(lambda call=call: call(g, x, size))
        assert type(ours) is RuntimeError
        assert all(re.search(text, str(ours)) for text in says), str(ours)
    still_right()


# Products that leave int64 if they are formed before they are checked.
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((1, 2**40, 1, 1), dict(groups=2**24)),
        ((1, 1, 2**31, 1), dict(dilation=2**31 - 1)),
        ((2**24, 2**34, 1, 1), dict(groups=2**24)),
        ((6, 4, 3, 3), dict(dilation=2**31 - 1)),
        ((6, 4, 3, 3), dict(stride=2**31 - 1, dilation=2**31 - 1, padding=2**31 - 1)),
        ((6, 4, 3, 3), dict(stride=HUGE)),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_products_that_would_overflow(size: Any, settings: dict[str, int], device: str) -> None:
    assert isinstance(error(lambda: conv2d_wgrad(G.to(device), X.to(device), size, **settings)), RuntimeError)


@pytest.mark.parametrize("op", ["conv2d", "conv2d_dgrad", "conv2d_wgrad"])
@pytest.mark.parametrize("hole", [0, 1])
@pytest.mark.parametrize("autocast", [False, True])
def test_undefined_tensors_in_raw_operators(op: str, hole: int, autocast: bool) -> None:
    arguments: list[Any] = [X, W]
    arguments[hole] = None  # torch's operators take None for an undefined tensor
    if op != "conv2d":
        arguments.append((2, 4, 8, 8))
    with torch.autocast("cpu", enabled=autocast, dtype=torch.bfloat16):
        ours = error(lambda: getattr(torch.ops.freezekit, op)(*arguments))
    assert isinstance(ours, RuntimeError)
    still_right()


# The raw operator takes no 3D input; ranks have a test of their own below.
RAW = [bad for bad in SIZES + KINDS[7:17] if "unbatched" not in bad.name and "rank" not in bad.name]


@pytest.mark.parametrize("bad", RAW, ids=str)
def test_raw_operators_check_too(bad: Bad) -> None:
    def raw(x: Any, w: Any, b: Any = None, **settings: Any) -> Any:
        lists = {name: [v] if type(v) is int and name != "groups" else v for name, v in settings.items()}
        return torch.ops.freezekit.conv2d(x, w, b, **lists)

    ours = error(lambda: bad.call(raw))
    assert type(ours) is type(error(lambda: bad.call(F.conv2d)))
    assert all(re.search(text, str(ours)) for text in bad.says), str(ours)


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 5])
def test_raw_operators_and_ranks(rank: int) -> None:
    odd = torch.ones((4,) * rank)
    ops = torch.ops.freezekit
    for call in (
        lambda: ops.conv2d(odd, W),
        lambda: ops.conv2d(X, odd),
        lambda: ops.conv2d_dgrad(odd, W, (2, 4, 8, 8)),
        lambda: ops.conv2d_dgrad(G, odd, (2, 4, 8, 8)),
        lambda: ops.conv2d_wgrad(odd, X, (6, 4, 3, 3)),
        lambda: ops.conv2d_wgrad(G, odd, (6, 4, 3, 3)),
    ):
        ours = error(call)
        assert type(ours) is RuntimeError
        assert "4 dimensions" in str(ours)


PUBLIC = [
    ("backend", lambda: fk.backend("cuda"), ValueError, ("backend", "'cuda'", "aten")),
    ("backend of another type", lambda: fk.backend(3), ValueError, ("backend", "3")),
    ("backend argument", lambda: fk.functional.conv2d(X, W, backend="cudnn"), ValueError, ("backend", "'cudnn'")),
    ("a backend of tests", lambda: fk.backend("emulated"), ValueError, ("'auto', 'native' or 'aten'", "'emulated'")),
    ("backend argument of another type", lambda: fk.functional.conv2d(X, W, backend=1), ValueError, ("backend", "1")),
    ("raw backend", lambda: torch.ops.freezekit.conv2d(X, W, backend="x"), ValueError, ("backend", "'x'")),
    ("native on a CPU", lambda: fk.functional.conv2d(X, W, backend="native"), RuntimeError, ("native", "cpu")),
    (
        "emulated on meta",
        lambda: torch.ops.freezekit.conv2d_dgrad(G.bool(), W.bool(), X.shape, backend="emulated"),
        RuntimeError,
        ("Bool",),
    ),
    ("convert", lambda: fk.convert("model"), TypeError, ("model", "nn.Module", "str")),
    ("convert a tensor", lambda: fk.convert(X), TypeError, ("model", "Tensor")),
    ("from_conv2d", lambda: fk.FreezableConv2d.from_conv2d(nn.Linear(1, 1)), TypeError, ("conv", "Linear")),
    ("dgrad size of a number", lambda: conv2d_dgrad(G, W, 8), TypeError, ("input_size", "4", "8")),
    ("dgrad size of floats", lambda: conv2d_dgrad(G, W, (2.0, 4, 8, 8)), TypeError, ("input_size", "2.0")),
    ("dgrad size None", lambda: conv2d_dgrad(G, W, None), TypeError, ("input_size", "None")),
    ("wgrad size of strings", lambda: conv2d_wgrad(G, X, "abcd"), TypeError, ("weight_size", "abcd")),
    ("dgrad without weight", lambda: conv2d_dgrad(G, None, X.shape), TypeError, ("weight", "NoneType")),
    ("wgrad without input", lambda: conv2d_wgrad(G, None, W.shape), TypeError, ("input", "NoneType")),
    ("dgrad stride", lambda: conv2d_dgrad(G, W, X.shape, stride=1.0), TypeError, ("stride", "1.0")),
    ("dgrad padding by name", lambda: conv2d_dgrad(G, W, X.shape, padding="same"), TypeError, ("padding", "same")),
    ("wgrad groups", lambda: conv2d_wgrad(G, X, W.shape, groups=0), RuntimeError, ("groups", "0")),
    ("wgrad dtypes", lambda: conv2d_wgrad(G, X.double(), W.shape), RuntimeError, ("grad_output", "Double")),
    ("dgrad devices", lambda: conv2d_dgrad(G, W.to("meta"), X.shape), RuntimeError, ("grad_output", "meta")),
    ("dgrad sparse", lambda: conv2d_dgrad(G.to_sparse(), W, X.shape), RuntimeError, ("grad_output", "Sparse")),
    ("complex dgrad", lambda: conv2d_dgrad(G.cfloat(), W.cfloat(), X.shape), RuntimeError, ("complex",)),
]


@pytest.mark.parametrize(("call", "kind", "says"), [p[1:] for p in PUBLIC], ids=[p[0] for p in PUBLIC])
def test_public_functions(call: Callable[[], Any], kind: type[Exception], says: tuple[str, ...]) -> None:
    ours = error(call)
    assert type(ours) is kind, repr(ours)
    assert all(text in str(ours) for text in says), str(ours)
    still_right()


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("learns", [False, True])
def test_a_weight_of_no_input_channels_is_torchs(images: int, learns: bool) -> None:
    """It gives an output of no channels, whatever the weight says; other empty weights are refused."""
    found = []
    for call in (F.conv2d, fk.functional.conv2d):
        x, w = torch.ones(images, 0, 5, 5, requires_grad=True), torch.ones(4, 0, 3, 3, requires_grad=learns)
        y = call(x, w, torch.ones(4), 2, 1)
        found.append((y.shape, torch.autograd.grad(y.sum(), [x, *[w] * learns])))
    (stock, theirs), (ours, own) = found
    assert ours == stock
    assert [g.shape for g in own] == [g.shape for g in theirs]
    with fk.backend("native"), pytest.raises(RuntimeError, match="weight must have no empty dimension"):
        fk.functional.conv2d(torch.ones(images, 0, 5, 5), torch.ones(4, 0, 3, 3))
