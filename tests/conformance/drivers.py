"""`python -m tests.conformance.drivers`: every family, tile and epilogue on a GPU, bit for bit, without torch.

The drivers of tests/emulator, linked with the CUDA objects of the package's build. Small and quick to start, they are
also what compute-sanitizer watches.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from tests.emulator.build import MODES, ROOT, kernel_host_sources
from tests.emulator.build import build as build_emulated
from tests.emulator.cases import DEPTHWISE, DIRECT, GEMM, HOPPER, texts
from tests.emulator.test_modes import CONV, SMALL_JOBS, SMALL_KERNELS
from tools.gpu_check.step import add_until, left

from .place import built, find_nvcc

REFERENCE = "tests/emulator/conv_reference.cpp"
# Hopper's kernels come last and in a process of their own: nothing that they may do spoils what is known by then.
SOURCES = {
    "convolutions": ("tests/emulator/conv_driver.cpp", REFERENCE),
    "small": ("tests/emulator/small_driver.cpp",),
    "hopper": ("tests/emulator/conv_driver.cpp", REFERENCE),
}


def cuda_objects() -> list[Path]:
    """What setup.py made of csrc/kernels with nvcc for this Python.

    Raises:
        RuntimeError: where it has not.
    """
    folders = sorted((ROOT / "build").glob(f"temp.*{sys.implementation.cache_tag}*"))
    objects = (folders[-1] if folders else ROOT / "build") / "nvcc"
    kernels = ROOT / "csrc/kernels"
    found = [objects / path.relative_to(ROOT / "csrc").with_suffix(".o") for path in sorted(kernels.rglob("*.cu"))]
    # Others may be of sources that are gone.
    if not found or not all(path.exists() for path in found):
        raise RuntimeError("freezekit is not built with CUDA kernels here: `make build` with nvcc on PATH makes them")
    return found


def build(name: str) -> Path:
    """The program of a driver for this machine's GPU.

    Raises:
        RuntimeError: if there are no CUDA kernels, or g++ refuses.
    """
    nvcc = find_nvcc()
    objects = cuda_objects()
    assert nvcc is not None, "who built CUDA objects has nvcc"
    home = cuda_home(nvcc)
    inputs = [*(ROOT / source for source in (*SOURCES[name], *kernel_host_sources())), *objects]
    command = ["g++", "-std=c++17", "-O2", "-DFK_ON_DEVICE", f"-I{ROOT}", f"-I{ROOT}/csrc", f"-isystem{home}/include"]
    libraries = [*(f"-L{home / folder}" for folder in ("lib64", "lib")), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return built(Path(SOURCES[name][0]).stem, command, inputs, libraries)


def cuda_home(nvcc: str) -> Path:
    """The toolkit that nvcc belongs to, as nvcc says (it may be a link or a wrapper)."""
    dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    tops = [line.split("TOP=", 1)[1].strip() for line in dry.splitlines() if "TOP=" in line]
    return Path(tops[0]).resolve() if tops else Path(nvcc).resolve().parent.parent


def arguments_of(name: str, memory: str = "poisoned", most: int | None = None) -> list[str]:
    """Of the driver: all its cases, or `most` of them spread over the list."""
    if name == "small":
        jobs = list(SMALL_JOBS)
    elif name == "hopper":
        jobs = list(texts(HOPPER))
    else:
        jobs = list(texts([*DIRECT, *DEPTHWISE, *(case for cases in GEMM.values() for case in cases)]))
    step = 1 if most is None else max(1, len(jobs) // most)
    return ["0", memory, *([] if name == "small" else ["integers"]), *jobs[::step]]


def emulated(name: str) -> Path:
    """The same program around emulated kernels."""
    return build_emulated(SMALL_KERNELS if name == "small" else CONV, MODES["plain"])


def names() -> list[str]:
    """The drivers for the device that is here: Hopper's for sm_90."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return [name for name in SOURCES if name != "hopper" or hopper]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the number of drivers that failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.drivers", description=__doc__)
    parser.add_argument("--place", choices=("emulated", "cuda"), default="cuda")
    add_until(parser)
    options = parser.parse_args(arguments)
    on_cpu = options.place == "emulated"
    chosen, failed, jobs = list(SOURCES) if on_cpu else names(), 0, 0
    for i, name in enumerate(chosen):
        path = emulated(name) if on_cpu else build(name)
        given = arguments_of(name, "lazy" if on_cpu else "poisoned")
        limit = left(options.until) / (len(chosen) - i)  # its share of what is left
        try:
            code = subprocess.run([path, *given], timeout=limit).returncode
            result = f"failed, exit code {code}" if code else "right"
        except subprocess.TimeoutExpired:
            result = f"failed: did not end within {limit:.3g} s"
        failed += result != "right"
        jobs += (len(given) - (2 if name == "small" else 3)) * (result == "right")
        print(f"{name}: {result}", flush=True)
    left_out = "".join(f", {name} not run: the device is not sm_90" for name in SOURCES if name not in chosen)
    print(f"{failed} of {len(chosen)} drivers failed; {jobs} jobs of the others, each exact{left_out}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
