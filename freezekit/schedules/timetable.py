"""A schedule laid out before the training: a table, plain data, a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from freezekit._showing import Shown, console_for, figure

from .base import compile_entries

if TYPE_CHECKING:
    from rich.console import Console

Spans = Mapping[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Timetable(Shown):
    """What is frozen when.

    Attributes:
        title: one line.
        total_steps: length of the training.
        sizes: layer -> number of its parameters, first layer first.
        spans: layer -> the ``(from, to)`` steps between which it is frozen; a layer that never is may be missing.
        curves: layer -> ``(step, value)`` points to plot above, and what they are (``curves_label``); may be empty.
        threshold: a line to draw across the curves, or None.
    """

    title: str
    total_steps: int
    sizes: Mapping[str, int]
    spans: Spans
    curves: Mapping[str, list[tuple[float, float]]] = field(default_factory=dict)
    curves_label: str = ""
    threshold: float | None = None

    @property
    def stages(self) -> list[tuple[int, tuple[str, ...]]]:
        """``(step, layers that are frozen from then on)``, from step 0, one entry for each change."""
        steps = sorted({0, *(s for spans in self.spans.values() for span in spans for s in span)})
        found: list[tuple[int, tuple[str, ...]]] = []
        for step in steps:
            held = tuple(n for n in self.sizes if any(a <= step < b for a, b in self.spans.get(n, ())))
            if step < self.total_steps and (not found or found[-1][1] != held):
                found.append((step, held))
        return found

    def compile_entries(self, *, validation: bool = True) -> int:
        """Versions that torch.compile makes, validation under ``no_grad`` counted or not; a frozen set that comes again
        finds its version."""
        return compile_entries(len({held for _, held in self.stages}) - 1, validation=validation)

    def trainable(self, held: tuple[str, ...]) -> float:
        """Share of the scheduled parameters that still train when these layers are frozen."""
        return sum(n for name, n in self.sizes.items() if name not in held) / sum(self.sizes.values())

    def print(self, console: Console | None = None) -> None:
        """Print a row for each stage, and what torch.compile will make of it."""
        import torch._dynamo
        from rich.table import Table
        from rich.text import Text

        console = console_for(console)
        table = Table(title=self.title, title_justify="left")
        for column in ("from step", "freezes", "thaws", "layers frozen", "parameters that train"):
            table.add_column(column)
        before: tuple[str, ...] = ()
        for step, held in self.stages:
            new, old = [n for n in held if n not in before], [n for n in before if n not in held]
            row = (f"{step}", ", ".join(new) or "-", ", ".join(old) or "-", f"{len(held)} of {len(self.sizes)}")
            table.add_row(*map(Text, (*row, f"{self.trainable(held):.0%}")))
            before = held
        console.print(table)
        plain, full = self.compile_entries(validation=False), self.compile_entries()
        limit = torch._dynamo.config.recompile_limit
        verdict = "within" if full <= limit else "BEYOND"
        console.print(f"torch.compile: {plain} versions in training, {full} with a no_grad validation pass in each "
                      f"stage; {verdict} its limit of {limit}", highlight=False)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data: ``title``, ``total_steps``, ``stages`` and ``compile_entries``."""
        stages = [{"step": s, "frozen": list(held), "trainable": self.trainable(held)} for s, held in self.stages]
        entries = {"training": self.compile_entries(validation=False), "with_validation": self.compile_entries()}
        return {"title": self.title, "total_steps": self.total_steps, "stages": stages, "compile_entries": entries}

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the plan to an image file (its suffix gives the format).

        Below, one bar per layer: blue while it trains, grey while it is frozen. Above, the curves, if there are any.

        Raises:
            ImportError: matplotlib is not installed (``pip install freezekit[plot]``).
        """
        names = list(self.sizes)
        height = min(1.6 + 0.28 * len(names), 14.0)
        made = figure(9, height + (2.6 if self.curves else 0))
        if self.curves:
            upper, lower = made.subplots(2, 1, sharex=True, height_ratios=[2.6, height])
            self._draw_curves(upper)
        else:
            lower = made.subplots()
        for row, name in enumerate(names):
            lower.barh(row, self.total_steps, color="#4c78a8", height=0.8)
            for a, b in self.spans.get(name, ()):
                lower.barh(row, b - a, left=a, color="#d9d9d9", height=0.8)
        lower.set_yticks(range(len(names)), names, fontsize=8 if len(names) <= 40 else 4)
        lower.invert_yaxis()
        lower.set_xlim(0, self.total_steps)
        lower.set_xlabel("step")
        lower.set_ylabel("layer, first on top")
        for step, _ in self.stages[1:]:
            lower.axvline(step, color="#444444", linewidth=0.8, linestyle=":")
        made.suptitle(f"{self.title} (blue: trains, grey: frozen)", fontsize=11)
        made.savefig(path, dpi=120)

    def _draw_curves(self, axes: Any) -> None:
        from matplotlib import colormaps

        shades = colormaps["viridis"]
        for i, (name, points) in enumerate(self.curves.items()):
            shade = shades(i / max(1, len(self.curves) - 1))
            axes.plot([p[0] for p in points], [p[1] for p in points], color=shade, linewidth=1.2, label=name)
        if self.threshold is not None:
            axes.axhline(self.threshold, color="#c00000", linewidth=0.9, linestyle="--", label="threshold")
            axes.set_yscale("log")
        axes.set_ylabel(self.curves_label)
        if len(self.curves) <= 12:
            axes.legend(fontsize=7, ncols=2)
