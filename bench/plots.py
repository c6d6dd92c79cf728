"""Pictures of a run, readable in print: units on every axis, colours that colour-blind readers tell apart."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from bench.measure import Measured
from bench.report import MIB

# How each side looks: of Okabe and Ito's palette, for colour-blind readers, and in grey by marker, hatch and dash.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#999999")
_MARKERS = "osD^vP*Xh"
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--", "oo", "**")
_DASHES = ("-", "--", ":", "-.")
_ORDER = [
    *("stock", "freezekit", "freezekit_fused", "stock_channels_last"),
    *("stock_compiled", "memsave_torch", "checkpoint", "freezekit_native"),
]

plt.switch_backend("Agg")  # No window, so no display is needed.
plt.rcParams["font.size"] = 8


def _rank(side: str) -> int:
    if side not in _ORDER:
        _ORDER.append(side)
    return _ORDER.index(side) % len(_COLOURS)


def _line(side: str) -> dict[str, Any]:
    """Keywords of a line: later sides are thinner, so that both lines are seen where one covers the other."""
    rank = _rank(side)
    look = {"color": _COLOURS[rank], "marker": _MARKERS[rank], "ls": _DASHES[rank % len(_DASHES)], "label": side}
    return {**look, "lw": max(3.0 - 0.35 * rank, 0.8), "ms": max(8.0 - rank, 3.0)}


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the run's rows allow into `folder` (made if need be), PNG files; returns their paths.

    Pictures: layer ratios, training steps by regime, peak memory by frozen depth, scaling, and the roofline.
    """
    folder.mkdir(exist_ok=True)
    rows = [row for row in map(Measured.from_dict, document["rows"]) if not row.failure]
    pictures: list[tuple[str, Figure]] = []
    layers = [row for row in rows if row.section == "layers"]
    for group, regime, part in dict.fromkeys((row.group, row.regime, row.part) for row in layers):
        chosen = [row for row in layers if (row.group, row.regime, row.part) == (group, regime, part)]
        name = f"layers-{group}-{regime}-{part}".replace(" ", "-")
        pictures += _layer_pages(chosen, name, f"{group}, {regime}, {part}")
    for section, name, drawn in (
        ("models", "regimes", _regimes),
        ("memory", "memory", _memory),
        ("scaling", "scaling", _scaling),
    ):
        if chosen := [row for row in rows if row.section == section]:
            pictures.append((name, drawn(chosen)))
    if any(row.tflops for row in layers):
        pictures.append(("roofline", _roofline(layers, document["environment"]["peaks"])))
    written, e = [], document["environment"]
    made_by = f"torch {e['torch']}, freezekit {e['freezekit']} ({e['commit']}), {e['date']}"
    caption = f"{e['device']}, {document['settings']['dtype']}, {made_by}"
    for name, figure in pictures:
        figure.text(0.995, 0.005, caption, ha="right", va="bottom", fontsize=6, color="#444444")
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=160)
        plt.close(figure)
        written.append(path)
    return written


def _sides(rows: Iterable[Measured]) -> list[str]:
    return list(dict.fromkeys(row.side for row in rows))


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Room is left at the foot for the caption."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0, 0.03, 1, 0.97))
    return figure, list(axes[0])


def _bars(
    axis: Axes, labels: list[str], sides: list[str], value: Callable[[str, str], tuple[float, float, float] | None]
) -> None:
    """Horizontal bars, a group for each label; `value` gives length and the two whiskers' ends."""
    height = 0.8 / len(sides)
    for index, side in enumerate(sides):
        for place, label in enumerate(labels):
            found = value(label, side)
            if found is None:
                continue
            middle, low, high = found
            axis.barh(
                place + (index - (len(sides) - 1) / 2) * height,
                middle,
                height * 0.92,
                xerr=[[max(middle - low, 0)], [max(high - middle, 0)]] if high > low else None,
                color=_COLOURS[_rank(side)],
                hatch=_HATCHES[_rank(side)],
                edgecolor="white",
                error_kw={"lw": 0.8, "capsize": 1.5},
                label=side if place == 0 else None,
            )
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(axis="x", lw=0.4)
    axis.set_axisbelow(True)


def _layer_pages(rows: list[Measured], name: str, title: str) -> list[tuple[str, Figure]]:
    """A picture for every 20 layers: more on a page could not be read."""
    layers = list(dict.fromkeys((row.case, row.detail) for row in rows))
    pages = [layers[start : start + 20] for start in range(0, len(layers), 20)]
    pictures = []
    for number, page in enumerate(pages, 1):
        place, of = ("", "") if len(pages) == 1 else (f"-{number}", f", {number} of {len(pages)}")
        chosen = [row for row in rows if (row.case, row.detail) in page]
        pictures.append((f"{name}{place}", _layer_ratios(chosen, f"{title}{of}")))
    return pictures


def _layer_ratios(rows: list[Measured], title: str) -> Figure:
    by_key = {(f"{row.case}  {row.detail}", row.side): row for row in rows}
    labels = list(dict.fromkeys(label for label, _ in by_key))
    sides = [side for side in _sides(rows) if side != "stock"]

    def value(label: str, side: str) -> tuple[float, float, float] | None:
        row = by_key.get((label, side))
        return (row.ratio.median, row.ratio.low, row.ratio.high) if row and row.ratio else None

    figure, (axis,) = _figure(8, 1.6 + 0.24 * len(labels) * max(1, len(sides) * 0.6))
    _bars(axis, labels, sides, value)
    axis.axvline(1, color="black", lw=0.9)
    medians = [row.ratio.median for row in rows if row.ratio]
    limit = min(max(1.25, 1.15 * max(medians)), 3)
    axis.set_xlim(0, limit)
    for bar in axis.patches:
        if isinstance(bar, Rectangle) and (length := bar.get_width()) > limit:  # The bar says how far it goes.
            middle = bar.get_y() + bar.get_height() / 2
            axis.text(limit, middle, f"{length:.2f} ", ha="right", va="center", fontsize=6, backgroundcolor="white")
    axis.set_xlabel("time / stock's time (below 1 is faster; whiskers: quartiles)")
    axis.set_title(title, fontsize=10)
    figure.legend(loc="outside upper right", fontsize=7, ncols=len(sides))
    return figure


