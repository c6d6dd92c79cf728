"""Timing of tiles, emulated: every candidate is tried and right, and a wrong one is told. No figure is tested."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tiles
from bench.layer_lists import LayerShape, layers_of
from bench.settings import NOT_RUN
from freezekit import _C

CPU = torch.device("cpu")
LAYER = LayerShape("one", 16, 24, 3, 6, padding=1)


def candidates(operator: str, layer: LayerShape = LAYER, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    problem = tiles.TiledProblem(layer, operator, 1, CPU, dtype)
    return [candidate.name for candidate in problem.candidates()]


def test_every_tile_that_takes_the_layer_is_a_candidate() -> None:
    gathers = [f"implicit_gemm/{config}" for config in range(5)]
    for operator in ("conv2d", "conv2d_dgrad"):
        found = candidates(operator)
        assert found[:5] == gathers
        assert set(found[5:]) <= {"hopper/0", "hopper/1", "hopper/2"}
    slices = candidates("conv2d_wgrad")
    assert {"implicit_gemm/0", "implicit_gemm/1", "implicit_gemm/2"} <= set(slices)
    depthwise = candidates("conv2d", LayerShape("dw", 16, 16, 3, 6, padding=1, groups=16))
    assert depthwise[0].startswith("depthwise/")
    assert candidates("conv2d", dtype=torch.float64)[0].startswith("direct/")


@pytest.mark.parametrize("operator", tiles.OPERATORS)
def test_what_select_takes_is_among_them(operator: str) -> None:
    for layer in layers_of("tiny"):
        problem = tiles.TiledProblem(layer, operator, 1, CPU, torch.bfloat16)
        assert problem.chosen() in list(problem.candidates())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiles.json"
    arguments = ["--device", "cpu", "--layers", "tiny", "--batch", "1", "--rounds", "1", "--json", str(file)]
    assert tiles.main(arguments) == 0
    said = capsys.readouterr().out
    assert "these times say nothing of any GPU" in said
    assert f"{3 * len(layers_of('tiny'))} problems" in said
    content = json.loads(file.read_text())
    assert content["emulated"] is True
    rows = content["rows"]
    assert {row["operator"] for row in rows} == set(tiles.OPERATORS)
    assert all(row["seconds"] > 0 for row in rows)
    for layer in layers_of("tiny"):
        of_layer = [row for row in rows if row["layer"] == layer.name and row["operator"] == "conv2d"]
        assert sum(row["chosen"] for row in of_layer) == 1
        assert sum(row["candidate"] == "aten" for row in of_layer) == 1


def test_a_wrong_kernel_is_a_line_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = tiles.TiledProblem.run
    file = tmp_path / "tiles.json"

    def run(self: tiles.TiledProblem, candidate: tiles.Candidate, out: torch.Tensor) -> bool:
        taken = right(self, candidate, out)
        if taken and candidate.config == 1:
            out.view(-1)[0] += 1000
        if taken and candidate.config == 2 and self.number == 1:
            raise RuntimeError("kernel failed: launch failed")
        return taken

    monkeypatch.setattr(tiles, "MOST_CONFIGS", 3)
    monkeypatch.setattr(tiles.TiledProblem, "run", run)
    arguments = ["--device", "cpu", "--layers", "tiny", "--batch", "1", "--rounds", "1", "--json", str(file)]
    assert tiles.main(arguments) == 1
    said = capsys.readouterr().out
    assert "WRONG RESULT: implicit_gemm/1 on " in said
    assert "conv2d_dgrad: kernel failed: launch failed" in said
    content = json.loads(file.read_text())
    assert len(content["wrong"]) == said.count("WRONG RESULT")
    timed = {(row["operator"], row["candidate"]) for row in content["rows"]}
    assert ("conv2d", "implicit_gemm/2") in timed
    assert ("conv2d_dgrad", "implicit_gemm/2") not in timed
    assert not any(candidate == "implicit_gemm/1" for _, candidate in timed)
    assert {operator for operator, _ in timed} == set(tiles.OPERATORS)


def test_an_error_that_stays_costs_lines_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right, lost, file = tiles.measure, "CUDA error: an illegal memory access was encountered", tmp_path / "tiles.json"

    def measure(problem: tiles.TiledProblem, *arguments: Any) -> list[tiles.Timed]:
        if (problem.layer.name, problem.operator) == ("dense", "conv2d"):
            return right(problem, *arguments)
        raise RuntimeError(f"{lost}\nand more")

    monkeypatch.setattr(tiles, "measure", measure)
    arguments = ["--device", "cpu", "--layers", "tiny", "--batch", "1", "--rounds", "1", "--json", str(file)]
    assert tiles.main(arguments) == 1
    others = 3 * len(layers_of("tiny")) - 1
    assert capsys.readouterr().out.count(f"nothing is timed: {lost}\n") == others
    content = json.loads(file.read_text())
    assert (len(content["wrong"]), {row["layer"] for row in content["rows"]}) == (others, {"dense"})


def test_kernels_for_hopper_come_last_and_take_no_others_with_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As on a GPU of sm_90, where one of them leaves an error that stays."""
    right, aten, lost = tiles.TiledProblem.run, tiles.TiledProblem.aten, list[str]()

    def check() -> None:
        if lost:
            raise RuntimeError("CUDA error: unspecified launch failure")

    def run(self: tiles.TiledProblem, candidate: tiles.Candidate, out: torch.Tensor) -> bool:
        if candidate.family == "hopper" and candidate.config == 0:
            lost.append(candidate.name)
        check()
        return right(self, candidate, out)

    def checked(self: tiles.TiledProblem) -> torch.Tensor:
        check()
        return aten(self)

    monkeypatch.setattr(tiles, "hopper_comes_last", lambda device: True)
    monkeypatch.setattr(tiles.TiledProblem, "run", run)
    monkeypatch.setattr(tiles.TiledProblem, "aten", checked)
    file = tmp_path / "tiles.json"
    arguments = ["--device", "cpu", "--layers", "tiny", "--batch", "1", "--rounds", "1", "--json", str(file)]
    assert tiles.main(arguments) == 1
    content = json.loads(file.read_text())
    of_aten = [(row["layer"], row["operator"]) for row in content["rows"] if row["candidate"] == "aten"]
    assert len(of_aten) == len(set(of_aten)) == 3 * len(layers_of("tiny"))
    assert not [row for row in content["rows"] if row["candidate"].startswith("hopper")]
    assert lost[0] == "hopper/0"
    assert "unspecified launch failure" in capsys.readouterr().out


