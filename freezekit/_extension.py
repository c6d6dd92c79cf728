"""Loads the compiled half, or says how to get one that fits."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent
REBUILD = "python -m pip install --no-build-isolation --no-deps --force-reinstall ."


def build_info() -> dict[str, Any]:
    """What the build recorded of itself: torch, cuda (nvcc's version or None), archs, python.

    Raises:
        ImportError: if freezekit was never built.
    """
    try:
        return json.loads((PACKAGE / "_build_info.json").read_text())
    except FileNotFoundError:
        raise ImportError(f"freezekit is not built yet: run `{REBUILD}` in its source folder") from None


def minor(version: str) -> str:
    """The part of a torch version that a build belongs to.

    >>> minor("2.13.0+cpu")
    '2.13'
    """
    return ".".join(version.split("+")[0].split(".")[:2])


def check_torch(built: str, running: str) -> None:
    """Refuses another torch than the build's: autograd's C++ classes change between minor versions.

    Raises:
        ImportError: if the minor versions differ.
    """
    if minor(built) != minor(running):
        raise ImportError(
            f"freezekit was built for torch {minor(built)} (exactly {built}), but torch {running} is running: "
            f"rebuild it with `{REBUILD}` in its source folder"
        )


def emulated_kernels() -> Path:
    """The shared library of the kernels' CPU build."""
    return PACKAGE / "_emulated.so"


def load() -> ModuleType:
    """Imports freezekit._C, which registers the operators with torch."""
    check_torch(build_info()["torch"], torch.__version__)
    import freezekit._C as _C

    if emulated_kernels().exists():
        _C.set_emulator_path(str(emulated_kernels()))
    return _C
