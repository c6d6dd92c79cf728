"""Arrows between the layers of code point one way, and the kernels know no torch."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import freezekit as fk

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "freezekit"

# What each folder of csrc may include from the others.
MAY_INCLUDE = {
    "core": {"core"},
    "emulator": {"emulator", "core", "kernels"},
    "kernels": {"kernels", "core", "emulator"},
    "cpu": {"cpu", "core"},
    "torch": {"torch", "kernels", "core", "cpu"},
    "python": {"python", "torch", "kernels", "core"},
}
# csrc/torch: what each folder may include of the others. Every folder that is not named here is an operator's.
SHARED = {
    "common": {"common"},
    "autograd": {"common", "autograd"},
    "backends": {"common", "backends"},
}
# Operators that are made of another one's parts.
MADE_OF = {
    "frozen_conv2d": {"bits"},
    "max_pool2d": {"bits"},
    "max_pool3d": {"max_pool2d"},
    "enable": {"bits", "chains", "conv2d", "conv_nd", "linear_layers", "lossy", "max_pool2d", "max_pool3d", "norm"},
    "lossy": {"bits"},
}
# csrc/kernels: a family uses what all share, in the folder above, and its own; Hopper's tiles end as sm_80's do.
KERNELS_OF = {"hopper": {"gemm_sm80"}}
# A CUDA graph captures whatever a kernel's launcher does: none of this is allowed while it does.
NEVER_WHILE_CAPTURED = re.compile(
    r"\b(cuda(Malloc|Free|HostAlloc|HostRegister|StreamCreate)\w*|cuda\w*Synchronize|cudaMemcpy(?!\w*Async)\w*"
    r"|(?<!sn)printf|fputs|cout|cerr|getenv)\b"
)
TORCH_HEADER = re.compile(r"^(ATen|c10|torch|caffe2|pybind11|Python\.h)(/|$)")

# Python modules by layer: one may import its own layer and those before it.
LAYERS = [
    {
        "_extension",
        "_C",
        "_arguments",
        "_inputs",
        "_tf32",
        "_showing",
        "_storages",
        "_twin",
        "backends",
        "enabling",
        "flops",
        "testing",
        "tuning",
    },
    {"functional"},
    {"nn"},
    {"conversion", "freezing", "guarding", "schedules", "distributed", "fusion"},
    {"auditing", "explanation", "planning", "profiling", "info", "_layer_checks", "selftest", "cli"},
]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources(folder: str) -> list[Path]:
    return [p for p in (CSRC / folder).rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cpp"}]


@pytest.mark.parametrize("folder", ["core", "kernels", "emulator"])
def test_no_torch_header_below_the_torch_layer(folder: str) -> None:
    assert sources(folder)
    found = [f"{p.relative_to(ROOT)}: {i}" for p in sources(folder) for i in includes(p) if TORCH_HEADER.match(i)]
    assert not found


@pytest.mark.parametrize("folder", sorted(p.name for p in CSRC.iterdir() if p.is_dir()))
def test_includes_follow_the_layers(folder: str) -> None:
    wrong = []
    for path in sources(folder):
        for include in includes(path):
            target = include.split("/")[0]
            if target in MAY_INCLUDE and (CSRC / include).exists() and target not in MAY_INCLUDE[folder]:
                wrong.append(f"{path.relative_to(ROOT)} includes {include}")
    assert not wrong


def folders(inside: Path) -> list[str]:
    return sorted(p.name for p in inside.iterdir() if p.is_dir())


def crossing(inside: str, folder: str, allowed: set[str]) -> list[str]:
    """Includes that lead from one folder of csrc/`inside` into another that is not allowed."""
    wrong = []
    for path in sources(f"{inside}/{folder}"):
        for include in includes(path):
            parts = include.split("/")
            if parts[0] == inside and len(parts) > 2 and (CSRC / include).exists() and parts[1] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} includes {include}")
    return wrong


@pytest.mark.parametrize("folder", folders(CSRC / "torch"))
def test_an_operator_uses_what_all_share_and_what_it_is_made_of(folder: str) -> None:
    own = {*SHARED, folder, *MADE_OF.get(folder, ())}
    assert sources(f"torch/{folder}")
    assert not crossing("torch", folder, SHARED.get(folder, own))


@pytest.mark.parametrize("folder", folders(CSRC / "kernels"))
def test_a_family_of_kernels_uses_what_all_share(folder: str) -> None:
    assert sources(f"kernels/{folder}")
    assert not crossing("kernels", folder, {folder, *KERNELS_OF.get(folder, ())})


def test_a_crossing_is_seen() -> None:
    assert crossing("torch", "frozen_conv2d", {"frozen_conv2d", "common", "autograd", "bits"})
    assert crossing("kernels", "hopper", {"hopper"})


def test_every_file_of_the_torch_layer_is_in_a_folder() -> None:
    assert not [path for path in (CSRC / "torch").iterdir() if path.is_file()]
    assert {*SHARED, *MADE_OF} <= set(folders(CSRC / "torch"))


def test_launchers_neither_allocate_nor_synchronise_nor_print_nor_read_the_environment() -> None:
    found = []
    for path in (*sources("kernels"), *sources("core")):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in NEVER_WHILE_CAPTURED.finditer(text)]
    assert not found


def test_that_rule_sees_what_it_must() -> None:
    for bad in (
        "cudaMalloc(&p, 1)",
        "cudaDeviceSynchronize()",
        "cudaMemcpy(a, b, 1)",
        'printf("x")',
        'std::getenv("A")',
    ):
        assert NEVER_WHILE_CAPTURED.search(bad), bad
    for good in ("cudaMemcpyAsync(a, b, 1)", "std::snprintf(a)", "cudaFuncSetAttribute(k)", "cudaGetLastError()"):
        assert not NEVER_WHILE_CAPTURED.search(good), good


def imported(path: Path) -> set[str]:
    """Names of freezekit's modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "freezekit":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("freezekit."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(a.name.split(".")[1] for a in node.names if a.name.startswith("freezekit."))
    return names


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(module: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if module in layer), None)


