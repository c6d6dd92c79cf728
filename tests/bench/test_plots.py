"""Pictures of a run: drawn whole, no text beyond the edge, nothing without a unit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import matplotlib.pyplot as plt

from bench import plots
from bench.measure import Measured
from bench.timing import Spread
from tests.bench.test_document import VALID

BASE = Measured(
    "layers",
    "resnet50",
    "layer3.0.downsample",
    "512x28x28 -> 1024, 1x1 /2",
    "frozen",
    "step",
    "stock",
    1,
    15,
    Spread(2e-3, 1e-3, 3e-3),
    Spread(1.0, 1.0, 1.0),
    0.0,
    tflops=0.1,
    gbs=3.0,
    roofline=0.5,
    bytes_kept=1 << 20,
    peak_bytes=3 << 20,
    kernels=2,
)
OURS = {"side": "freezekit", "ratio": Spread(0.9, 0.8, 1.1), "bytes_kept": 0}
ROWS = [
    row
    for stock in (
        BASE,
        replace(BASE, section="models", regime="all frozen, input learns", tflops=None, gbs=None, roofline=None),
        *(replace(BASE, section="memory", regime=f"last {d} of 8 frozen", x=float(d)) for d in (0, 4, 8)),
        *(replace(BASE, section="scaling", group="small ResNet by batch", x=float(b)) for b in (1, 2)),
        *(replace(BASE, section="scaling", group="small ResNet by image size", x=float(s)) for s in (32, 64)),
    )
    for row in (stock, replace(stock, **OURS))
]
DOCUMENT = {**VALID, "rows": [row.to_dict() for row in ROWS]}


def test_pictures_of_every_kind(tmp_path: Path) -> None:
    written = plots.draw(DOCUMENT, tmp_path / "new")
    names = ["layers-resnet50-frozen-step", "regimes", "memory", "scaling", "roofline"]
    assert [path.stem for path in written] == names
    for path in written:
        picture = plt.imread(path)
        edge = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
        assert all((side[..., :3] == 1).all() for side in edge), f"{path.name} is clipped"
        assert (picture[..., :3] < 0.5).any()


def test_axes_have_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []
    monkeypatch.setattr(plt, "close", lambda figure: labels.extend(a.get_xlabel() for a in figure.axes))
    plots.draw(DOCUMENT, tmp_path)
    assert labels
    assert all(
        any(unit in label for unit in ("ms", "MiB", "FLOP", "stock's", "images", "pixels", "parts")) for label in labels
    )


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert plots.draw({**DOCUMENT, "rows": []}, tmp_path) == []
