"""The schema refuses what it does not describe, and says where."""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bench import document
from bench.document import SCHEMA, NotThisSchema
from bench.measure import Measured
from bench.timing import Spread
from freezekit.profiling import KernelRow

LABELS = ("layers", "tiny", "dense", "8x12x12", "frozen", "step", "stock")
ROW = Measured(*LABELS, 1, 15, Spread(2.0, 1.0, 3.0), Spread(1.0, 1.0, 1.0), 0.0)
FAILED = Measured(*LABELS, 1, 0, None, None, None, failure="RuntimeError: planted")
VALID: dict[str, Any] = {
    "version": 3,
    "environment": {
        "device": "CPU",
        "threads": 2,
        "libraries": "",
        "torch": "2.13.0",
        "freezekit": "0.1.0",
        "python": "3.11",
        "commit": "abc",
        "date": "2026-01-01",
        "peaks": {"tflops": 1.0, "gbs": 10},
    },
    "settings": {
        "device": "cpu",
        "dtype": "float32",
        "batch": None,
        "seed": 0,
        "cold": True,
        "quick": False,
        "sides": ["stock"],
        "parts": ["step"],
        "layers": [],
    },
    "kernels": [{"regime": "all trainable", "side": "stock", "counts": {"dgrad": 2}, "kernels": [], "failure": ""}],
    "rows": [ROW.to_dict()],
    "skipped": [],
}


def test_valid_document() -> None:
    document.validate(VALID)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 1, r"\$.version: 1 is not one of \[3\]"),
        (("rows", 0, "section"), "layer", r"\$.rows\[0\].section: 'layer' is not one of"),
        (("rows", 0, "count"), 0, r"count: 0 is less than the minimum of 1"),
        (("rows", 0, "count"), True, r"count: True is not of type 'integer'"),
        (("rows", 0, "seconds"), {"median": 1.0, "low": 1.0}, r"\$.rows\[0\].seconds: 'high' is a required property"),
        (("rows", 0, "speed"), 3, r"\$.rows\[0\]: .*'speed' was unexpected"),
        (("environment", "peaks", "tflops"), "fast", r"\$.environment.peaks.tflops: 'fast' is not of type 'number'"),
        (("kernels", 0, "counts", "dgrad"), -1, r"dgrad: -1 is less than the minimum of 0"),
        (("skipped",), "nothing", r"\$.skipped: 'nothing' is not of type 'array'"),
    ],
)
def test_broken_documents(path: tuple[str | int, ...], value: Any, message: str) -> None:
    broken: Any = copy.deepcopy(VALID)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(NotThisSchema, match=message):
        document.validate(broken)


def test_no_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(NotThisSchema, match="is no JSON"):
        document.read(path)


@pytest.mark.parametrize(("name", "kind"), [("row", Measured), ("kernel", KernelRow)])
def test_schema_names_every_field(name: str, kind: type) -> None:
    names = {field.name for field in fields(kind)}
    assert set(SCHEMA["$defs"][name]["properties"]) == names
    assert set(SCHEMA["$defs"][name]["required"]) == names


@pytest.mark.parametrize("row", [ROW, FAILED])
def test_row_survives_the_round_trip(row: Measured) -> None:
    assert Measured.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_a_failed_row_is_valid() -> None:
    document.validate({**VALID, "rows": [FAILED.to_dict()]})


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    document.write(VALID, path)
    document.write({**VALID, "rows": []}, path)
    assert document.read(path)["rows"] == []
    assert list(tmp_path.iterdir()) == [path]
