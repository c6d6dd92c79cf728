"""The command as people and scripts use it."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from bench import compare, document, options, sections, sides
from bench.environment import ROOT, Peaks
from bench.measure import Measured, measure
from bench.report import Printout
from bench.sections import kernels, layers
from bench.settings import NOT_RUN, Settings
from bench.timing import HostClock
from tools.gpu_check import step

TINY = ["--device", "cpu", "--layers", "tiny", "--repeat", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """A run of everything, quick: its document and its text."""
    path = tmp_path_factory.mktemp("compare") / "out.json"
    console = Console(record=True, width=120)
    arguments = ["--device", "cpu", "--quick", "--repeat", "1", "--threads", "1", "--section", "all"]
    assert compare.main([*arguments, "--json", str(path)], console) == 0
    return json.loads(path.read_text()), console.export_text()


def test_document_is_what_the_schema_says(whole: tuple[dict, str]) -> None:
    document.validate(whole[0])
    assert {row["section"] for row in whole[0]["rows"]} == {"layers", "blocks", "models", "memory", "scaling"}


def test_text_has_device_versions_and_commit_before_anything_else(whole: tuple[dict, str]) -> None:
    text, environment = whole[1], whole[0]["environment"]
    head = text[: text.index("kernels:")]
    for key in ("device", "torch", "freezekit", "commit", "date"):
        assert environment[key] in head


def test_forum_example_counts(whole: tuple[dict, str]) -> None:
    found = {(t["regime"], t["side"]): (t["counts"]["dgrad"], t["counts"]["wgrad"]) for t in whole[0]["kernels"]}
    assert found == {
        ("all trainable", "stock"): (2, 3),
        ("all trainable", "freezekit"): (2, 3),
        ("middle frozen", "stock"): (2, 2),
        ("middle frozen", "freezekit"): (2, 2),
    }
    for column in ("Time (%)", "Total Time (ns)", "Instances", "Avg (ns)", "Med (ns)", "StdDev (ns)", "Name"):
        assert column in whole[1]


def test_frozen_layers_keep_nothing_and_stock_keeps_its_input(whole: tuple[dict, str]) -> None:
    rows = [Measured.from_dict(data) for data in whole[0]["rows"] if data["section"] == "layers"]
    dense = {(row.regime, row.side): row.bytes_kept for row in rows if row.case == "dense"}
    x = 2 * 8 * 12 * 12 * 4
    assert dense == {
        ("trainable", "stock"): x,
        ("trainable", "freezekit"): x,
        ("frozen", "stock"): x,
        ("frozen", "freezekit"): 0,
    }


def test_every_row_is_beside_stock(whole: tuple[dict, str]) -> None:
    rows = [Measured.from_dict(data) for data in whole[0]["rows"]]
    cases = {row.key[:-1] for row in rows}
    assert {row.key[:-1] for row in rows if row.side == "stock"} == cases
    assert all(row.ratio is not None and row.error is not None and row.error <= 1 for row in rows)
    assert all(row.ratio == row.ratio.of([1.0]) for row in rows if row.side == "stock" and row.ratio)


def test_every_row_has_every_figure(whole: tuple[dict, str]) -> None:
    for row in whole[0]["rows"]:
        assert not [name for name, value in row.items() if value is None and name != "x"], row["case"]
        assert row["kernels"] > 0
        assert row["roofline"] > 0


def test_models_run_in_every_regime(whole: tuple[dict, str]) -> None:
    assert {row["regime"] for row in whole[0]["rows"] if row["section"] == "models"} == {
        "all trainable", "first half frozen", "second half frozen", "bias only", "norm only", "head only",
        "all frozen, input learns", "all frozen",
    }  # fmt: skip


def test_lines_fit_the_page(whole: tuple[dict, str]) -> None:
    rows = whole[1][whole[1].index("layers:") :].splitlines()  # Kernels' names are as long as they are.
    assert max(len(line.rstrip()) for line in rows if not line.startswith("written")) <= 120


@pytest.mark.parametrize("part", ["fprop", "dgrad", "wgrad", "backward"])
def test_parts_of_a_layer(part: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert compare.main([*TINY, "--section", "layers", "--parts", part, "--json", str(path)], Console(quiet=True)) == 0
    rows = document.read(path)["rows"]
    assert {row["part"] for row in rows} == {part}
    assert {row["bytes_kept"] for row in rows} == {None}


def test_competitors_stand_beside(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    names = "freezekit,stock_channels_last,memsave_torch,freezekit_native"
    console = Console(record=True, width=160)
    assert compare.main([*TINY, "--section", "layers", "--sides", names, "--json", str(path)], console) == 0
    result = document.read(path)
    assert {row["side"] for row in result["rows"]} >= {"stock", "freezekit", "stock_channels_last"}
    assert any("freezekit_native" in line and "CUDA" in line for line in result["skipped"])


def test_time_limit_says_what_was_not_run(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    console = Console(record=True, width=160)
    assert compare.main([*TINY, "--section", "layers", "--time-limit", "1e-9", "--json", str(path)], console) == 0
    text = console.export_text()
    assert "8 of 8 cases of layers" in text
    assert text.splitlines()[-1].endswith("out.json: 0 rows; 8 cases were not run within the time limit")
    assert document.read(path)["skipped"]


def test_an_instant_that_leaves_cases_out_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    until, quiet = str(time.monotonic()), Console(quiet=True)
    assert compare.main([*TINY, "--section", "layers", "--until", until], quiet) == NOT_RUN == step.NOT_RUN
    monkeypatch.setattr(compare.Run, "failures", 1)
    assert compare.main([*TINY, "--section", "layers", "--until", until], quiet) == 1


def test_who_takes_no_part_is_told() -> None:
    notes = options.parse(["--device", "cpu", "--section", "layers", "--sides", "checkpoint"]).notes
    assert notes == ("left out of layers: checkpoint: takes part only in blocks, models, memory, scaling",)


def test_everything_is_everything() -> None:
    asked = options.parse(["--device", "cpu", "--all"])
    assert asked.sections == sections.NAMES
    assert len(asked.settings.layer_lists) == 6
    assert {"stock", "freezekit", "stock_channels_last", "stock_compiled", "checkpoint"} <= set(asked.settings.sides)
    assert set(asked.settings.parts) == {"step", "fprop", "dgrad", "wgrad", "backward"}
    assert asked.time_limit is not None
    assert asked.time_limit < 20 * 60


def test_time_is_shared_by_what_cases_cost() -> None:
    settings = options.parse(["--device", "cpu", "--all"]).settings
    run = compare.Run(settings, Printout(Console(quiet=True)), None)
    cases = {name: make(settings) for name, make in sections.SECTIONS.items()}
    weights = {name: run._weight(compare.Turn("", made)) / len(made) for name, made in cases.items()}
    assert weights == {"layers": 1, "blocks": 35, "models": 35, "memory": 35, "scaling": 35}


def test_the_makefile_asks_for_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench" / "out").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"\$\(PY\) bench/compare.py(.*)", (ROOT / "Makefile").read_text())
    assert len(commands) == 2
    for command in commands:
        options.parse(command.split())


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *arguments: str) -> options.Asked:
    """The command line as read on a machine with such a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return options.parse(["--device", "cuda", *arguments])


