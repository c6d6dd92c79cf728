"""Errors around a launch: a kernel answers for its own alone, and leaves none behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_launch_answers_for_its_own_error_alone(tmp_path: Path) -> None:
    program = tmp_path / "launching"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/kernels/runtime'}"]
    sources = [ROOT / "tests/kernels/launching.cpp", "-x", "c++", ROOT / "csrc/kernels/last_error.cu"]
    subprocess.run(["g++", "-std=c++17", *includes, *map(str, sources), "-o", str(program)], check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    success, failed = 0, 3
    assert found == [
        f"good: {success} '' 0 1",
        f"large: {success} '' 0 1",
        f"another's error before: {success} '' 7 1",  # which is for its caller to find
        f"refused: {failed} 'error 9' 0 0",
        f"refused after another's error: {failed} 'error 9' 0 0",
        f"no such memory: {failed} 'error 1' 0 0",
        "2.5",
    ]
