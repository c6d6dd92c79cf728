"""Runs index_maths.cpp: division, gathers and their phases, mask bits, exhaustively over small cases."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.emulator.build import CSRC


def test_exhaustive_small_cases(tmp_path: Path) -> None:
    program = tmp_path / "index_maths"
    source = Path(__file__).with_name("index_maths.cpp")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    subprocess.run(["g++", *flags, f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