def test_a_gpu_shows_own_kernels_beside_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = ("stock", "stock_channels_last", "freezekit", "freezekit_native_channels_last")
    assert on_gpu(monkeypatch, (8, 0)).settings.sides == sides
    assert on_gpu(monkeypatch, (9, 0)).settings.sides == (*sides, "freezekit_hopper_channels_last")
    assert on_gpu(monkeypatch, (8, 0)).notes == ()
    asked = on_gpu(monkeypatch, (8, 0), "--sides", "freezekit_hopper_channels_last")
    assert asked.notes == ("left out: freezekit_hopper_channels_last: these kernels need a GPU of sm_90",)


def test_ratios_are_to_stock_in_the_same_memory_format(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = [*TINY, "--section", "layers", "--sides", "freezekit,freezekit_channels_last", "--json", str(path)]
    assert compare.main(arguments, Console(quiet=True)) == 0
    rows = {(r.case, r.regime, r.side): r for r in map(Measured.from_dict, document.read(path)["rows"])}
    assert len(rows) == 8 * 4
    for (case, regime, side), row in rows.items():
        stock = "stock_channels_last" if side == "freezekit_channels_last" else "stock"
        ratio = row.time.median / rows[case, regime, stock].time.median
        assert row.ratio is not None
        assert row.ratio.median == pytest.approx(ratio), (case, side)  # one round: the ratio is that of the times


class Refuses(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("planted\nsecond line")


def test_a_side_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sides.SIDES, "checkpoint", sides.Side("checkpoint", Refuses))
    path, console = tmp_path / "out.json", Console(record=True, width=200)
    arguments = [*TINY, "--section", "layers", "--sides", "freezekit,checkpoint", "--json", str(path)]
    assert compare.main(arguments, console) == 1
    rows = [Measured.from_dict(data) for data in document.read(path)["rows"]]
    assert {row.failure for row in rows if row.side == "checkpoint"} == {"RuntimeError: planted"}
    assert all(row.seconds is not None and not row.failure for row in rows if row.side != "checkpoint")
    text = console.export_text()
    assert "checkpoint" in text
    assert "FAILED: RuntimeError: planted" in text
    assert "8 rows FAILED" in text
    assert "4 of 4 FAILED" in text


def test_where_stock_fails_every_side_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sides.SIDES, "stock", sides.Side("stock", Refuses))
    settings = options.parse(TINY).settings
    case = sections.SECTIONS["layers"](settings)[0]()
    rows = measure(case, settings, Peaks(1.0, 1.0), HostClock())
    assert [(row.side, row.failure) for row in rows] == [
        ("stock", "RuntimeError: planted"),
        ("freezekit", "RuntimeError: planted"),
    ]


