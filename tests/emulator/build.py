"""Builds C++ drivers around emulated kernels in several modes, with planted bugs where asked, and runs them.

A planted bug is a textual patch of a copy of a source file, so that the product's code carries no trace of it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "emulator-tests"
INCLUDE = re.compile(rb'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Mode:
    """How kernels (`kernel_flags`) and emulator (`runtime_flags`) are compiled, and how a finding shows."""

    name: str
    kernel_flags: tuple[str, ...]
    runtime_flags: tuple[str, ...]
    link_flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


PLAIN = ("-O2",)  # as setup.py compiles the emulated kernels
# Compiling takes longer than running, and -O1 three times as long. (Not of TSan's: at -O0 it misses a planted bug.)
SANITIZE = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
MODES = {
    mode.name: mode
    for mode in (
        Mode("plain", PLAIN, PLAIN),
        Mode("ucontext", PLAIN, (*PLAIN, "-DFK_EMULATOR_UCONTEXT")),
        Mode(
            "asan",
            SANITIZE,
            SANITIZE,
            ("-fsanitize=address,undefined",),
            (("ASAN_OPTIONS", "exitcode=99:detect_leaks=0"), ("UBSAN_OPTIONS", "exitcode=98")),
        ),
        # Kernels alone are instrumented: the emulator's own accesses are no accesses of a GPU.
        Mode(
            "tsan",
            ("-O1", "-g1", "-fsanitize=thread"),
            ("-O1", "-g1", "-DFK_EMULATOR_TSAN"),
            ("-fsanitize=thread",),
            (("TSAN_OPTIONS", "exitcode=66:halt_on_error=1"),),
        ),
    )
}


@dataclass(frozen=True)
class Patch:
    """One place in a file of the repository that is replaced in a copy of it."""

    path: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        found = text.count(self.old)
        assert found == 1, f"{self.path} has {found} places that read {self.old!r}, expected one: mend the planted bug"
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Planted:
    """Patches of one bug, and the sources to compile with them where it is headers that are patched."""

    patches: tuple[Patch, ...] = ()
    including: tuple[str, ...] = ()

    @property
    def recompiled(self) -> tuple[str, ...]:
        return (*self.including, *dict.fromkeys(p.path for p in self.patches if not p.path.endswith(".h")))


UNMODIFIED = Planted()


@dataclass(frozen=True)
class Program:
    """Sources of a driver, relative to the repository. `kernels` hold device code; `others` are never instrumented."""

    name: str
    kernels: tuple[str, ...]
    others: tuple[str, ...] = ()
    shared: bool = False


@dataclass
class Result:
    """Exit code and all output of a run."""

    code: int
    output: str
    command: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.command}\nexit code {self.code}\n{self.output[-4000:]}"


def digest(*parts: bytes | str) -> str:
    joined = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(joined).hexdigest()[:24]


def compile_or_fail(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context manager: of the workers of a parallel run, which are processes, one at a time is within it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made(out: Path, make: Callable[[Path], None]) -> Path:
    """A file of the cache, which one worker makes where it is not there, under another name until it is whole."""
    if not out.exists():
        with locked(out.with_name(f"{out.name}.lock")):
            if not out.exists():
                unfinished = out.with_name(f"{out.name}.tmp")
                make(unfinished)
                unfinished.rename(out)
    return out


@functools.cache
def objects_of_the_package() -> dict[str, Path]:
    """What `make build` has compiled for mode "plain", brought up to date; empty where it has not."""
    folders = sorted((ROOT / "build").glob(f"temp.*{sys.implementation.cache_tag}*"))
    rules = folders[-1] / "emulated.ninja" if folders else ROOT / "build" / "emulated.ninja"
    if not rules.exists():
        return {}
    with locked(CACHE / "package.lock"):
        done = subprocess.run(["ninja", "-f", rules.name], cwd=rules.parent, capture_output=True)
    if done.returncode:  # sources that it names may be gone
        return {}
    lines = re.findall(r"^build (\S+): emulated (\S+)$", rules.read_text(), re.MULTILINE)
    return {os.path.relpath(source, ROOT): Path(target) for target, source in lines}


@functools.cache
def unavailable(mode: Mode) -> str | None:
    """Why programs of a mode cannot be built here: the sanitizer's library is a package of its own on some systems."""
    CACHE.mkdir(parents=True, exist_ok=True)
    command = ["g++", *mode.link_flags, "-x", "c++", "-", "-o", str(CACHE / f"probe-{mode.name}-{os.getpid()}")]
    done = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    Path(command[-1]).unlink(missing_ok=True)
    return None if done.returncode == 0 else f"g++ cannot link {' '.join(mode.link_flags)}"