def test_a_full_disk_costs_what_is_written_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tiles.document, "write", full)
    arguments = ["--device", "cpu", "--layers", "tiny", "--batch", "1", "--rounds", "1", "--json", "tiles.json"]
    assert tiles.main(arguments) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "FAILED: tiles.json is not written: No space left on device"
    assert lines[-1].startswith(f"{3 * len(layers_of('tiny'))} problems")


def test_a_limit_leaves_out_problems_and_says_how_many(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    arguments = ["--device", "cpu", "--layers", "tiny", "--batch", "1", "--rounds", "1", "--json", str(file)]
    assert tiles.main([*arguments, "--until", "0"]) == NOT_RUN
    problems = 3 * len(layers_of("tiny"))
    said = capsys.readouterr().out.splitlines()[-1]  # which a table of steps shows
    assert said.endswith(f"out of time: {problems} of {problems} problems are left out")
    assert not file.exists()


def test_what_cannot_be_launched_is_said() -> None:
    x, w, y = torch.ones(1, 8, 4, 4), torch.ones(8, 8, 1, 1), torch.ones(1, 8, 4, 4)
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    with pytest.raises(ValueError, match="dense channels_last"):
        _C.tiles.launch(0, x, w, y, *geometry, 1, 0, 1)
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    assert _C.tiles.launch(0, x, w, y, *geometry, 1, 0, 1)
    assert torch.equal(y, torch.full_like(y, 8))
    assert not _C.tiles.launch(0, x, w, y, *geometry, 1, 9, 1), "no such config"
    assert not _C.tiles.launch(0, x, w, y, *geometry, 0, 0, 1), "no family"
    with pytest.raises(ValueError, match="do not make a convolution"):
        _C.tiles.launch(0, x, w, y[..., :2].contiguous(memory_format=torch.channels_last), *geometry, 1, 0, 1)


def test_a_gpu_that_is_not_there_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tiles.main(["--device", "cuda", "--layers", "tiny"])
    assert "argument --device: torch sees no CUDA device here" in capsys.readouterr().err
