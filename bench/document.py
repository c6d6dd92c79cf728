"""A run as one JSON document, and the check of such a document against `bench/schema.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.environment import Environment
from bench.measurement import Measurement
from bench.sections.kernels import Profiled
from bench.settings import Settings

VERSION = 2
SCHEMA = json.loads((Path(__file__).parent / "schema.json").read_text())

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


class NotThisSchema(ValueError):
    """A document is not what the schema says; the text names the place."""


def build(
    environment: Environment,
    settings: Settings,
    kernels: Iterable[Profiled],
    rows: Iterable[Measurement],
    skipped: Iterable[str],
) -> dict[str, Any]:
    """The document of a run."""
    document = {
        "version": VERSION,
        "environment": environment.to_dict(),
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
    plain = json.loads(json.dumps(document))
    validate(plain)
    return plain


def write(document: dict[str, Any], path: Path) -> None:
    """Writes the document, one row a line short of nothing: indented, so that two runs can be diffed."""
    path.write_text(json.dumps(document, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Reads and checks a document.

    Raises:
        NotThisSchema: if it is no JSON or not what the schema says.
    """
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise NotThisSchema(f"{path} is no JSON: {error}") from None
    validate(document)
    return document


def validate(value: Any, schema: dict[str, Any] | None = None, place: str = "$") -> None:
    """Checks a value against the part of JSON Schema that schema.json is written in.

    That part is: type, properties, required, additionalProperties, items, enum, minimum and $ref to $defs.

    Raises:
        NotThisSchema: at the first place that does not fit.
    """
    schema = SCHEMA if schema is None else schema
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    types = schema.get("type", [])
    allowed = [t for name in ([types] if isinstance(types, str) else types) for t in _TYPES[name]]
    if allowed and (not isinstance(value, tuple(allowed)) or (isinstance(value, bool) and bool not in allowed)):
        raise NotThisSchema(f"{place} must be {types}, got {value!r}")
    if "enum" in schema and value not in schema["enum"]:
        raise NotThisSchema(f"{place} must be one of {schema['enum']}, got {value!r}")
    if "minimum" in schema and value is not None and value < schema["minimum"]:
        raise NotThisSchema(f"{place} must be at least {schema['minimum']}, got {value!r}")
    if isinstance(value, dict):
        _validate_object(value, schema, place)
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            validate(item, schema["items"], f"{place}[{index}]")


def _validate_object(value: dict[str, Any], schema: dict[str, Any], place: str) -> None:
    missing = [name for name in schema.get("required", []) if name not in value]
    if missing:
        raise NotThisSchema(f"{place} lacks {', '.join(missing)}")
    properties = schema.get("properties", {})
    for name, item in value.items():
        if name in properties:
            validate(item, properties[name], f"{place}.{name}")
        elif isinstance(schema.get("additionalProperties"), dict):
            validate(item, schema["additionalProperties"], f"{place}.{name}")
        elif schema.get("additionalProperties") is False:
            raise NotThisSchema(f"{place} has an unknown {name!r}")
