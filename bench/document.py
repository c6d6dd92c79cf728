"""A run as a JSON document, which `bench/schema.json` describes."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.environment import Environment
from bench.measure import Measured
from bench.sections.kernels import Profiled
from bench.settings import Settings

VERSION = 3
SCHEMA = json.loads((Path(__file__).parent / "schema.json").read_text())


class NotThisSchema(ValueError):
    """A document that schema.json does not describe; the text names the place."""


def build(
    environment: Environment,
    settings: Settings,
    kernels: Iterable[Profiled],
    rows: Iterable[Measured],
    skipped: Iterable[str],
) -> dict[str, Any]:
    """The document of a run, finished or not."""
    document = {
        "version": VERSION,
        "environment": asdict(environment),
        "settings": {
            "device": str(settings.device),
            "dtype": str(settings.dtype).removeprefix("torch."),
            "batch": settings.batch,
            "seed": settings.seed,
            "cold": settings.cold,
            "quick": settings.quick,
            "sides": list(settings.sides),
            "parts": list(settings.parts),
            "layers": list(settings.layer_lists),
        },
        "kernels": [profiled.to_dict() for profiled in kernels],
        "rows": [row.to_dict() for row in rows],
        "skipped": list(skipped),
    }
    return json.loads(json.dumps(document))


def write(document: dict[str, Any], path: Path) -> None:
    """Replaces the file in one step: it is whole whenever a run ends. Indented, so that two runs can be diffed."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def keep(document: dict[str, Any], path: Path) -> str:
    """The same while a run is under way, which a full disk must not end: why the file is not written, or nothing."""
    try:
        write(document, path)
    except OSError as error:
        return f"FAILED: {path} is not written: {error.strerror}"
    return ""


def read(path: Path) -> dict[str, Any]:
    """Reads and checks a document.

    Raises:
        NotThisSchema: if it is no JSON, or JSON of another kind.
    """
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise NotThisSchema(f"{path} is no JSON: {error}") from None
    validate(document)
    return document


def validate(document: Any) -> None:
    """Checks a document against schema.json; not where jsonschema is missing, as it may be beside a GPU.

    Raises:
        NotThisSchema: naming the place that fits least.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match
    except ImportError:
        return
    error = best_match(Draft202012Validator(SCHEMA).iter_errors(document))
    if error is not None:
        raise NotThisSchema(f"{error.json_path}: {error.message}")