def modules() -> list[Path]:
    return [p for p in PACKAGE.rglob("*.py") if p.name not in {"__init__.py", "__main__.py"} or p.parent != PACKAGE]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path: Path) -> None:
    own = layer_of(module_of(path))
    assert own is not None, f"freezekit.{module_of(path)} stands in no layer: add it to LAYERS"
    above = [name for name in imported(path) if (layer := layer_of(name)) is not None and layer > own]
    assert not above


PUBLIC = {
    *(f"FreezableConv{kind}{rank}d" for kind in ("", "Transpose") for rank in (1, 2, 3)),
    *("convert", "revert", "fuse", "unfuse", "freeze", "unfreeze"),
    *("freeze_state", "guard", "audit", "explain", "plan", "profile", "schedules", "backend"),
    *("enable", "disable", "enabled", "is_enabled"),
}


def python_files(*folders: str) -> dict[str, Path]:
    """By the names of the modules."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def test_imports_run_in_no_circle() -> None:
    files = python_files("freezekit", "bench", "tools")
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {full if full in files else node.module for full in named} - {"freezekit"}  # holds _C
    assert sum(map(len, graph.values())) > 300
    assert list(TopologicalSorter(graph).static_order())  # or a CycleError


def test_the_public_face() -> None:
    assert set(fk.__all__) == PUBLIC
    assert all(hasattr(fk, name) for name in PUBLIC)
    assert fk.__all__ == sorted(fk.__all__)


def test_no_name_shadows_a_module() -> None:
    """After ``import freezekit.planning`` the attribute of that name is the module, and so for every other."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        parent, _, own = name.rpartition(".")
        if parent and own != "__main__":
            module = importlib.import_module(name)
            assert getattr(sys.modules[parent], own) is module, name


def test_no_two_classes_have_one_name() -> None:
    """A name that is read in one module should not mean something else in the next."""
    found: dict[str, list[str]] = {}
    for path in python_files("freezekit", "bench", "tools").values():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert len(found) > 100
    assert not {name: paths for name, paths in found.items() if len(paths) > 1}


def test_the_package_imports_neither_bench_nor_tests() -> None:
    wrong = [p for p in PACKAGE.rglob("*.py") if re.search(r"^\s*(from|import) (bench|tests)\b", p.read_text(), re.M)]
    assert not wrong


def test_bench_imports_no_tests() -> None:
    paths = python_files("bench").values()
    assert not [p for p in paths if re.search(r"^\s*(from|import) tests\b", p.read_text(), re.M)]


def test_the_include_rule_sees_a_torch_header() -> None:
    assert TORCH_HEADER.match("ATen/core/Tensor.h")
    assert TORCH_HEADER.match("torch/library.h")
    assert not TORCH_HEADER.match("core/problem.h")
