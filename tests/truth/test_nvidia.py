"""An nvcc that can compile nothing is as good as none; one that refuses freezekit's sources fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.emulator.build import UNMODIFIED

from . import nvidia

NOTHING_WORKS = "#!/bin/sh\necho libnvvm.so.4 is not here >&2\nexit 1\n"
NO_ASSEMBLER = """#!/bin/sh
case "$*" in
  --version) echo release 13.0 ;;
  *) echo "sh: 1: ptxas: not found" >&2; exit 127 ;;
esac
"""
NOT_A_PROGRAM = "\x7fELF"
REFUSES_OURS = """#!/bin/sh
case "$*" in
  --version) echo release 13.0 ;;
  *empty.cu*) ;;
  *) echo "error: this source" >&2; exit 2 ;;
esac
"""


@pytest.fixture
def compiler(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvcc of the given text, found before any other, and an empty cache."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(request.param)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(nvidia, "CACHE", tmp_path / "cache")
    return nvcc


def test_headers_that_are_incomplete_are_not_used(tmp_path: Path) -> None:
    assert "`make build/cutlass` unpacks them" in nvidia.headers_missing(tmp_path)
    version = re.findall(r"nvidia-cutlass==([\d.]+)", (nvidia.ROOT / "requirements-dev.txt").read_text())[0]
    record = tmp_path / f"nvidia_cutlass-{version}.dist-info" / "RECORD"
    record.parent.mkdir()
    record.touch()
    assert "lacks 0 of 0" in nvidia.headers_missing(tmp_path)
    names = [f"cutlass_library/source/include/{name}.h" for name in ("here", "gone")]
    record.write_text("".join(f"{name},sha256=,0\n" for name in names) + "elsewhere.py,,\n")
    (tmp_path / names[0]).parent.mkdir(parents=True)
    (tmp_path / names[0]).touch()
    assert f"lacks 1 of 2 files, {names[1]}" in nvidia.headers_missing(tmp_path)
    (tmp_path / names[1]).touch()
    assert nvidia.headers_missing(tmp_path) == ""


def test_a_header_in_the_place_of_cutlass_s_is_part_of_the_cache_s_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "SHIM", tmp_path)
    monkeypatch.setattr(nvidia, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(nvidia, "compiler_version", lambda compiler: "release 13.0")
    monkeypatch.setattr(nvidia, "make", lambda command, out: "")
    found = set()
    for text in ("", "int a;", "int b;"):
        (tmp_path / "wmma.h").write_text(text)
        found.add(nvidia.built("driver.cu", ".so", ["g++"]))
    assert len(found) == 3


def make_machine_code() -> None:
    nvidia.cubin(nvidia.WRAPPERS[0], [nvidia.CSRC], None)


def make_driver() -> None:
    nvidia.driver.__wrapped__(UNMODIFIED)


@pytest.mark.parametrize(
    ("compiler", "why"),
    [(NOTHING_WORKS, "libnvvm.so.4 is not here"), (NO_ASSEMBLER, "ptxas: not found"), (NOT_A_PROGRAM, "format error")],
    indirect=["compiler"],
    ids=["nothing works", "no assembler", "not a program"],
)
def test_tests_skip_where_nvcc_is_broken(compiler: Path, why: str) -> None:
    for needs_it in (make_machine_code, make_driver, lambda: nvidia.library.__wrapped__("driver.cu")):
        with pytest.raises(
            pytest.skip.Exception, match=re.escape(str(compiler)) + f" cannot compile an empty kernel: .*{why}"
        ):
            needs_it()


@pytest.mark.parametrize("compiler", [REFUSES_OURS], indirect=True, ids=["refuses ours"])
def test_tests_fail_where_nvcc_refuses_freezekit_s_sources(compiler: Path) -> None:
    with pytest.raises(AssertionError, match="error: this source"):
        make_machine_code()
