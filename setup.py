"""Builds freezekit/_C: the torch layer, and the CUDA kernels where nvcc is found.

The kernels know no torch, so nvcc compiles them without torch's flags and they link into one binary beside any build of
torch, a CPU one too. `build_ext --inplace --emulator` also builds them for the CPU, for tests: freezekit/_emulated.so,
which no package contains. Environment: FREEZEKIT_CUDA=0|1 forces CUDA off or on, FREEZEKIT_CUDA_ARCHS (for example
"80;90a") overrides the architectures, MAX_JOBS bounds the compilers that run at once.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from setuptools import setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import CppExtension, include_paths

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "kernels").rglob("*.cu"))
INFO = "_build_info.json"
DEFAULT_ARCHS = "80;90a"
JOBS = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
CXX = os.environ.get("CXX", "g++")


def find_nvcc() -> Path | None:
    """nvcc from CUDA_HOME or PATH; None where CUDA is switched off or absent."""
    wanted = os.environ.get("FREEZEKIT_CUDA")
    if wanted not in (None, "", "0", "1"):
        sys.exit(f"FREEZEKIT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    found = found or shutil.which("nvcc")
    if found is None and wanted == "1":
        sys.exit("FREEZEKIT_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on PATH")
    return Path(found) if found else None


def cuda_home(nvcc: Path) -> Path:
    """The toolkit that nvcc belongs to, as nvcc itself reports it (it may be a link or a wrapper)."""
    text = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [line.split("TOP=", 1)[1].strip() for line in text.splitlines() if "TOP=" in line]
    return Path(tops[0]).resolve() if tops else nvcc.resolve().parent.parent


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def arch_flags(archs: list[str]) -> list[str]:
    """SASS for every architecture, and PTX of the lowest one for chips that are newer than all of them."""
    lowest = min(archs, key=lambda arch: int(arch.rstrip("af")))
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{lowest},code=compute_{lowest}"]


@dataclass
class Rule:
    """Sources that one command compiles. With a header, it is compiled first and every source begins with it."""

    name: str
    command: str
    sources: list[Path]
    header: Path | None = None

    def objects(self, build: Path) -> list[Path]:
        out = build / self.name
        roots = [CSRC if path.is_relative_to(CSRC) else out for path in self.sources]
        return [out / path.relative_to(root).with_suffix(".o") for path, root in zip(self.sources, roots)]

    def lines(self, build: Path) -> list[str]:
        """As ninja reads it."""
        out = build / self.name
        out.mkdir(parents=True, exist_ok=True)
        # `-include NAME` takes NAME.gch where there is one.
        what = self.command.replace("$in", "$begin $in") if self.header else self.command
        lines = [f"rule {self.name}", f"  command = {what}", f"  description = {self.name} $in"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
        needed, begin = "", []
        if self.header:
            copy = out / self.header.name
            shutil.copy2(self.header, copy)
            lines += [f"build {copy}.gch: {self.name} {self.header}", "  begin = -x c++-header"]
            needed, begin = f" | {copy}.gch", [f"  begin = -include {copy} -Winvalid-pch"]
        for path, target in zip(self.sources, self.objects(build)):
            lines += [f"build {target}: {self.name} {path}{needed}", *begin]
        return lines


def ninja(build: Path, file: str, *rules: Rule) -> list[Path]:
    """Compiles what the rules say, side by side and only where something changed: the objects, rule by rule."""
    build.mkdir(parents=True, exist_ok=True)
    (build / file).write_text("\n".join([line for rule in rules for line in [*rule.lines(build), ""]]))
    subprocess.run(["ninja", "-j", JOBS, "-f", file], cwd=build, check=True)
    return [made for rule in rules for made in rule.objects(build)]


def one_per_folder(folder: Path, sources: list[Path]) -> list[Path]:
    """Writes one source into `folder` for each directory of `sources`, which includes all of that directory.

    In every file that includes torch the compiler instantiates the same templates: some seven seconds of work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    together: dict[Path, str] = {}
    for path in sources:
        name = "_".join(path.parent.relative_to(CSRC).parts) + ".cpp"
        together[folder / name] = together.get(folder / name, "") + f'#include "{path.relative_to(CSRC)}"\n'
    for path, text in together.items():
        if not path.exists() or path.read_text() != text:  # else all is compiled again
            path.write_text(text)
    return list(together)


