"""The build, its record of itself, and what it says where it does not fit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import freezekit as fk
from freezekit import _C, _extension
from freezekit.backends import current_backend
from freezekit.functional import conv2d
from freezekit.info import describe, info
from tests import fresh

ROOT = Path(__file__).resolve().parents[1]


def test_info_names_versions_kernels_and_devices() -> None:
    facts = info()
    assert facts["torch"] == torch.__version__
    assert facts["cuda_kernels"] == (facts["nvcc"] is not None) == bool(facts["cuda_archs"])
    assert facts["devices"][-1].startswith("cpu")
    text = describe()
    for value in (facts["freezekit"], facts["torch"], *facts["devices"], *facts["cuda_archs"]):
        assert value in text


def test_info_runs_as_a_module() -> None:
    out = subprocess.run([sys.executable, "-m", "freezekit.info"], capture_output=True, text=True, cwd=ROOT, check=True)

    def neutral(text: str) -> str:
        return re.sub(r"\(\d+ threads\)", "", text).strip()  # tests set their own number of threads

    assert neutral(out.stdout) == neutral(describe())
    assert out.stderr == ""


STEP = """
net = freezekit.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)))
net(torch.ones(1, 3, 8, 8, requires_grad=True)).sum().backward()
"""


@pytest.mark.parametrize("then", ["", STEP], ids=["import", "step"])
def test_nothing_comes_in_that_only_some_need(then: str) -> None:
    code = f"import sys, torch; old = set(sys.modules); import freezekit\n{then}\nprint(*(set(sys.modules) - old))"
    done = fresh.run(code, folder=ROOT)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    new = {name.split(".")[0] if not name.startswith("torch.") else name for name in out.split()}
    assert "freezekit" in new
    assert not new & {"rich", "matplotlib", "numpy", "sklearn", "sympy", "torch._dynamo", "torch._inductor"}


def test_cuda_kernels_are_in_wherever_nvcc_is() -> None:
    found = shutil.which("nvcc") is not None
    assert _C.has_cuda_kernels() == found


@pytest.mark.skipif(not any(ROOT.glob("build/temp.*")), reason="nothing was compiled here")
def test_an_installed_copy_is_whole(tmp_path: Path) -> None:
    """What `pip install` puts together, from what is compiled already, imports and computes far from the sources."""
    # setuptools leaves a record of what it packs in the folder it runs from.
    steps = ["build_py", "--build-lib", str(tmp_path / "lib"), "build_ext", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), *steps], cwd=ROOT, check=True
    )
    ask = "import torch, freezekit as fk; print(fk.__file__); x = torch.ones(1, 1, 3, 3); fk.functional.conv2d(x, x)"
    run = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(tmp_path / "lib")),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert Path(run.stdout.strip()).is_relative_to(tmp_path / "lib")
    assert (tmp_path / "lib/freezekit/py.typed").is_file()
    assert not (tmp_path / "lib/freezekit/_emulated.so").exists()  # which is for tests


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], str]:
    """The files of a source distribution, and its metadata."""
    folder = str(tmp_path_factory.mktemp("dist"))
    steps = ["egg_info", "--egg-base", folder, "sdist", "--formats", "tar", "--dist-dir", folder]
    subprocess.run([sys.executable, "setup.py", "-q", *steps], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(Path(folder).glob("*.tar"))) as packed:
        metadata = next(name for name in packed.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO"))
        opened = packed.extractfile(metadata)
        assert opened is not None
        return {name.partition("/")[2] for name in packed.getnames()}, opened.read().decode()


def test_a_source_distribution_holds_all_that_is_compiled(distribution: tuple[set[str], str]) -> None:
    names, _ = distribution
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".h")]
    assert len(sources) > 100
    assert not {str(path.relative_to(ROOT)) for path in sources} - names


def test_the_metadata_names_the_version_and_the_torch_of_the_build(distribution: tuple[set[str], str]) -> None:
    lines = distribution[1].splitlines()
    assert f"Version: {fk.__version__}" in lines
    needed = [line for line in lines if line.startswith("Requires-Dist: torch")]
    assert needed == [f"Requires-Dist: torch=={_extension.minor(torch.__version__)}.*"]


@pytest.mark.parametrize(("built", "running"), [("2.11.0", "2.13.0+cpu"), ("2.13.1", "3.13.1"), ("2.1.0", "2.11.0")])
def test_another_torch_is_refused_with_the_cure(built: str, running: str) -> None:
    with pytest.raises(ImportError, match=r"(?s)built for torch.*rebuild it with .*pip install"):
        _extension.check_torch(built, running)


def test_a_patch_release_is_not_another_torch() -> None:
    _extension.check_torch("2.13.0", "2.13.1+cu130")


def test_import_under_another_torch_refuses(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "freezekit", tmp_path / "freezekit", ignore=shutil.ignore_patterns("__pycache__"))
    record = tmp_path / "freezekit" / "_build_info.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "torch": "2.9.0"}))
    run = fresh.run("import freezekit", folder=tmp_path)
    assert run.returncode == 1
    assert "was built for torch 2.9" in run.stderr
    record.unlink()
    run = fresh.run("import freezekit", folder=tmp_path)
    assert "freezekit is not built yet" in run.stderr


def test_native_without_a_gpu_says_what_it_needs() -> None:
    x, w = torch.randn(1, 1, 3, 3), torch.randn(1, 1, 3, 3)
    with pytest.raises(RuntimeError, match="backend='native' cannot compute conv2d: it needs CUDA tensors"):
        conv2d(x, w, backend="native")
    with fk.backend("native"), pytest.raises(RuntimeError, match="needs CUDA tensors"):
        conv2d(x, w)
    assert current_backend() == "auto"


@pytest.mark.parametrize(
    "use",
    [lambda: fk.backend("cudnn"), lambda: conv2d(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), backend="cudnn")],
)
def test_an_unknown_backend_is_named(use) -> None:
    with pytest.raises(ValueError, match="backend must be 'auto', 'native' or 'aten', got 'cudnn'"):
        use()


def test_select_needs_no_device() -> None:
    choice = _C.select("conv2d", "float32", (8, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1))
    assert choice["family"] == "direct"
    assert choice["kernel"]
    assert choice["reason"]
    assert choice["auto"] == "aten"
    assert choice["auto_reason"] == _C.choices.rule
    with pytest.raises(ValueError, match="operator is unknown: 'relu'"):
        _C.select("relu", "float32", (1, 1, 1, 1), (1, 1, 1, 1))


def test_the_launch_log_tells_what_ran() -> None:
    x, w = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3)
    _C.set_launch_log(True)
    try:
        with fk.testing.emulated():
            conv2d(x, w).sum().backward()
        log = _C.take_launch_log()
    finally:
        _C.set_launch_log(False)
    assert [row["operator"] for row in log] == ["conv2d", "conv2d_dgrad"]
    assert {row["backend"] for row in log} == {"emulated"}
    assert log[0]["input_size"] == (2, 3, 5, 5)
    assert _C.take_launch_log() == []
