"""The drivers for a GPU build; with emulated kernels behind a runtime on the host they are right, and can fail."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.emulator.build import CSRC, MODES, ROOT, compiled, kernel_host_sources, kernel_sources

from . import drivers

needs_nvcc = pytest.mark.skipif(drivers.find_nvcc() is None, reason="needs nvcc")


def on_host(name: str, folder: Path) -> Path:
    """The driver as built for a GPU, linked with the emulated kernels."""
    home = drivers.cuda_home(str(drivers.find_nvcc()))
    emulator = [str(path.relative_to(ROOT)) for path in sorted((CSRC / "emulator").glob("*.cpp"))]
    kernels = (*kernel_sources(), "csrc/kernels/last_error.cu", *kernel_host_sources(), *emulator)
    objects = [str(compiled(source, MODES["plain"].kernel_flags, None)) for source in kernels]
    sources = [str(ROOT / s) for s in (*drivers.SOURCES[name], "tests/conformance/host_cudart.cpp")]
    flags = ["-std=c++17", "-O1", "-DFK_ON_DEVICE", f"-I{ROOT}", f"-I{CSRC}", f"-isystem{home}/include"]
    out = folder / name
    subprocess.run(["g++", *flags, *sources, *objects, "-o", str(out)], check=True)
    return out


@needs_nvcc
@pytest.mark.parametrize("name", drivers.SOURCES)
@pytest.mark.parametrize("memory", ["poisoned", "unwritten"])
def test_what_drivers_do_for_a_gpu(name: str, memory: str, tmp_path: Path) -> None:
    program = on_host(name, tmp_path)
    done = subprocess.run([program, *drivers.arguments_of(name, memory, 12)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert subprocess.run([program, *drivers.arguments_of(name, "lazy", 12)]).returncode == 2, (
        "a word of the emulator's"
    )


@needs_nvcc
def test_they_build_for_a_gpu_and_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    program = drivers.build("convolutions")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [program, *drivers.arguments_of("convolutions", most=1)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 3
    assert "cudaMalloc: " in done.stdout
    monkeypatch.setattr(drivers, "ROOT", ROOT / "nowhere")
    with pytest.raises(RuntimeError, match="not built with CUDA kernels"):
        drivers.cuda_objects()


@pytest.mark.gpu
@pytest.mark.parametrize("name", drivers.SOURCES)
def test_every_family_tile_and_epilogue_is_exact_on_the_gpu(name: str) -> None:
    if name not in drivers.names():
        pytest.skip("needs sm_90")
    done = subprocess.run([drivers.build(name), *drivers.arguments_of(name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = drivers.arguments_of
    monkeypatch.setattr(drivers, "arguments_of", lambda name, memory="poisoned", most=3: few(name, memory, most))
    assert drivers.main(["--place", "emulated"]) == 0
    assert "0 of 3 drivers failed" in capfd.readouterr().out
    monkeypatch.setattr(drivers, "arguments_of", lambda name, memory="": ["0", "unknown", "integers", "x"])
    assert drivers.main(["--place", "emulated"]) == 3


def test_a_driver_that_hangs_is_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "hangs"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(drivers, "build_emulated", lambda *_: program)
    for seconds in (0.9, -1):
        start = time.monotonic()
        assert drivers.main(["--place", "emulated", "--until", str(start + seconds)]) == 3
        assert time.monotonic() - start < 30
        out = capfd.readouterr().out
        assert all(f"{name}: failed: did not end within 0" in out for name in drivers.SOURCES)