def _regimes(rows: list[Measured]) -> Figure:
    labels, sides = list(dict.fromkeys(row.regime for row in rows)), _sides(rows)
    by_key = {(row.regime, row.side): row for row in rows}

    def seconds(label: str, side: str) -> tuple[float, float, float] | None:
        row = by_key.get((label, side))
        return (row.time.median * 1e3, row.time.low * 1e3, row.time.high * 1e3) if row else None

    def peak(label: str, side: str) -> tuple[float, float, float] | None:
        row = by_key.get((label, side))
        return (row.peak_bytes / MIB,) * 3 if row and row.peak_bytes is not None else None

    figure, (left, right) = _figure(9, 1.8 + 0.3 * len(labels) * max(1, len(sides) * 0.6), 2)
    _bars(left, labels, sides, seconds)
    left.set_xlabel("training step, ms (whiskers are quartiles)")
    _bars(right, labels, sides, peak)
    right.set_yticklabels([])
    right.set_xlabel("peak memory of a step, MiB")
    figure.suptitle(f"{rows[0].group}, {rows[0].detail}", fontsize=10, x=0.35)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", fontsize=7, ncols=min(len(sides), 4))
    return figure


def _memory(rows: list[Measured]) -> Figure:
    figure, (left, right) = _figure(9, 3.6, 2)
    for side in _sides(rows):
        mine = sorted((row for row in rows if row.side == side), key=lambda row: row.x or 0)
        for axis, name in ((left, "peak_bytes"), (right, "bytes_kept")):
            known = [(row.x, getattr(row, name) / MIB) for row in mine if getattr(row, name) is not None]
            axis.plot(*zip(*known, strict=True), **_line(side))
    for axis, name in ((left, "peak memory of a step, MiB"), (right, "kept for the backward pass, MiB")):
        axis.set_xlabel("frozen parts, counted from the end (input learns)")
        axis.set_ylabel(name)
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.grid(lw=0.4)
    figure.suptitle(f"{rows[0].group}, {rows[0].detail}", fontsize=10)
    left.legend(fontsize=7)
    return figure


def _scaling(rows: list[Measured]) -> Figure:
    groups = list(dict.fromkeys(row.group for row in rows))
    figure, axes = _figure(4.5 * len(groups), 3.6, len(groups))
    for axis, group in zip(axes, groups, strict=True):
        for side in _sides(rows):
            mine = [row for row in rows if row.side == side and row.group == group and row.x is not None]
            middle = [row.time.median * 1e3 for row in mine]
            errors = [
                [(row.time.median - row.time.low) * 1e3 for row in mine],
                [(row.time.high - row.time.median) * 1e3 for row in mine],
            ]
            x = [row.x or 0 for row in mine]
            axis.errorbar(x, middle, errors, **_line(side), elinewidth=0.8, capsize=2)
        unit = "images" if group.endswith("by batch") else "pixels (height and width)"
        axis.set_xlabel(f"{group.split(' by ')[-1]}, {unit}")
        axis.set_ylabel("training step, ms")
        axis.set_xticks(sorted({row.x for row in rows if row.group == group and row.x is not None}))
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.grid(lw=0.4)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{groups[0].split(' by ')[0]}, {rows[0].regime}", fontsize=10)
    return figure


def _roofline(rows: list[Measured], peaks: dict[str, float]) -> Figure:
    """Arithmetic intensity is of the mathematics: each tensor moved once."""
    figure, (axis,) = _figure(7, 4.6)
    intensities = []
    for side in _sides(rows):
        mine = [row for row in rows if row.side == side and row.tflops and row.gbs]
        x = [row.tflops * 1e3 / row.gbs for row in mine if row.tflops and row.gbs]
        y = [row.tflops or 0 for row in mine]
        intensities += x
        axis.scatter(
            x, y, s=16, color=_COLOURS[_rank(side)], marker=_MARKERS[_rank(side)], alpha=0.75, label=side, lw=0
        )
    ends = [min(intensities) / 1.5, max(*intensities, peaks["tflops"] * 1e3 / peaks["gbs"]) * 1.5]
    knee = peaks["tflops"] * 1e3 / peaks["gbs"]
    line = sorted({*ends, min(max(knee, ends[0]), ends[1])})
    axis.plot(line, [min(peaks["tflops"], i * peaks["gbs"] / 1e3) for i in line], color="black", lw=1, label="roofline")
    axis.set_xscale("log")
    axis.set_yscale("log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(FormatStrFormatter("%g"))
        scale.set_minor_formatter(NullFormatter())
    axis.set_xlabel("arithmetic intensity, FLOP / byte")
    axis.set_ylabel("rate, TFLOP/s")
    axis.grid(lw=0.4, which="both", alpha=0.6)
    axis.set_title(
        f"layers against the measured peaks: {peaks['tflops']:.3g} TFLOP/s, {peaks['gbs']:.3g} GB/s", fontsize=10
    )
    axis.legend(fontsize=7)
    return figure
