"""Malformed calls of conv2d: what each is, and what the error must say. `conv` is F.conv2d or freezekit's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Conv = Callable[..., Any]


@dataclass(frozen=True)
class Bad:
    """One malformed call; `says` are regular expressions that the text of the error must hold."""

    name: str
    call: Callable[[Conv], Any]
    says: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


X, W, B = torch.ones(2, 4, 8, 8), torch.ones(6, 4, 3, 3), torch.ones(6)
HUGE = 2**62


def settings(name: str, value: Any, *says: str, label: str = "") -> Bad:
    """One setting that is wrong, on tensors that are right."""
    return Bad(f"{name}={label or value}", lambda conv: conv(X, W, B, **{name: value}), (name, *says))


def tensors(label: str, x: Any, w: Any, *says: str, b: Any = None, **kwargs: Any) -> Bad:
    return Bad(label, lambda conv: conv(x, w, b, **kwargs), says)


def ones(*size: int, **kwargs: Any) -> torch.Tensor:
    return torch.ones(*size, **kwargs)


SIZES = [
    tensors("input of rank 1", ones(4), W, "input", "4 dimensions", r"\[4\]"),
    tensors("input of rank 2", ones(4, 8), W, "input", "4 dimensions", r"\[4, 8\]"),
    tensors("input of rank 5", ones(1, 2, 4, 8, 8), W, "input", "4 dimensions", r"\[1, 2, 4, 8, 8\]"),
    tensors("weight of rank 2", X, ones(6, 4), "weight", "4 dimensions", r"\[6, 4\]"),
    tensors("weight of rank 3", X, ones(6, 4, 3), "weight", "4 dimensions", r"\[6, 4, 3\]"),
    tensors("weight of rank 5", X, ones(6, 4, 3, 3, 3), "weight", "4 dimensions"),
    tensors("too many channels", ones(2, 5, 8, 8), W, "input has 5 channels", "needs 4"),
    tensors("too many channels, unbatched", ones(5, 8, 8), W, "input has 5 channels", "needs 4"),
    tensors("channels against groups", X, W, "4 channels", "groups=2", "needs 8", groups=2),
    tensors("groups that do not divide", ones(2, 12, 8, 8), ones(4, 4, 3, 3), "groups=3", "4 output", groups=3),
    tensors("bias of rank 2", X, W, "bias", r"\[6\]", r"\[6, 1\]", b=ones(6, 1)),
    tensors("bias of rank 0", X, W, "bias", r"\[6\]", r"\[\]", b=ones(())),
    tensors("bias too short", X, W, "bias", r"\[6\]", r"\[5\]", b=ones(5)),
    tensors("kernel larger than input", ones(2, 4, 2, 2), W, "height", "spans 3", "padded input 2"),
    tensors("dilated kernel larger than input", X, W, "spans 9", "padded input 8", "dilation 4", dilation=4),
    tensors("input of no height", ones(2, 4, 0, 8), W, "height", "input 0", padding=2),
    tensors("weight of no output channels", X, ones(0, 4, 3, 3), "weight", "empty", r"\[0, 4, 3, 3\]"),
    tensors("weight of no height", X, ones(6, 4, 0, 3), "weight", "empty", r"\[6, 4, 0, 3\]"),
]

KINDS = [
    tensors("input is None", None, W, "input", "Tensor", "NoneType"),
    tensors("input is a list", [1.0], W, "input", "Tensor", "list"),
    tensors("input is an array", np.ones((2, 4, 8, 8), np.float32), W, "input", "Tensor", "ndarray"),
    tensors("weight is None", X, None, "weight", "Tensor", "NoneType"),
    tensors("weight is a number", X, 1.0, "weight", "Tensor", "float"),
    tensors("bias is a number", X, W, "bias", "Tensor", "int", b=3),
    tensors("bias is False", X, W, "bias", "Tensor", "bool", b=False),
    tensors("weight of another dtype", X, W.double(), "weight", "Float", "Double"),
    tensors("input of another dtype", X.half(), W, "input", "Half", "Float"),
    tensors("bias of another dtype", X, W, "bias", "Double", b=B.double()),
    tensors("real input, complex weight", X, W.to(torch.complex64), "weight", "ComplexFloat"),
    tensors("bool tensors", X.bool(), W.bool(), "Bool"),
    tensors("sparse input", X.to_sparse(), W, "input", "dense", "Sparse"),
    tensors("sparse weight", X, W.to_sparse(), "weight", "dense", "Sparse"),
    tensors("quantized input", torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), W, "input", "quantized"),
    tensors("nested input", torch.nested.nested_tensor([ones(4, 8, 8), ones(4, 9, 9)]), W, "input", "nested"),
    tensors("oneDNN weight, dense input", X, W.to_mkldnn(), "weight"),
    Bad("no weight", lambda conv: conv(X), ("weight|arguments",)),
    Bad("too many arguments", lambda conv: conv(X, W, B, 1, 0, 1, 1, 1), ("arguments",)),
    Bad("unknown argument", lambda conv: conv(X, W, strides=2), ("strides",)),
]

NUMBERS = [
    settings("stride", 0, "positive", "0"),
    settings("stride", -1, "positive", "-1"),
    settings("stride", [1, 1, 1], "two", r"\[1, 1, 1\]"),
    settings("stride", [], "two", r"\[\]"),
    settings("stride", 1.5, "integer", "1.5"),
    settings("stride", [1.5, 1], "integer", "1.5"),
    settings("stride", float("nan"), "integer", "nan"),
    settings("stride", True, "integer", "True"),
    settings("stride", (True, True), "integer", "True"),
    settings("stride", "1", "integer", "'1'", label="a string"),
    settings("stride", None, "integer", "None"),
    settings("stride", {1, 2}, "integer"),
    settings("stride", torch.tensor([2, 2]), "integer", r"shape \(2,\)", label="a tensor of two"),
    settings("stride", torch.tensor(1.5), "integer", "1.5", label="a float tensor"),
    settings("stride", 2**63, "64 bits", str(2**63)),
    settings("stride", (1, None), "integer", "None"),
    settings("padding", -1, "non-negative", "-1"),
    settings("padding", [1, 1, 1], "two", r"\[1, 1, 1\]"),
    settings("padding", HUGE, "below", str(HUGE)),
    settings("padding", 0.5, "integer", "0.5"),
    settings("padding", None, "integer", "None"),
    settings("padding", True, "integer", "True"),
    settings("padding", "full", "same", "'full'"),
    settings("padding", "", "same", "''", label="an empty string"),
    settings("padding", ["same", "same"], "integer", "same"),
    settings("dilation", 0, "positive", "0"),
    settings("dilation", -2, "positive", "-2"),
    settings("dilation", [1, 1, 1], "two"),
    settings("dilation", HUGE, "below", str(HUGE)),
    settings("dilation", 2**31, "below", str(2**31)),
    settings("dilation", 1.0, "integer", "1.0"),
    settings("groups", 0, "positive", "0"),
    settings("groups", -1, "positive", "-1"),
    settings("groups", HUGE, str(HUGE)),
    settings("groups", 2**70, "64 bits", str(2**70)),
    settings("groups", 1.0, "integer", "1.0"),
    settings("groups", None, "integer", "None"),
    settings("groups", True, "integer", "True"),
    settings("groups", [1], "integer", r"\[1\]"),
    tensors("same padding with a stride", X, W, "same", "stride 1", "stride 2", padding="same", stride=2),
    tensors("same padding, three strides", X, W, "stride", "two", padding="same", stride=[1, 1, 1]),
    tensors("same padding, negative dilation", X, W, "dilation", "-1", padding="same", dilation=-1),
    tensors("same padding, huge dilation", X, W, "below", padding="same", dilation=HUGE),
    tensors("same padding, weight of rank 2", X, ones(6, 4), "weight", "4 dimensions", padding="same"),
    tensors("same padding, input of rank 2", ones(8, 8), W, "input", "4 dimensions", padding="same"),
]

# What torch takes, by accident or at no use, and freezekit refuses: every one of these is a difference on purpose.
STRICTER = [
    tensors("weight on meta", X, W.to("meta"), "input is on cpu", "weight is on meta"),
    tensors("input on meta", X.to("meta"), W, "input is on meta", "weight is on cpu"),
    tensors("bias on meta", X, W, "input is on cpu", "bias is on meta", b=B.to("meta")),
    settings("stride", 2**31, "below", str(2**31)),
]
