"""The steps, in order: what all others need, then what hardware alone can tell, then what fits in the time left."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

from .build import EXTENSION
from .step import MARGIN, ROOT, SPARE, Step

NO_DEVICE = "no CUDA device"
# They prove the emulator, and never touch a GPU: last, so that what is left out for want of time is theirs.
MARKED = re.compile(r"\bmark\.gpu\b|\bimport .*\bgpu\b|\bplace: tuple\b")
LAST = ("kernels", "emulator")
UNTIL = ("--until", "{until}")


def python(*arguments: str) -> tuple[str, ...]:
    """A command for this interpreter."""
    return sys.executable, *arguments


def pytest(*arguments: str, dist: str) -> tuple[str, ...]:
    """On all cores where xdist is there; no test begins near the end of the step, and one that hangs shows where.

    A file that cannot be imported costs its own tests.
    """
    workers = ("-n", "auto", "--dist", dist) if importlib.util.find_spec("xdist") else ()
    hangs = ("-o", f"faulthandler_timeout={MARGIN - SPARE:g}")
    told = ("-p", "tools.gpu_check.deadline", *UNTIL, "--continue-on-collection-errors")
    return python("-m", "pytest", *told, *hangs, *workers, *arguments)


def gpu_files() -> tuple[str, ...]:
    """The files that may hold tests marked gpu: by the mark's name, or that of the fixture that carries it.

    Collecting the whole suite would take half of the step's time. Those of tests/conformance are steps of their own.
    """
    found = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "conformance")
    return tuple(str(path.relative_to(ROOT)) for path in found if MARKED.search(path.read_text()))


def test_folders() -> tuple[str, ...]:
    """All of tests/, in the order to run them in."""
    found = sorted(path for path in (ROOT / "tests").iterdir() if path.is_dir() or path.name.startswith("test_"))
    names = [path.name for path in found if path.name not in ("__pycache__", *LAST)]
    return tuple(f"tests/{name}" for name in (*names, *LAST))


def emulated_build() -> tuple[str, ...]:
    """Build settings for a machine without a GPU: CUDA kernels only where the present build has them.

    So a tree that is built stays as it is, and another compiles no kernel for a GPU.
    """
    info = ROOT / "freezekit/_build_info.json"
    built: dict[str, Any] = json.loads(info.read_text()) if info.exists() else {"cuda": None}
    return (f"FREEZEKIT_CUDA_ARCHS={';'.join(built['archs'])}",) if built["cuda"] else ("FREEZEKIT_CUDA=0",)


def plan(folder: Path, emulated: bool, about: str, arch: str = "") -> list[Step]:
    """All steps. Emulated, those that have another form than the GPU's take it, and the rest say why they are not run.

    Args:
        folder: where steps put files.
        emulated: whether to do without a device.
        about: kept with golden vectors.
        arch: of the device, for which alone the kernels are built; empty: for all.
    """
    where, own, device = ("emulated", (), NO_DEVICE) if emulated else ("cuda", ("--backend", "native"), "")
    golden = ("--golden", str(folder / "golden.npz"), "--about", about)
    compare = python("bench/compare.py", "--device", "cpu" if emulated else "cuda")
    layers = ("--section", "layers", "--layers", "dozen", "--parts", "dgrad,wgrad,fprop", "--dtype", "bfloat16")
    sides = ("--batch", "128", "--sides", "stock_channels_last,freezekit_native_channels_last")
    # Waits of Hopper's kernels then end in a trap, so that a hang is a fault; NVCC_APPEND_FLAGS is nvcc's own variable.
    for_device = ("NVCC_APPEND_FLAGS=-DFK_BOUNDED_WAITS", *((f"FREEZEKIT_CUDA_ARCHS={arch}",) if arch else ()))
    build = emulated_build() if emulated else for_device
    built_in = 350 if emulated else 130  # on few cores; the steps that are left out then have 220
    # The emulated kernels are for the last tests alone, unless they stand for a GPU's.
    emulator = [] if emulated else [Step("emulator", ("env", *build, *EXTENSION, "--emulator"), 60)]
    to = {name: ("--json", str(folder / f"{name}.json")) for name in ("layers", "tiles", "compare")}
    return [
        Step("machine", python("-m", "tools.gpu_check.machine", *UNTIL), 10),
        Step("build", ("env", *build, *python("-m", "tools.gpu_check.build", "--place", where, *UNTIL)), built_in),
        Step("conformance", python("-m", "tests.conformance", "--place", where, *golden, *UNTIL), 35),
        Step("kernels", python("-m", "tests.conformance.drivers", "--place", where, *UNTIL), 30),
        Step("selftest", python("-m", "freezekit.selftest", *own, *UNTIL), 25),
        Step("gpu tests", pytest("-m", "gpu and not full", *gpu_files(), dist="load"), 60, device),
        Step("sanitizer", python("-m", "tools.gpu_check.sanitizer", *UNTIL), 50, device),
        Step("layers", (*compare, *layers, *sides, *UNTIL, *to["layers"]), 75, device),
        Step("tiles", python("-m", "bench.tiles", "--layers", "dozen", *UNTIL, *to["tiles"]), 35, device),
        Step("compare", (*compare, *UNTIL, *to["compare"]), 50),
        *emulator,
        Step("other tests", pytest("-m", "not gpu and not full", *test_folders(), dist="loadfile"), 400),
    ]
