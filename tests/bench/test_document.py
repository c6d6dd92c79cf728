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
from bench.measurement import Measurement
from bench.timing import Spread
from freezekit.profiling import KernelRow

LABELS = ("layers", "tiny", "dense", "8x12x12", "frozen", "step", "stock")
ROW = Measurement(*LABELS, 1, 15, Spread(2.0, 1.0, 3.0), Spread(1.0, 1.0, 1.0), 0.0)
VALID: dict[str, Any] = {
    "version": 2,
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
    "kernels": [{"regime": "all trainable", "side": "stock", "counts": {"dgrad": 2}, "kernels": []}],
    "rows": [ROW.to_dict()],
    "skipped": [],
}


def test_valid_document() -> None:
    document.validate(VALID)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 1, r"\$.version must be one of \[2\]"),
        (("rows", 0, "section"), "layer", r"\$.rows\[0\].section must be one of"),
        (("rows", 0, "count"), 0, "at least 1"),
        (("rows", 0, "count"), True, "must be integer"),
        (("rows", 0, "seconds"), {"median": 1.0, "low": 1.0}, r"\$.rows\[0\].seconds lacks high"),
        (("rows", 0, "speed"), 3, "unknown 'speed'"),
        (("environment", "peaks", "tflops"), "fast", r"\$.environment.peaks.tflops must be number"),
        (("kernels", 0, "counts", "dgrad"), -1, "at least 0"),
        (("skipped",), "nothing", r"\$.skipped must be array"),
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


@pytest.mark.parametrize(("name", "kind"), [("row", Measurement), ("kernel", KernelRow)])
def test_schema_names_every_field(name: str, kind: type) -> None:
    names = {field.name for field in fields(kind)}
    assert set(SCHEMA["$defs"][name]["properties"]) == names
    assert set(SCHEMA["$defs"][name]["required"]) == names


def test_row_survives_the_round_trip() -> None:
    assert Measurement.from_dict(json.loads(json.dumps(ROW.to_dict()))) == ROW
