"""How each side looks in every picture: distinct to colour-blind readers, and in grey by marker, hatch and dash."""

from __future__ import annotations

from typing import Any

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#999999")
_MARKERS = "osD^vP*Xh"
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--", "oo", "**")
_DASHES = ("-", "--", ":", "-.")
_ORDER = [
    *("stock", "freezekit", "freezekit_fused", "stock_channels_last"),
    *("stock_compiled", "memsave_torch", "checkpoint", "freezekit_native"),
]


def _rank(side: str) -> int:
    if side not in _ORDER:
        _ORDER.append(side)
    return _ORDER.index(side) % len(_COLOURS)


def colour(side: str) -> str:
    """Of Okabe and Ito's palette."""
    return _COLOURS[_rank(side)]


def marker(side: str) -> str:
    """A matplotlib marker."""
    return _MARKERS[_rank(side)]


def hatch(side: str) -> str:
    """A matplotlib hatch."""
    return _HATCHES[_rank(side)]


def line(side: str) -> dict[str, Any]:
    """Keywords of a line: later sides are thinner, so that both lines are seen where one covers the other."""
    rank = _rank(side)
    return {
        "color": colour(side),
        "marker": marker(side),
        "ls": _DASHES[rank % len(_DASHES)],
        "lw": max(3.0 - 0.35 * rank, 0.8),
        "ms": max(8.0 - rank, 3.0),
        "label": side,
    }
