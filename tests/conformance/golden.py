"""Golden vectors: what a GPU gave to every probe, kept in the tree so that the emulator can be held to it.

One .npz file: "<probe>/<array>" holds the results, "about" a JSON text that says which GPU gave them, when, and a
digest of each probe's inputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .probe import Arrays, Probe, differences, digest

FILE = Path(__file__).with_name("golden.npz")


def save(path: Path, about: dict[str, Any], results: dict[str, Arrays], probes: list[Probe]) -> None:
    """Writes the results of the probes that gave any; replaces the file in one step, so no sudden end spoils it."""
    about = {**about, "inputs": {p.name: digest(p.inputs()) for p in probes if p.name in results}}
    flat = {f"{name}/{key}": array for name, arrays in results.items() for key, array in arrays.items()}
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:  # numpy would add its own suffix to a name
            np.savez_compressed(file, about=np.array(json.dumps(about, sort_keys=True)), **flat)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def load(path: Path) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """What `save` wrote: about, and the results by probe."""
    results: dict[str, Arrays] = {}
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        for key in file.files:
            if key != "about":
                name, array = key.split("/")
                results.setdefault(name, {})[array] = file[key]
    return about, results


def against_golden(probe: Probe, actual: Arrays, about: dict[str, Any], golden: dict[str, Arrays]) -> list[str]:
    """How results differ from those that a GPU gave, a sentence each; bounds hold as they do for the formulas.

    Two results within a bound of the exact value are within twice the bound of each other.
    """
    if probe.name not in golden:
        return [f"{probe.name}: no GPU has given golden vectors for it"]
    inputs = probe.inputs()
    if about["inputs"].get(probe.name) != digest(inputs):
        return [f"{probe.name}: its inputs are not those that the golden vectors were made from"]
    bound = {name: 2 * limit for name, limit in probe.bound(inputs).items()}
    return differences(actual, golden[probe.name], bound)
