"""Where probes run: emulated in this process, or on the CUDA device that torch sees."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.emulator import probe as emulator
from tests.emulator.build import INCLUDE

from .probe import Array, Launch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "conformance"
# Each exports probe_<name> functions that take device pointers and return a freezekit::Status.
SOURCES = (
    ROOT / "tests/emulator/probe_ptx.cu",
    ROOT / "tests/conformance/probe_sm90.cu",
    *(CSRC / "kernels" / name for name in ("last_error.cu", "hopper/tensor_map.cu")),
)
ARCHS = ("80", "90a")  # as setup.py's default, where there is no device to build for


def find_nvcc() -> str | None:
    """nvcc as setup.py finds it."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def architectures() -> tuple[str, ...]:
    """What to compile for, as nvcc names it: the device that is here alone."""
    if not torch.cuda.is_available():
        return ARCHS
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    return ("90a" if capability == "90" else capability,)


def code_flags() -> list[str]:
    """nvcc's flags for them."""
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures()]


def device_library() -> Path:
    """The probes' library for GPUs.

    Raises:
        RuntimeError: where nvcc is missing or refuses; the text is nvcc's.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("the probes for a GPU need nvcc, which is neither in CUDA_HOME/bin nor on PATH")
    flags = ["-std=c++17", "-O2", "-shared", "-DFK_BOUNDED_WAITS", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    return built("probes.so", [nvcc, *flags, f"-I{CSRC}", *code_flags()], SOURCES)


def built(name: str, command: Sequence[str], inputs: Sequence[Path], last: Sequence[str] = ()) -> Path:
    """What a compiler makes of its inputs, with `last` behind them; made once for the same command and contents.

    Raises:
        RuntimeError: where it refuses; the text is the compiler's.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    whole = [*command, *map(str, inputs), *last]
    out = BUILD / f"{_digest(whole, inputs)}-{name}"
    with open(BUILD / f"{name}.lock", "w") as lock:  # processes side by side ask for the same; one of them builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            unfinished = out.with_suffix(".tmp")
            done = subprocess.run([*whole, "-o", str(unfinished)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(whole)}\n{done.stdout}{done.stderr}")
            unfinished.rename(out)
    return out


def _digest(command: Sequence[str], inputs: Sequence[Path]) -> str:
    """Of a command, its inputs, and every header of the tree that they include."""
    state, waiting, seen = hashlib.sha256(" ".join(command).encode()), list(inputs), set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        text = path.read_bytes()
        state.update(text)
        if path.suffix != ".o":
            waiting += [root / name.decode() for name in INCLUDE.findall(text) for root in (CSRC, ROOT)]
    return state.hexdigest()[:16]


@functools.cache
def _loaded() -> ctypes.CDLL:
    library = ctypes.CDLL(str(device_library()))
    library.freezekit_last_error.restype = ctypes.c_char_p
    return library


def launch_on_device(name: str, *arguments: object) -> None:
    """`Launch` on torch's current CUDA device: arrays travel there and back.

    Raises:
        RuntimeError: if the launch or the kernel failed. A fault spoils the process: run each probe in its own.
    """
    there = {i: _bytes(a).cuda() for i, a in enumerate(arguments) if isinstance(a, np.ndarray)}
    given = [ctypes.c_void_p(there[i].data_ptr()) if i in there else a for i, a in enumerate(arguments)]
    torch.cuda.synchronize()
    status = getattr(_loaded(), f"probe_{name}")(*given)
    if status:
        raise RuntimeError(f"status {status}: {_loaded().freezekit_last_error().decode()}")
    torch.cuda.synchronize()
    for i, tensor in there.items():
        array = arguments[i]
        assert isinstance(array, np.ndarray)
        _bytes(array).copy_(tensor)


def _bytes(array: Array) -> torch.Tensor:
    """The array's memory, as a tensor that shares it."""
    assert array.flags.c_contiguous, "a probe takes dense arrays"
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


PLACES: dict[str, Launch] = {"emulated": emulator.launch, "cuda": launch_on_device}
