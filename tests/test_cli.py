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
def frozen():
    model, x = net()
    return model.requires_grad_(False), x
def named():
    return net()[0], {"input": torch.zeros(2, 3, 12, 12)}
def misfit():
    return net()[0], torch.zeros(2, 5, 12, 12)
def stale():
    model, optimizer, x = setup()
    model(x).sum().backward()
    model[0].requires_grad_(False)  # its gradients stay: the optimizer would step once more
    return model, optimizer, x
def odd():
    model, optimizer, x = setup()
    model.register_buffer("scale", torch.ones(1, requires_grad=True))  # trains, and no optimizer sees it
    return model, optimizer, x
def alone():
    return net()[0]
def several():
    model, optimizer, x = setup()
    return model, [optimizer], x
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
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freezekit"]


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
    assert main(["audit", f"{models}:stale", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["summary"]["error"]


def test_audit_is_strict_on_demand(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", f"{models}:odd", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["warning"]
    assert main(["audit", f"{models}:odd", "--strict"]) == 1


def test_profile(models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", f"{models}:net", "--trace", str(tmp_path / "trace.json")]) == 0
    out = capsys.readouterr().out
    assert "Total Time (ns)" in out
    assert "conv2d_wgrad" in out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("factory", ["named", "frozen"])
def test_profile_takes_keywords_and_models_without_a_backward_pass(
    models: str, factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", f"{models}:{factory}", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert counts["fprop"] == 2
    assert counts["wgrad"] == (0 if factory == "frozen" else 2)


def test_profile_shows_what_freezing_takes_away(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", f"{models}:net", "--against", f"{models}:frozen"]) == 0
    assert "wgrad 2 -> 0" in capsys.readouterr().out.splitlines()


def test_the_documented_plan_has_36_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "bench.nets:converted_resnet", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["options"]) == 36


@pytest.mark.parametrize("factory", ["net", "setup", "alone", "several"])
def test_audit_takes_what_a_factory_makes(models: str, factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", f"{models}:{factory}", "--json"]) == 0
    skipped = json.loads(capsys.readouterr().out)["skipped"]
    assert ("no inputs given" in skipped.values()) == (factory == "alone")
    assert ("no optimizer given" in skipped.values()) == (factory in ("net", "alone"))


def test_plan_measures_on_demand(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{models}:net", "--measure", "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert all(option["measured_bytes"] == option["bytes_kept"] for option in options)


@pytest.mark.parametrize("command", ["explain", "plan", "profile", "audit"])
def test_inputs_that_do_not_fit_are_told_in_a_line(
    models: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, f"{models}:misfit"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"freezekit {command}: ")
    assert "5" in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_a_picture_that_cannot_be_written(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{models}:net", "--plot", "no/such/folder/kept.png"]) == 2
    assert "no/such/folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "explain", "plan", "audit", "selftest", "profile"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 8


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
