"""What the self-test holds layers to, value for value: torch's own, on the same device and from the same seed."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from freezekit import functional
from freezekit.backends import current_backend

Layer = Callable[[Tensor], Tensor]

SIZE = (2, 8, 9, 7)  # neither the elements nor the outputs of a window are whole words of bits


def _weight(x: Tensor) -> Tensor:
    return _integers((8, 8, 3, 3), x, period=3)


def _block(x: Tensor) -> Tensor:
    settings = {"activation": "relu", "padding": [1], "keep_mask": True, "backend": current_backend()}
    return torch.ops.freezekit.frozen_conv2d(x, _weight(x), None, None, **settings)[0]


def _exact_block(x: Tensor) -> Tensor:
    """In float64 on a CPU: what cuDNN transforms for speed it rounds."""
    return F.relu(F.conv2d(x.cpu().double(), _weight(x).cpu().double(), padding=1)).to(x)


# freezekit's layer, and torch's.
LAYERS: dict[str, tuple[Layer, Layer]] = {
    "relu": (functional.relu, F.relu),
    "relu6": (functional.relu6, F.relu6),
    "leaky_relu": (lambda x: functional.leaky_relu(x, 0.25), lambda x: F.leaky_relu(x, 0.25)),
    "dropout": (lambda x: functional.dropout(x, 0.25), lambda x: F.dropout(x, 0.25)),
    "max_pool2d": (lambda x: cast(Tensor, functional.max_pool2d(x, 3, 2, 1)), lambda x: torch.max_pool2d(x, 3, 2, 1)),
    "frozen_conv2d": (_block, _exact_block),
}


def layers_for(backend: str) -> list[str]:
    """Those that are to be equal by a backend. Sums by ATen are not: see above."""
    return [name for name in LAYERS if backend != "aten" or name != "frozen_conv2d"]


def _integers(size: tuple[int, ...], like: Tensor, period: int) -> Tensor:
    """From -1 on, as many different ones: products and sums of them are exact in every dtype."""
    numbers = torch.arange(torch.Size(size).numel(), device=like.device) * 7 % (3 * period) // 3 - 1
    return numbers.view(size).to(like.dtype).contiguous(memory_format=torch.channels_last)


def step(layer: Layer, name: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Value and gradient of a layer; nothing is drawn from the caller's generators."""
    like = torch.empty((), dtype=dtype, device=device)
    x = _integers(SIZE, like, period=4)
    if name != "frozen_conv2d":  # which adds up, and must not round
        x = x * 3.14159 + 0.1
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        y = layer(x.requires_grad_())
    return y.detach(), torch.autograd.grad(y, x, _integers(tuple(y.shape), like, period=3))[0]


def error(own: tuple[Tensor, Tensor], stock: tuple[Tensor, Tensor]) -> float:
    """0 where both are equal, else infinite."""
    return 0.0 if all(torch.equal(a, b) for a, b in zip(own, stock)) else float("inf")
