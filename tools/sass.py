"""Compiles every CUDA kernel, or those of the files named, for each architecture and reads what came out: `make sass`.

For each kernel it prints registers, static shared memory, spills and the number of tensor-core (HMMA; HGMMA is wgmma),
LDSM (ldmatrix), LDGSTS (cp.async) and UTMALDG (bulk tensor copy) instructions. It fails on a spill, on local loads or
stores, on a warning or message C75xx of ptxas (wgmma serialised, setmaxnreg ignored), and where a kernel lacks an
instruction that it is made of. No GPU is needed: nvcc compiles, nvdisasm (PyPI: nvidia-cuda-nvdisasm) disassembles.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHS = ("sm_80", "sm_90a")
COUNTED = {
    **{name: (name,) for name in ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "SYNCS", "USETMAXREG")},
    "local": ("LDL", "STL"),
}
# What a kernel whose name matches must have; all that match count. `(Access)2` loads single elements, and so do the two
# `false` of a wgrad; ldmatrix cannot transpose the 32-bit operands of a wgrad in float.
REQUIRED = [
    (re.compile(r"(?<!hopper_)gemm_kernel<"), "HMMA"),
    (re.compile(r"implicit_gemm_kernel<|wgrad_gemm_kernel<(?!float)"), "LDSM"),
    (re.compile(r"implicit_gemm_kernel<(?!.*\(Access\)2)|wgrad_gemm_kernel<(?!.*false, false)"), "LDGSTS"),
    (re.compile(r"depthwise_(forward|dgrad_stride2|wgrad)_kernel<"), "LDGSTS"),
]
# The same for kernels that are empty but for sm_90a. SYNCS are operations on mbarriers.
HOPPER = re.compile(r"hopper_\w*gemm_kernel<")
REQUIRED_OF_HOPPER = ("HGMMA", "UTMALDG", "IM2COL", "SYNCS", "USETMAXREG")
# C75xx: wgmma is serialised, waits are put around it, setmaxnreg is ignored: right results, at a fraction of the speed.
OBJECTIONS = re.compile(r"\(C75\d\d\)|\bwarning\b")
PTXAS_KERNEL = re.compile(r"Compiling entry function '(\w+)'")
PTXAS_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
PTXAS_USED = re.compile(r"Used (\d+) registers")
PTXAS_SHARED = re.compile(r"(\d+) bytes smem")
SASS_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.(\w+)")
SASS_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([\w.]*)")


@dataclass
class Kernel:
    """One kernel of one architecture; sizes in bytes."""

    name: str
    arch: str = ""
    registers: int = 0
    shared: int = 0
    spills: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)

    def faults(self) -> list[str]:
        """Why this kernel fails, in words."""
        faults = [f"spills {self.spills} bytes"] if self.spills else []
        if self.counts["local"]:
            faults.append(f"{self.counts['local']} local loads or stores")
        required = [name for pattern, name in REQUIRED if pattern.search(self.name)]
        if self.arch == "sm_90a" and HOPPER.search(self.name):
            required += REQUIRED_OF_HOPPER
        return faults + [f"no {name}" for name in required if not self.counts[name]]


def find_nvdisasm() -> str:
    """The path of nvdisasm: on PATH, in CUDA_HOME, or in the PyPI package."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvdisasm") or (shutil.which("nvdisasm", path=f"{home}/bin") if home else None)
    if found:
        return found
    for folder in map(Path, sys.path):
        for candidate in sorted(folder.glob("nvidia/*/bin/nvdisasm")):
            return str(candidate)
    sys.exit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled to readable names, without return types, arguments and namespaces."""
    out = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = {}
    for mangled, full in zip(names, out):
        name = full.replace("freezekit::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
        depth = 0
        for i, char in enumerate(name):  # the argument list opens at template depth 0
            depth += (char == "<") - (char == ">")
            if char == "(" and depth == 0:
                name = name[:i]
                break
        short[mangled] = name
    return short


def read_ptxas(text: str) -> dict[str, Kernel]:
    """Kernels by mangled name from the output of ptxas -v."""
    kernels: dict[str, Kernel] = {}
    current = Kernel("")
    for line in text.splitlines():
        if match := PTXAS_KERNEL.search(line):
            current = kernels.setdefault(match[1], Kernel(match[1]))
        if match := PTXAS_SPILL.search(line):
            current.spills = int(match[1]) + int(match[2])
        if match := PTXAS_USED.search(line):
            current.registers = int(match[1])
            shared = PTXAS_SHARED.search(line)
            current.shared = int(shared[1]) if shared else 0
    return kernels


def count_instructions(sass: str, kernels: dict[str, Kernel]) -> None:
    """Adds up the instructions of interest from nvdisasm's listing."""
    current = None
    for line in sass.splitlines():
        if match := SASS_FUNCTION.match(line):
            current = kernels.get(match[1])
        elif current and (match := SASS_INSTRUCTION.match(line)):
            current.counts["all"] += 1
            for name, opcodes in COUNTED.items():
                current.counts[name] += match[1] in opcodes
            current.counts["IM2COL"] += match[1] == "UTMALDG" and ".IM2COL" in match[2]


def compile_one(source: Path, arch: str, nvdisasm: str, folder: Path) -> list[Kernel]:
    """The kernels of one file for one architecture."""
    cubin = folder / f"{source.stem}.{arch}.cubin"
    flags = ["-std=c++17", "-O3", f"-I{CSRC}", f"-arch={arch}", "-Xptxas", "-v", "-cubin"]
    built = subprocess.run(["nvcc", *flags, str(source), "-o", str(cubin)], capture_output=True, text=True)
    said = built.stdout + built.stderr
    if built.returncode or OBJECTIONS.search(said):
        sys.exit(f"{source.name} for {arch}:\n{said}")
    kernels = read_ptxas(said)
    if not kernels:
        return []
    sass = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    count_instructions(sass, kernels)
    for mangled, name in demangle(list(kernels)).items():
        kernels[mangled].name, kernels[mangled].arch = name, arch
    return sorted(kernels.values(), key=lambda kernel: kernel.name)


def main() -> int:
    sources = [Path(path) for path in sys.argv[1:]] or sorted((CSRC / "kernels").rglob("*.cu"))
    nvdisasm = find_nvdisasm()
    failures = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [(s, a, pool.submit(compile_one, s, a, nvdisasm, Path(folder))) for a in ARCHS for s in sources]
        shown = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "all")
        print(f"{'arch':7}{'regs':>5}{'smem':>7}{'spill':>6}{''.join(f'{name:>8}' for name in shown)}  kernel")
        for source, arch, job in jobs:
            for kernel in job.result():
                sizes = f"{kernel.registers:5}{kernel.shared:7}{kernel.spills:6}"
                counts = "".join(f"{kernel.counts[name]:8}" for name in shown)
                print(f"{arch:7}{sizes}{counts}  {kernel.name}", flush=True)
                failures += [f"{arch} {source.name} {kernel.name}: {fault}" for fault in kernel.faults()]
    print("\n".join(["", *failures, f"{len(failures)} faults"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
