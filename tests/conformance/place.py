"""Where probes run: emulated in this process, or on the CUDA device that torch sees."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
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
ARCHS = ("80", "90a")  # as setup.py's default: SASS for each, PTX of the first


def find_nvcc() -> str | None:
    """nvcc as setup.py finds it."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def device_library() -> Path:
    """The probes' library for GPUs, built where a source has changed.

    Raises:
        RuntimeError: where nvcc is missing or refuses; the text is nvcc's.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("the probes for a GPU need nvcc, which is neither in CUDA_HOME/bin nor on PATH")
    BUILD.mkdir(parents=True, exist_ok=True)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    codes.append(f"-gencode=arch=compute_{ARCHS[0]},code=compute_{ARCHS[0]}")
    flags = [
        "-std=c++17",
        "-O2",
        "-shared",
        "-DFK_BOUNDED_WAITS",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        f"-I{CSRC}",
        *codes,
    ]
    out = BUILD / f"probes-{_digest(flags)}.so"
    with open(BUILD / "lock", "w") as lock:  # probes are processes side by side; one of them builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            unfinished = out.with_suffix(".tmp")
            command = [nvcc, *flags, *map(str, SOURCES), "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            unfinished.rename(out)
    return out


def _digest(flags: list[str]) -> str:
    """Of the flags, the sources, and every header of csrc that they include."""
    state, waiting, seen = hashlib.sha256(" ".join(flags).encode()), list(SOURCES), set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        text = path.read_bytes()
        state.update(text)
        waiting += [CSRC / name.decode() for name in INCLUDE.findall(text)]
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
