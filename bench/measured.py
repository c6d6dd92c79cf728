"""One measurement: the record that tables, JSON, plots and comparisons of two runs share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bench.timing import Spread


@dataclass(frozen=True)
class Measured:
    """One side of one case. `bench/schema.json` says the same of its JSON form.

    Attributes:
        section: "layers", "blocks", "models", "memory" or "scaling".
        group: the layer list or network that the case belongs to.
        case: the layer, block or network.
        detail: its shape.
        regime: what is trainable.
        part: what was timed: "step", "fprop", "dgrad" or "wgrad".
        side: "stock", "freezekit" or another competitor.
        count: how often the case occurs in its group.
        rounds: how many values `seconds` and `ratio` are medians of.
        seconds: of one call.
        ratio: to the time of the side's reference, round by round: stock in the same memory format.
        error: largest difference from stock as a fraction of what rounding explains; at most 1.
        tflops, gbs: arithmetic and least memory traffic of the mathematics over the time; None where unknown.
        roofline: the least time that the device's measured peaks allow over the time.
        bytes_kept: for the backward pass, parameters not counted; None where there is no backward pass.
        peak_bytes: most bytes held during the step beyond those held before it.
        kernels: kernels launched by one call, or operators called on a CPU.
        x: where the case stands on a plot's axis (frozen layers, batch, image size); None elsewhere.
        failure: why there is no figure: the side raised an error or computed other values than stock; "" otherwise.
    """

    section: str
    group: str
    case: str
    detail: str
    regime: str
    part: str
    side: str
    count: int
    rounds: int
    seconds: Spread | None
    ratio: Spread | None
    error: float | None
    tflops: float | None = None
    gbs: float | None = None
    roofline: float | None = None
    bytes_kept: int | None = None
    peak_bytes: int | None = None
    kernels: int | None = None
    x: float | None = None
    failure: str = ""

    @property
    def time(self) -> Spread:
        """`seconds`, of a row that has figures."""
        assert self.seconds is not None, self.failure
        return self.seconds

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies this measurement in another run."""
        return (self.section, self.group, self.case, self.detail, self.regime, self.part, self.side)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Measured:
        """The reverse of :meth:`to_dict`."""
        spreads = {name: Spread(**data[name]) if data[name] else None for name in ("seconds", "ratio")}
        return Measured(**{**data, **spreads})
