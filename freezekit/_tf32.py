"""Whether float32 convolutions on a GPU may round their factors to tf32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_cudnn: Any = torch.backends.cudnn  # whose type knows no `conv`


def allows_tf32() -> bool:
    """The setting that convolutions read.

    `torch.backends.cudnn.allow_tf32` raises where recurrent layers are set to another precision.
    """
    return bool(_cudnn.conv.fp32_precision == "tf32")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Context manager: within it convolutions may, or may not."""
    before = _cudnn.conv.fp32_precision
    _cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        _cudnn.conv.fp32_precision = before
