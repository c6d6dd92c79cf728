"""``freezekit audit module:factory``: exit status, table, data, and errors that say what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from freezekit import cli

OK, FOUND, UNUSABLE = 0, 1, 2

FACTORIES = """
import torch
from torch import nn


def healthy():
    return nn.Linear(2, 2)


def typo():
    model = nn.Linear(2, 2)
    model.weight.requires_brad = False
    return model


def idle():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    return model, torch.optim.SGD(model[1].parameters(), lr=0.1), torch.ones(1, 2)


def broken():
    raise ValueError("no weights")


def wrong():
    return "model"


number = 3
"""


def main(arguments: list[str]) -> int:
    return cli.main(["audit", *arguments])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of factories, which is the current directory."""
    (tmp_path / "audited_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_exit_status(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audited_factories:healthy"]) == OK
    assert "0 error" in capsys.readouterr().out
    assert main(["audited_factories:typo"]) == FOUND
    assert "requires_brad" in capsys.readouterr().out
    assert main(["audited_factories:idle"]) == OK
    assert main(["audited_factories:idle", "--strict"]) == FOUND


def test_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audited_factories:idle", "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["summary"]["warning"] == 1
    assert data["skipped"] == {}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("audited_factories", "expected module:factory"),
        ("no_such_module:f", "No module named"),
        ("audited_factories:nothing", "has no attribute"),
        ("audited_factories:number", "is a int, not a callable"),
        ("audited_factories:broken", "raised ValueError: no weights"),
        ("audited_factories:wrong", r"got (str)"),
    ],
)
def test_a_factory_that_cannot_be_used(here: Path, capsys: pytest.CaptureFixture[str], spec: str, message: str) -> None:
    assert main([spec]) == UNUSABLE
    assert message in capsys.readouterr().err


def test_from_a_shell(here: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "freezekit.auditing", "audited_factories:typo", "--json"]
    done = subprocess.run(command, cwd=here, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False)
    assert done.returncode == FOUND, done.stderr
    assert json.loads(done.stdout)["findings"][0]["code"] == "unknown-attribute"
