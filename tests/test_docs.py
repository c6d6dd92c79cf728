"""What the documents and docstrings show runs, and prints what they say it prints.

The ```python blocks of a file run in one process, in order. A ```text block right after one is what it prints.
"""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n*```text\n(?P<output>.*?)^```\n)?", re.DOTALL | re.MULTILINE)
MARK = "=== end of block ==="


def blocks(path: Path) -> list[tuple[str, str | None]]:
    """(code, what it prints or None) for each Python block of a document."""
    return [(m["code"], m["output"]) for m in BLOCK.finditer(path.read_text())]


DOCUMENTS = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if p.exists() and blocks(p)]


CODE = re.compile(r"^```.*?^```\n", re.DOTALL | re.MULTILINE)
# A bound ("at most 16 MiB") was set, not measured.
MEASURED = re.compile(r"(?<!at most )(?<![\d.])\d[\d.]*\s?(ms|us|microseconds|MiB|GiB|GB/s|TFLOP/s|of stock)\b")
# What a measured figure has beside it: a date, a device, and a command.
ORIGIN = (r"20\d\d-\d\d-\d\d", r"\b(CPU|GPU|cores?|Xeon|H100|H200|A100)\b", r"`(python|pytest|make) [^`]+`")


def without_origin(text: str) -> list[str]:
    """Headings of the sections that give a measured figure and not where it comes from; code shows, and claims not."""
    sections = re.split(r"^(?=#)", CODE.sub("", text), flags=re.MULTILINE)
    claims = [section for section in sections if MEASURED.search(section)]
    return [claim.splitlines()[0] for claim in claims if not all(re.search(mark, claim) for mark in ORIGIN)]


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def test_blocks_are_found() -> None:
    assert ROOT / "docs" / "two_step.md" in DOCUMENTS
    text = "a\n```python\nprint(1)\n```\n\n```text\n1\n```\n```python\nx = 2\n```\n```sh\nls\n```\n"
    assert [m.groups() for m in BLOCK.finditer(text)] == [("print(1)\n", "1\n"), ("x = 2\n", None)]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_figures_name_command_device_and_date(path: Path) -> None:
    assert without_origin(path.read_text()) == []


def test_a_figure_without_origin_is_found() -> None:
    origin = "`make compare`, a CPU, 2026-01-01"
    text = f"# A\n12 ms, at most 9\n## B\n12 ms, {origin}\n## C\nat most 1.5 MiB\n## D\n`3 MiB` 2026-01-01 on a CPU\n"
    assert without_origin(text) == ["# A", "## D"]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", CODE.sub("", path.read_text())):
        assert (path.parent / target).exists(), target


def modules() -> list[str]:
    """Every module of the package whose source shows an example, command lines aside."""
    found = []
    for path in sorted((ROOT / "freezekit").rglob("*.py")):
        if ">>>" in path.read_text() and path.name != "__main__.py":
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    outcome = doctest.testmod(module)
    assert outcome.attempted
    assert not outcome.failed


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_document(path: Path, tmp_path: Path) -> None:
    found = blocks(path)
    script = tmp_path / f"{path.stem}_blocks.py"
    script.write_text("".join(f"{code}\nprint({MARK!r}, flush=True)\n" for code, _ in found))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.split(MARK)
    for (code, output), out in zip(found, printed, strict=False):
        if output is not None:
            assert lines(out) == lines(output), f"this block prints something else than the document says:\n{code}"
