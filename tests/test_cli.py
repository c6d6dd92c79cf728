"""The shell face: output, exit codes, and what it says to wrong usage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from freezekit.cli import main, parse_bytes

MODELS = """
import torch, freezekit as fk
from torch import nn
def net():
    model = fk.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    return model, torch.zeros(2, 3, 12, 12)
def setup():
    model, x = net()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), x
def alone():
    return net()[0]
def number():
    return 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    return "cli_models"


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "CUDA kernels" in capsys.readouterr().out


@pytest.mark.parametrize("factory", ["net", "setup"])
def test_explain(models: str, factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{models}:{factory}", "--json", "--plot", str(tmp_path / "kept.png")]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["0", "1", "2"]
    assert (tmp_path / "kept.png").exists()
    assert main(["explain", f"{models}:{factory}"]) == 0
    assert "FreezableConv2d" in capsys.readouterr().out


def test_plan_exits_with_one_where_nothing_fits(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{models}:net", "--memory", "1G"]) == 0
    assert "fits first" in capsys.readouterr().out
    assert main(["plan", f"{models}:net", "--time", "1e-300", "--json"]) == 0  # the deepest freeze runs no backward
    assert json.loads(capsys.readouterr().out)["choice"] is not None


def test_audit(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", f"{models}:setup"]) == 0
    assert capsys.readouterr().out


def test_profile(models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", f"{models}:net", "--trace", str(tmp_path / "trace.json")]) == 0
    out = capsys.readouterr().out
    assert "Total Time (ns)" in out
    assert "conv2d_wgrad" in out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("nowhere", "expected module:factory"),
        ("nowhere:net", "nowhere"),
        ("cli_models:missing", "missing"),
        ("cli_models:number", "must return"),
        ("cli_models:alone", "inputs are missing"),
    ],
)
def test_wrong_models_exit_with_two(models: str, model: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", model]) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["plan", "m:f", "--memory", "lots"], ["plan", "m:f", "--memory", "-1"]]
)
def test_wrong_usage_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: freezekit" in capsys.readouterr().err


def test_help_teaches() -> None:
    run = subprocess.run([sys.executable, "-m", "freezekit.cli", "--help"], capture_output=True, text=True, check=True)
    for word in ("explain", "plan", "audit", "selftest", "profile", "module:factory", "exit codes", "examples"):
        assert word in run.stdout


@pytest.mark.parametrize(("text", "count"), [("12", 12), ("1K", 1024), ("1.5m", 1.5 * 2**20), ("2G", 2**31)])
def test_bytes(text: str, count: float) -> None:
    assert parse_bytes(text) == count
