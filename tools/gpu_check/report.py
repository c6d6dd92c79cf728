"""The folder of results: summary.json, summary.md, log.txt, and what the steps themselves put there."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .machine import Host
from .step import Outcome

# All that steps and this module write.
FILES = ("summary.json", "summary.md", "log.txt", "golden.npz", "layers.json", "tiles.json", "compare.json")
PART = ".part"  # of a file's name while it is written, here and by the steps
MOST_FILES = 8
MOST_BYTES = 16 << 20


def row(machine: Host, outcomes: Sequence[Outcome], command: str) -> str:
    """A row of the table in docs/hardware.md."""
    bad = [f"{o.step} {o.result}: {o.said}" for o in outcomes if o.result != "passed"]
    passed = sum(o.result == "passed" for o in outcomes)
    emulated = "" if machine.device else "emulated, which says nothing of hardware: "
    result = f"{emulated}{passed} of {len(outcomes)} steps passed" + "".join(f"; {text}" for text in bad)
    cells = [machine.date, machine.device or "no CUDA device", machine.driver]
    cells += [f"{machine.torch} / {machine.cuda}", machine.commit, f"`{command}`", result]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def readable(machine: Host, outcomes: Sequence[Outcome], command: str) -> str:
    """For people; the row can be pasted as it is."""
    lines = ["# gpu-check", "", row(machine, outcomes, command), ""]
    facts = f"nvcc {machine.nvcc}, Python {machine.python}, {machine.cores} cores"
    lines += [f"{facts}; {sum(o.seconds for o in outcomes):.0f} s in all.", ""]
    lines += ["| step | result | seconds | said |", "| --- | --- | --- | --- |"]
    for o in outcomes:
        lines.append(f"| {o.step} | {o.result} | {o.seconds:.0f} | {o.said.replace('|', '/')} |")
    return "\n".join([*lines, ""])


def write(folder: Path, machine: Host, outcomes: Sequence[Outcome], command: str) -> None:
    """Writes the three files. Called after every step, so that an end from outside leaves what was known.

    Each is replaced in one step: a write that fails leaves the one before.
    """
    steps = [{"step": o.step, "result": o.result, "seconds": round(o.seconds, 1), "said": o.said} for o in outcomes]
    summary = {"machine": asdict(machine), "command": command, "steps": steps}
    log = "".join(f"===== {o.step}: {o.result}\n{o.log.rstrip()}\n\n" for o in outcomes)
    texts = {
        "summary.json": json.dumps(summary, indent=1) + "\n",
        "summary.md": readable(machine, outcomes, command),
        "log.txt": log,
    }
    for unfinished in folder.glob(f"*{PART}"):  # of a step that was ended
        unfinished.unlink()
    for name, text in texts.items():
        part = folder / (name + PART)
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(folder / name)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def empty(folder: Path) -> bool:
    """Makes the folder, without results of an earlier check; False, and nothing done, if anything else is there."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    if any(path.name.removesuffix(PART) not in FILES for path in found) or (folder.exists() and not folder.is_dir()):
        return False
    for path in found:
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return True


def check_size(folder: Path) -> str:
    """What is wrong with the folder's size, or nothing."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    if len(files) > MOST_FILES:
        return f"{len(files)} files of results, at most {MOST_FILES} are allowed"
    return f"{total} bytes of results, at most {MOST_BYTES} are allowed" if total > MOST_BYTES else ""
