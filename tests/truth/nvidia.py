"""NVIDIA's side: CUTLASS's and CuTe's headers compiled, where they and CUDA's own are here.

`make build/cutlass` unpacks the headers (the version is in requirements-dev.txt). What is made of them is cached.

An nvcc that cannot compile an empty kernel is as good as none: tests skip, and say why. One that can, but not what is
compiled here, fails them.
"""

from __future__ import annotations

import csv
import ctypes
import fcntl
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conformance.drivers import cuda_home
from tests.conformance.place import find_nvcc
from tests.emulator.build import CSRC, ROOT, Planted, digest, overlay, read_with_includes

HERE = Path(__file__).resolve().parent
SHIM = HERE / "shim"
CACHE = ROOT / "build" / "truth"
PACKAGE = ROOT / "build" / "cutlass"
SOURCE = PACKAGE / "cutlass_library" / "source"
WRAPPERS = ("wrappers_freezekit.cu", "wrappers_cutlass.cu")
HINTING = ("cute/arch/copy_sm80.hpp", "cute/arch/copy_sm90_tma.hpp")
HEADERS = (SOURCE / "include", SOURCE / "tools" / "util" / "include")
# CuTe's public classes keep some members to themselves, and its device code names types that only nvcc knows. At -O1
# g++ inlines most of CuTe's thousands of functions, in two thirds of the time that -O0 takes to write them all out.
HOST_FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-access-control",
    "-fpermissive",
    "-w",
    "-shared",
)
LIBRARY_FLAGS = ("-std=c++17", "-O1", "-arch=sm_90a", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden")


@functools.cache
def missing() -> str:
    """Why nothing can be compared here; empty where all is there."""
    if find_nvcc() is None:
        return "needs nvcc and CUDA's headers"
    return headers_missing(PACKAGE)


def headers_missing(package: Path) -> str:
    """Why CUTLASS's headers are not to be used, by the wheel's own list of its files; empty where all are there."""
    wanted = re.findall(r"nvidia-cutlass==([\d.]+)", (ROOT / "requirements-dev.txt").read_text())[0]
    files = package / f"nvidia_cutlass-{wanted}.dist-info" / "RECORD"
    if not files.exists():
        return f"needs CUTLASS's headers, version {wanted}: `make build/cutlass` unpacks them"
    with files.open(newline="") as listed:
        headers = [name for name, *_ in csv.reader(listed) if name.startswith("cutlass_library/source/")]
    lost = [name for name in headers if not (package / name).exists()]
    if headers and not lost:
        return ""
    which = f", {lost[0]} for one" if lost else ""
    return f"{package} lacks {len(lost)} of {len(headers)} files{which}: remove it, then `make build/cutlass`"


def run(command: Sequence[str]) -> tuple[int, str]:
    """Exit code and all output of a command; also of one that this machine cannot execute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout + done.stderr


@functools.cache
def broken(compiler: str) -> str:
    """Why nvcc cannot compile an empty kernel into a library; empty where it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.write_text("__global__ void empty() {}\n")
        code, said = run([compiler, *LIBRARY_FLAGS, str(source), "-o", f"{folder}/empty.so"])
    words = " ".join(said.split()) or "without a word"
    return f"{compiler} cannot compile an empty kernel: exit code {code}, {words[:300]}" if code else ""


def skip_if_broken(compiler: str) -> None:
    """What failed is nvcc's fault where it can compile nothing."""
    if reason := broken(compiler):
        pytest.skip(reason)


def nvcc() -> str:
    """The path of nvcc, which is here where tests are not skipped."""
    found = find_nvcc()
    assert found is not None, "tests are skipped where nvcc is missing"
    return found


@functools.cache
def compiler_version(compiler: str) -> str:
    """What nvcc says of itself: machine code of two versions is not to be compared."""
    code, said = run([compiler, "--version"])
    if code:
        skip_if_broken(compiler)
    return said


def built(source: str, suffix: str, command: list[str], patched: Path | None = None) -> Path:
    """What the command makes of a source of this folder, from the cache where nothing of ours has changed."""
    versions = (compiler_version(nvcc()), *(path.name for path in PACKAGE.glob("*.dist-info")))
    # CUTLASS includes these, and by names in <>, which are not followed.
    shim = [part for path in sorted(SHIM.rglob("*.h")) for part in (str(path.relative_to(SHIM)), path.read_bytes())]
    out = CACHE / f"{digest(' '.join(command), *versions, *shim, *read_with_includes(HERE / source, patched))}{suffix}"
    if failure := make((*command, str(HERE / source)), out):
        skip_if_broken(nvcc())
        raise AssertionError(failure)
    return out


@functools.cache
def make(command: tuple[str, ...], out: Path) -> str:
    """Runs a command that makes a file, unless that is there. What was said if it failed, or nothing."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "w") as lock:  # test workers are processes side by side; one of them builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            unfinished = out.with_suffix(f".{os.getpid()}.tmp")
            made = [*command, "-o", str(unfinished)]
            code, said = run(made)
            if code:
                return f"{' '.join(made)}\n{said}"
            unfinished.rename(out)
    return ""


@functools.cache
def library(source: str) -> ctypes.CDLL:
    """A source that g++ reads with CUTLASS's headers, as a library in this process."""
    compiler_version(nvcc())  # skips where nvcc cannot be asked where its headers are
    cuda = cuda_home(nvcc()) / "include"
    if not (cuda / "cuda.h").exists():
        skip_if_broken(nvcc())
        pytest.skip(f"needs CUDA's headers, and {cuda} has no cuda.h")
    system = [f"-isystem{folder}" for folder in (*HEADERS, cuda, cuda / "cccl")]
    flags = [*HOST_FLAGS, f"-D__CUDACC_VER_MAJOR__={cuda_major(cuda)}", f"-I{SHIM}", f"-I{ROOT}"]
    return ctypes.CDLL(str(built(source, ".so", ["g++", *flags, *system])))


@functools.cache
def driver(planted: Planted) -> ctypes.CDLL:
    """freezekit's code that asks CUDA's driver for tensor maps, with a driver that takes notes."""
    patched = overlay(planted.patches)
    # driver.cu has a function of the runtime's: the first definition counts.
    flags = [
        *LIBRARY_FLAGS,
        "-Xlinker=--allow-multiple-definition",
        *(f"-I{folder}" for folder in (*sources(patched), ROOT)),
    ]
    return ctypes.CDLL(str(built("driver.cu", ".so", [nvcc(), *flags], patched)))


def cuda_major(include: Path) -> int:
    """The toolkit's major version, by its cuda.h."""
    text = (include / "cuda.h").read_text()
    return int(text.split("#define CUDA_VERSION ")[1].split()[0]) // 1000


@functools.cache
def wrappers_of_cutlass() -> Path:
    """Machine code of CUTLASS's wrappers, without the hints to the L2 cache that some give and freezekit does not."""
    folder = CACHE / f"without-hints-{digest(*(HEADERS[0].joinpath(name).read_bytes() for name in HINTING))}"
    for name in HINTING:
        if (folder / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = re.sub(r"\.L2::(128B|cache_hint)", "", (HEADERS[0] / name).read_text())
        unfinished = folder / f"{name}.{os.getpid()}"  # another test worker may read what is there
        unfinished.write_text(re.sub(r"(\[%2\]), %\d+;", r"\1;", text))
        unfinished.rename(folder / name)
    return cubin(WRAPPERS[1], [folder, HEADERS[0]], None)


@functools.cache
def wrappers_of_freezekit(planted: Planted) -> Path:
    """Machine code of freezekit's, with a misreading where one is planted."""
    patched = overlay(planted.patches)
    return cubin(WRAPPERS[0], sources(patched), patched)


def sources(patched: Path | None) -> list[Path]:
    """Where freezekit's sources are found, those first that a misreading has changed."""
    return [*([patched / "csrc"] if patched else []), CSRC]


def cubin(source: str, includes: Sequence[Path], patched: Path | None) -> Path:
    """A source of this folder as machine code of sm_90a."""
    flags = ["-std=c++17", "-O3", "-arch=sm_90a", "-cubin", *(f"-I{folder}" for folder in (*includes, ROOT))]
    return built(source, ".cubin", [nvcc(), *flags], patched)