def test_the_file_is_written_after_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    real, measured = compare.measure, []

    def stopped(*arguments: Any) -> list[Measured]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.extend(real(*arguments)[:1])
        return measured[-1:]

    monkeypatch.setattr(compare, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare.main([*TINY, "--section", "layers", "--json", str(path)], Console(quiet=True))
    assert [Measured.from_dict(data) for data in document.read(path)["rows"]] == measured


def test_a_full_disk_costs_what_is_written_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "out.json", document.json.dumps
    known: list[int] = []

    def full(content: dict, **layout: int) -> str:
        if "rows" in content and layout:
            known.append(len(content["rows"]))
            if len(known) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(content, **layout)

    monkeypatch.setattr(document.json, "dumps", full)
    console = Console(record=True, width=200)
    assert compare.main([*TINY, "--section", "layers", "--json", str(path)], console) == 1
    assert len(known) > 4, "it goes on"
    assert len(document.read(path)["rows"]) == known[0]
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    said = console.export_text()
    assert f"FAILED: {path} is not written: No space left on device" in said
    assert "written: /" not in said


def test_a_case_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MemoryError("planted")

    def made(settings: Settings) -> list[Any]:
        first, second, *_ = layers.cases(settings)
        return [partial(lambda *arguments: refuse(), *first.args), second]

    monkeypatch.setitem(sections.SECTIONS, "layers", made)
    path = tmp_path / "out.json"
    assert compare.main([*TINY, "--section", "layers", "--json", str(path)], Console(quiet=True)) == 1
    result = document.read(path)
    assert len(result["rows"]) == 2
    assert "MemoryError: planted" in result["skipped"][-1]


def test_own_kernels_have_a_third_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "why_absent", lambda name, device: "")
    monkeypatch.setitem(sides.SIDES, "freezekit_native", sides.SIDES["freezekit"])
    console = Console(record=True, width=200)
    assert compare.main([*TINY, "--section", "kernels"], console) == 0
    text = console.export_text()
    assert "middle frozen, freezekit_native: 3 fprop, 2 dgrad, 2 wgrad" in text
    monkeypatch.setitem(sides.SIDES, "freezekit_native", sides.Side("freezekit_native", Refuses))
    console = Console(record=True, width=200)
    assert compare.main([*TINY, "--section", "kernels"], console) == 1
    assert console.export_text().count("freezekit_native: FAILED: RuntimeError: planted") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--all", "--section", "layers"], "every section is in it"),
        (["--layers", "resnet5"], "'resnet5' is none of resnet50"),
        (["--section", "layer"], "'layer' is none of kernels"),
        (["--sides", "stok"], "'stok' is none of stock"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--batch", "0"], "at least 1, got '0'"),
        (["--repeat", "few"], "at least 1, got 'few'"),
        (["--device", "tpu!"], "tpu!"),
        (["--device", "meta"], "must be cpu or cuda"),
        (["--json", "no/such/folder/out.json"], "no such folder"),
        (["--baseline", "no-such.json"], "no such file"),
        (["--baseline", str(ROOT / "bench" / "schema.json")], "were unexpected"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        options.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_as_a_script_from_anywhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "compare.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--baseline" in done.stdout