class Build(build_ext):
    """Compiles the kernels with nvcc, then the torch layer around them."""

    user_options: ClassVar = [*build_ext.user_options, ("emulator", None, "in place: the kernels for the CPU as well")]
    boolean_options: ClassVar = [*build_ext.boolean_options, "emulator"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.emulator = False

    def build_extensions(self) -> None:
        build = Path(self.build_temp).resolve()
        extension = self.extensions[0]
        info = {"torch": torch.__version__, "cuda": None, "archs": [], "python": sys.version.split()[0]}
        nvcc = find_nvcc()
        why = "FREEZEKIT_CUDA=0 says so" if os.environ.get("FREEZEKIT_CUDA") == "0" else "there is no nvcc"
        without = "" if nvcc else f", without CUDA kernels since {why}"
        print(f"freezekit: compiling in {JOBS} jobs{without}; the first time takes minutes", flush=True)
        # The header of the torch layer first, which its files wait for: kernels are compiled beside it.
        rules = [self.torch_layer(build)]
        if nvcc:
            archs = (os.environ.get("FREEZEKIT_CUDA_ARCHS") or DEFAULT_ARCHS).replace(",", ";").split(";")
            banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            info["cuda"] = re.findall(r"\bV([\d.]+)", banner)[0]
            info["archs"] = archs
            # nvcc's own default leaves the binary three times as large; older ones do not know the option.
            small = "--compress-mode=size" if version_of(info["cuda"]) >= (12, 8) else ""
            hopper = "-DFREEZEKIT_SM90A" if "90a" in archs else ""  # whether there is code for Hopper's kernels
            flags = f"-std=c++17 -O3 -I{CSRC} -Xcompiler -fPIC,-fvisibility=hidden {small} {hopper}"
            flags = f"{flags} {' '.join(arch_flags(archs))}"
            # nvcc reads these too: in the command, where they are set, others than before are compiled with again.
            appended = os.environ.get("NVCC_APPEND_FLAGS")
            begin = f"NVCC_APPEND_FLAGS={shlex.quote(appended)} {nvcc}" if appended else str(nvcc)
            rules.append(Rule("nvcc", f"{begin} {flags} -MD -MF $out.d -c $in -o $out", KERNELS))
            lib = cuda_home(nvcc)
            extension.library_dirs += [
                str(p) for p in (lib / "lib64", lib / "lib", lib / "targets/x86_64-linux/lib") if p.is_dir()
            ]
            # Static, as nvcc links by default: the binary then loads where no CUDA is installed.
            extension.extra_link_args += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        self.beside(INFO).write_text(json.dumps(info))
        if sys.platform == "linux":  # a sixth of the file would be names of functions that nothing outside can call
            extension.extra_link_args.append("-Wl,--discard-all")
        extension.extra_objects += map(str, ninja(build, "extension.ninja", *rules))
        extension.depends += extension.extra_objects  # else setuptools links once, and never again
        super().build_extensions()

    def torch_layer(self, build: Path) -> Rule:
        """All that includes torch. Its headers are more than half of the work in each file: they are compiled once."""
        includes = [f"-I{CSRC}", *(f"-isystem {path}" for path in (*include_paths(), sysconfig.get_paths()["include"]))]
        # NDEBUG as torch has it: else each call through its dispatcher is traced and checked again, in its headers.
        flags = " ".join(["-std=c++20 -O2 -DNDEBUG -fPIC -fvisibility=hidden -Wall -Wno-psabi", *OPENMP, *includes])
        sources = [path for part in ("kernels", "torch", "python") for path in sorted((CSRC / part).rglob("*.cpp"))]
        sources = one_per_folder(build / "torch", sources)
        command = f"{CXX} {flags} -MD -MF $out.d -c $in -o $out"
        return Rule("torch", command, sources, CSRC / "torch/common/torch_headers.h")

    def beside(self, name: str) -> Path:
        """Where a file goes that is made beside the extension: into what will be installed."""
        path = Path(self.build_lib) / "freezekit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def copy_extensions_to_source(self) -> None:
        """In place, what was made beside the extension goes with it."""
        super().copy_extensions_to_source()
        self.copy_file(str(self.beside(INFO)), str(ROOT / "freezekit" / INFO))
        if self.emulator:
            self.build_emulator(Path(self.build_temp).resolve())

    def build_emulator(self, build: Path) -> None:
        """The same kernels for the CPU, as a library of its own: its symbols are those of the CUDA build."""
        # Arguments of 64-byte alignment, which tensor maps are, are no news since GCC 4.6.
        flags = f"-std=c++17 -O2 -fPIC -fvisibility=hidden -Wno-psabi -I{CSRC}"
        sources = sorted((CSRC / "emulator").glob("*.cpp"))
        command = f"{CXX} {flags} -x c++ -MD -MF $out.d -c $in -o $out"
        objects = ninja(build, "emulated.ninja", Rule("emulated", command, KERNELS + sources))
        subprocess.run([*CXX.split(), "-shared", *objects, "-o", ROOT / "freezekit/_emulated.so"], check=True)


# Torch's parallel_for is a header: it runs on one thread unless the code that calls it is compiled with OpenMP, as
# torch is. Compiled, not linked: the runtime is then the one that torch has loaded, with its one pool of threads.
OPENMP = ["-fopenmp"] if torch.backends.openmp.is_available() and sys.platform == "linux" else []

setup(
    # A build belongs to one minor version of torch: freezekit/_extension.py refuses any other.
    install_requires=["torch=={}.*".format(".".join(torch.__version__.split(".")[:2])), "rich>=13"],
    ext_modules=[
        CppExtension(
            "freezekit._C",
            sources=[],  # compiled by Build, which knows how
        )
    ],
    cmdclass={"build_ext": Build},
)