@functools.cache
def overlay(patches: tuple[Patch, ...]) -> Path | None:
    """A folder with the patched copies, at their paths in the repository."""
    if not patches:
        return None
    folder = CACHE / f"overlay-{digest(repr(patches), *((ROOT / p.path).read_bytes() for p in patches))}"
    texts: dict[str, str] = {}
    for patch in patches:
        texts[patch.path] = patch.apply(texts.get(patch.path) or (ROOT / patch.path).read_text())
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def resolve(path: str, patched: Path | None) -> Path:
    return patched / path if patched and (patched / path).exists() else ROOT / path


def read_with_includes(source: Path, patched: Path | None) -> list[bytes]:
    """The text of a source and of every header of this repository that it includes, each once."""
    seen: dict[Path, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen[path] = path.read_bytes()
        for name in INCLUDE.findall(seen[path]):
            found = [resolve(f"{folder}{name.decode()}", patched) for folder in ("csrc/", "")]
            waiting += [header for header in found if header.exists()]
    return [seen[path] for path in sorted(seen)]


def compiled(source: str, flags: tuple[str, ...], patched: Path | None) -> Path:
    """The object file of a source, from the cache where nothing that it is made of has changed."""
    path = resolve(source, patched)
    includes = ([f"-I{patched / 'csrc'}"] if patched else []) + [f"-I{CSRC}", f"-I{ROOT}"]
    out = CACHE / f"{digest(' '.join(flags), source, *read_with_includes(path, patched))}.o"

    def make(unfinished: Path) -> None:
        if patched is None and flags == PLAIN and source in objects_of_the_package():
            shutil.copy(objects_of_the_package()[source], unfinished)
            return
        warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
        base = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", *(warnings if patched is None else ["-w"])]
        compile_or_fail([*base, *flags, *includes, "-x", "c++", "-c", str(path), "-o", str(unfinished)])

    return made(out, make)


@functools.cache
def build(program: Program, mode: Mode, planted: Planted = UNMODIFIED) -> Path:
    """The program of a mode; skips the test where the mode cannot be built."""
    if reason := unavailable(mode):
        pytest.skip(reason)
    runtime = sorted(str(path.relative_to(ROOT)) for path in (CSRC / "emulator").glob("*.cpp"))
    flags = dict.fromkeys((*runtime, "csrc/kernels/last_error.cu", *program.others), mode.runtime_flags)
    flags |= dict.fromkeys(program.kernels, mode.kernel_flags)
    changed = planted.recompiled
    assert set(changed) <= set(flags), f"{changed} are not all part of {program.name}"
    # Of two definitions of an inline function the linker takes the first: the patched one.
    patched = overlay(planted.patches)
    sources = [(source, patched) for source in changed] + [(source, None) for source in flags if source not in changed]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda item: compiled(item[0], flags[item[0]], item[1]), sources))
    out = CACHE / f"{program.name}-{mode.name}-{digest(*(o.name for o in objects))}{'.so' if program.shared else ''}"
    link = ["g++", *(["-shared"] if program.shared else []), *mode.link_flags, *map(str, objects), "-o"]
    return made(out, lambda unfinished: compile_or_fail([*link, str(unfinished)]))


@functools.cache
def run(program: Program, mode: Mode, arguments: tuple[str, ...], planted: Planted = UNMODIFIED) -> Result:
    """Runs the program with the arguments. TSan needs a layout of memory that some kernels give only when asked."""
    command = [str(build(program, mode, planted)), *arguments]
    environment = {**os.environ, **dict(mode.environment)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        command = ["setarch", "-R", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return Result(
        done.returncode, done.stdout + done.stderr, " ".join([f"{k}={v}" for k, v in mode.environment] + command)
    )


def kernel_sources() -> tuple[str, ...]:
    """All kernels of the package but last_error.cu, which every program has."""
    paths = [p for p in sorted((CSRC / "kernels").rglob("*.cu")) if p.name != "last_error.cu"]
    return tuple(str(p.relative_to(ROOT)) for p in paths)


def kernel_host_sources() -> tuple[str, ...]:
    return tuple(str(p.relative_to(ROOT)) for p in sorted((CSRC / "kernels").rglob("*.cpp")))
