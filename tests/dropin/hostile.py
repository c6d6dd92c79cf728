"""Every raw operator with every argument replaced by something it should not be, alone and in pairs.

Started with the path of a library to load (the sanitizers' own build) or without one (freezekit itself). Prints how
many calls were refused and how many were taken; whatever was taken is read to its last element.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

X, W, B = torch.ones(2, 4, 8, 8), torch.ones(6, 4, 3, 3), torch.ones(6)
G = torch.ones(2, 6, 6, 6)
POOLED, TAPS = torch.ones(2, 4, 4, 4), torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
ONES = torch.ones(4)
VOLUME = torch.ones(1, 2, 4, 4, 4)
WORDS = torch.zeros(2 * 4 * 8 * 8 // 32, dtype=torch.int32)
BYTES, CHECKSUM = torch.zeros(4, dtype=torch.uint8), torch.tensor([2993748317624755689])

# One call of each operator that is right.
RIGHT: dict[str, dict[str, Any]] = {
    "conv2d": dict(input=X, weight=W, bias=B, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1),
    "conv2d_dgrad": dict(grad_output=G, weight=W, input_size=[2, 4, 8, 8], stride=[1, 1], padding=[0, 0], groups=1),
    "conv2d_wgrad": dict(grad_output=G, input=X, weight_size=[6, 4, 3, 3], stride=[1, 1], dilation=[1, 1], groups=1),
    "conv2d_bias_grad": dict(grad_output=G),
    "convolution": dict(
        input=X, weight=W, bias=B, stride=[1, 1], padding=[0, 0], dilation=[1, 1], transposed=False,
        output_padding=[0, 0], groups=1,
    ),
    "frozen_conv2d": dict(
        input=X, weight=W, bias=B, residual=G, activation="relu", stride=[1, 1], padding=[0, 0], keep_mask=True
    ),
    "frozen_conv2d_shared": dict(input=X, weight=W, bias=B, residual=G, activation="relu", stride=[1, 1], groups=1),
    "frozen_conv2d_dgrad": dict(
        grad_output=G, weight=W, input_size=[2, 4, 8, 8], residual=X, mask=WORDS, stride=[1, 1], dilation=[1, 1]
    ),
    "activation": dict(input=X, kind="hardtanh", a=-1.0, b=1.0),
    "activation_": dict(input=X, kind="relu", a=0.0, b=0.0),
    "activation_bits": dict(input=X, kind="leaky_relu", a=0.1, b=0.0),
    "activation_bits_": dict(input=X, kind="relu", a=0.0, b=0.0),
    "gate": dict(input=X, bits=WORDS, stride=[256, 64, 8, 1], on=1.0, off=0.0),
    "dropout": dict(input=X, p=0.5, train=True),
    "dropout_": dict(input=X, p=0.5, train=True),
    "dropout_bits": dict(input=X, p=0.5),
    "dropout_bits_": dict(input=X, p=0.5),
    "max_pool2d": dict(input=X, kernel_size=[2, 2], stride=[2, 2], padding=[0, 0], dilation=[1, 1], ceil_mode=False),
    "max_pool2d_with_indices": dict(input=X, kernel_size=[2, 2], stride=[2, 2], padding=[0, 0], dilation=[1, 1]),
    "max_pool2d_taps": dict(input=X, kernel_size=[2, 2], stride=[2, 2], padding=[0, 0], dilation=[1, 1]),
    "max_pool2d_scatter": dict(
        grad_output=POOLED, taps=TAPS, input_size=[2, 4, 8, 8], kernel_size=[2, 2], stride=[2, 2], padding=[0, 0]
    ),
    "max_pool2d_gather": dict(
        input=X, taps=TAPS, input_size=[2, 4, 8, 8], kernel_size=[2, 2], stride=[2, 2], padding=[0, 0]
    ),
    "prelu": dict(input=X, weight=ONES),
    "max_pool3d": dict(input=VOLUME, kernel_size=[2, 2, 2], stride=[2, 2, 2], padding=[0, 0, 0], dilation=[1, 1, 1]),
    "max_pool3d_with_indices": dict(input=VOLUME, kernel_size=[2, 2, 2], stride=[2, 2, 2], padding=[0, 0, 0]),
    "batch_norm": dict(input=X, weight=ONES, bias=ONES, running_mean=ONES, running_var=ONES, eps=1e-5),
    "layer_norm": dict(input=X, normalized_shape=[8, 8], weight=torch.ones(8, 8), bias=torch.ones(8, 8), eps=1e-5),
    "group_norm": dict(input=X, num_groups=2, weight=ONES, bias=ONES, eps=1e-5),
    "avg_pool": dict(input=X, kernel_size=[2, 2], stride=[2, 2], padding=[0, 0], divisor_override=3),
    "adaptive_avg_pool": dict(input=X, output_size=[3, 3]),
    "reflection_pad": dict(input=X, padding=[1, 1, 1, 1]),
    "replication_pad": dict(input=X, padding=[1, 1, 1, 1]),
    "restore_bytes": dict(bytes=BYTES, checksum=CHECKSUM, dtype=torch.int32, size=[1], stride=[1]),
}  # fmt: skip

NUMBERS = [0, -1, 3, 255, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]


def wrong_for(value: Any) -> Iterator[Any]:
    """What may stand in place of a right value."""
    if isinstance(value, Tensor):
        yield from (None, torch.ones(()), torch.ones(0), torch.ones(3), torch.ones(4, 4), torch.ones(1, 1, 1, 1, 1, 1))
        yield from (value[:0], value[..., :1], value.flatten(), value.unsqueeze(0), value.transpose(0, -1))
        yield from (torch.ones(2, 4, 0, 8), torch.ones(7, 5, 3, 2), value.as_strided(value.shape, [0] * value.dim()))
        yield from (value.to(d) for d in (torch.float64, torch.bfloat16, torch.half, torch.int64, torch.bool))
        yield from (value.to(torch.complex64), value.to(torch.uint8) + 250, value.to("meta"), value.to_sparse())
        yield torch.full_like(value, float("nan") if value.is_floating_point() else 127)
        if value.is_floating_point():
            yield torch.quantize_per_tensor(value, 0.1, 0, torch.quint8)
            yield from (value.clone().requires_grad_(), value.double().requires_grad_())
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, str):
        yield from ("", "none", "gelu", "relu\0", "relu6" * 1000)
    elif isinstance(value, list):
        yield from ([], [1], [1, 1, 1], [1] * 7, [0] * len(value), [-1] * len(value))
        for number in NUMBERS:
            yield from ([number] * len(value), [*value[:-1], number], [number, *value[1:]])
    elif isinstance(value, float):
        yield from (float("nan"), float("inf"), -float("inf"), -0.5, 1e308, -1e308, 2.0)
    else:
        yield from (None, *NUMBERS)


def cases(pairs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(operator, arguments): every argument wrong in every way, then `pairs` of two wrong ones at random."""
    for op, right in RIGHT.items():
        yield op, right
        for name, value in right.items():
            for wrong in wrong_for(value):
                yield op, {**right, name: wrong}
        yield from ((op, {**right, "backend": name}) for name in ("", "emulated", "native", "aten", "x" * 10_000))
    rng = random.Random(0)
    for _ in range(pairs):
        op = rng.choice(list(RIGHT))
        two = rng.sample(list(RIGHT[op]), min(2, len(RIGHT[op])))
        yield op, {**RIGHT[op], **{name: rng.choice(list(wrong_for(RIGHT[op][name]))) for name in two}}


def read(result: Any) -> None:
    """Touches every element, and runs backward where there is one."""
    for tensor in result if isinstance(result, tuple) else [result]:
        if isinstance(tensor, Tensor) and not tensor.is_meta and not tensor.is_quantized:
            if tensor.requires_grad:
                tensor.sum().backward()
            tensor.detach().clone()


def own(op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with a copy of an input that the operator writes to."""
    value = arguments.get("input")
    return {**arguments, "input": value.clone()} if op[-1] == "_" and isinstance(value, Tensor) else arguments


def main(library: str | None, pairs: int) -> None:
    if library:
        torch.ops.load_library(library)
    else:
        import freezekit  # noqa: F401
    refused = taken = 0
    for op, arguments in cases(pairs):
        print(op, file=sys.stderr, flush=True)  # so that a crash has a name
        try:
            read(getattr(torch.ops.freezekit, op)(**own(op, arguments)))
            taken += 1
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # NotImplementedError is a RuntimeError
            refused += 1
            if not str(error).strip() or "INTERNAL ASSERT" in str(error):
                sys.exit(f"{op}({arguments}) says {error!r}")
    print(refused, taken)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1] or None, int(sys.argv[2]))
