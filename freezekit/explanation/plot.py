"""Pictures of explanations and plans; the only part that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLUE, ORANGE = "#0072B2", "#D55E00"  # of the Okabe-Ito palette: told apart by colour-blind readers, and in grey


def figure(width: float, height: float) -> Any:
    """A matplotlib figure with one set of axes, drawn without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install freezekit[plot]") from error
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def plot_bytes(rows: Sequence[tuple[str, int]], path: Path) -> None:
    """Bars of the bytes that each row, given by its name, keeps: in MiB, from top to bottom."""
    made = figure(8, max(2.0, 0.22 * len(rows) + 1))
    axes = made.subplots()
    axes.barh(range(len(rows)), [count / 2**20 for _, count in rows], color=BLUE)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("kept for backward [MiB]")
    axes.set_title(f"{sum(count for _, count in rows) / 2**20:.1f} MiB kept between forward and backward")
    made.savefig(path, dpi=150)
