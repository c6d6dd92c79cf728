"""How reports are shown: as JSON, on a terminal, as a picture, and with counts as people read them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

BLUE, ORANGE = "#0072B2", "#D55E00"  # of the Okabe-Ito palette: told apart by colour-blind readers, and in grey


class Shown:
    """A report that gives plain data by `to_dict`."""

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict())


def console_for(given: Console | None) -> Console:
    """`given`, or the terminal; where output goes elsewhere, 140 columns, so that tables stay readable."""
    from rich.console import Console  # Here, so that `import freezekit` needs no rich and does not wait for it.

    console = given or Console()
    return console if given or console.is_terminal else Console(width=140)


def figure(width: float, height: float) -> Any:
    """A matplotlib figure without axes, drawn without a display.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install freezekit[plot]") from error
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def bytes_text(count: int) -> str:
    """
    >>> bytes_text(0), bytes_text(1536), bytes_text(3 << 30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def flops_text(count: int) -> str:
    """
    >>> flops_text(640), flops_text(1_234_000), flops_text(4_100_000_000)
    ('640 FLOP', '1.23 MFLOP', '4.1 GFLOP')
    """
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count} FLOP"
