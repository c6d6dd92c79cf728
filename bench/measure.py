"""Measures one case: builds every side, compares its results with stock's, counts memory and kernels, then times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.environment import Peaks
from bench.memory import bytes_kept, trace
from bench.settings import Settings
from bench.sides import SIDES, Side
from bench.timing import Clock, Spread, Timeable, interleave
from bench.verify import WrongResult, check, tolerance
from bench.work import Work, count
from freezekit.profiling import profile


@dataclass(frozen=True)
class Measured:
    """One side of one case: the record that tables, JSON, plots and comparisons of two runs share.

    `bench/schema.json` says what each field is, and in which unit.
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


@dataclass(frozen=True)
class Case:
    """One comparison; the labels are those of `Measured`.

    Attributes:
        module: stock's, already in its regime; every side gets a copy.
        input: whether it requires a gradient is part of the regime.
        tolerance: the largest error allowed of "y", "dx" and of each parameter's gradient by the parameter's name.
        work: what the mathematics needs; None counts it in stock's step.
        learning_rate: of a plain SGD step after the backward pass; None for no step.
        kinks: whether a pre-activation within rounding of zero may go either way, which bench.verify then allows for.
    """

    section: str
    group: str
    case: str
    detail: str
    regime: str
    module: nn.Module
    input: Tensor
    tolerance: Callable[[str], float]
    part: str = "step"
    count: int = 1
    work: Work | None = None
    x: float | None = None
    learning_rate: float | None = None
    kinks: bool = False

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.group} {self.case} ({self.detail}), {self.regime}, {self.part}"

    def labels(self, side: str) -> dict[str, Any]:
        """What the row of a side says of the case."""
        shared = ("section", "group", "case", "detail", "regime", "part", "count", "x")
        return {"side": side, **{name: getattr(self, name) for name in shared}}


MakeCase = partial[Case]  # Cases are made when their turn comes: together they would not fit on a GPU.


class Contestant:
    """A side's module and its input, ready to run; every side is asked for the same gradients."""

    def __init__(self, side: Side, case: Case, dy: Tensor | None) -> None:
        self.side = side
        self.module = side.build(case.module)
        self.x = side.place(case.input)
        self.forward = side.forward(self.module)
        names = [name for name, parameter in case.module.named_parameters() if parameter.requires_grad]
        self.parameters: list[Tensor] = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.names = (["dx"] if self.x.requires_grad else []) + names
        self.wanted: list[Tensor] = [*([self.x] if self.x.requires_grad else []), *self.parameters]
        y = self.forward(self.x)
        # In y's own layout: another one would cost this side a conversion that no network has.
        self.dy = torch.randn_like(y) if dy is None else torch.empty_like(y.detach()).copy_(dy)
        self._y = y if case.part in ("dgrad", "wgrad", "backward") else None
        self._rate = case.learning_rate

    def gradients(self, y: Tensor, keep_graph: bool = False) -> Sequence[Tensor]:
        """Gradients of what learns, in the order of `names`."""
        if not self.wanted:
            return ()
        return torch.autograd.grad(y, self.wanted, self.dy, retain_graph=keep_graph)

    def results(self) -> dict[str, Tensor]:
        """Output and gradients, by name."""
        y = self.forward(self.x)
        return {"y": y.detach(), **dict(zip(self.names, self.gradients(y), strict=True))}

    def moves(self, tf32: bool) -> dict[str, Tensor]:
        """How far each element of the results moves when all layers round their outputs differently, over 16 tries.

        Outputs change by as much as the order of summation may change sums of 512 products, so that every
        pre-activation that rounding can push to the other side of zero gets there in some try.
        """
        here = self.results()
        rounding = tolerance(self.x.dtype, 512, tf32)
        generator = torch.Generator(self.x.device).manual_seed(0)

        def round_otherwise(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            noise = torch.rand(y.shape, generator=generator, dtype=y.dtype, device=y.device)
            return y + (2 * noise - 1) * (rounding * y.detach().abs().max())

        leaves = [module for module in self.module.modules() if not list(module.children())]
        hooks = [leaf.register_forward_hook(round_otherwise) for leaf in leaves]
        moved = {name: torch.zeros_like(result, dtype=torch.float64) for name, result in here.items()}
        for _ in range(16):
            for name, result in self.results().items():
                moved[name] += (result.double() - here[name].double()).abs()
        for hook in hooks:
            hook.remove()
        return moved

    def step_for(self, part: str) -> Timeable:
        """What is timed."""
        if part == "fprop":
            return lambda: self.forward(self.x)
        if self._y is not None:
            y = self._y
            return lambda: self.gradients(y, keep_graph=True)
        return self.step

    def step(self) -> object:
        """Forward, backward and, where the case has a learning rate, the optimizer's step."""
        gradients = self.gradients(self.forward(self.x))
        if self._rate is not None and self.parameters:
            with torch.no_grad():
                torch._foreach_add_(self.parameters, list(gradients[-len(self.parameters) :]), alpha=-self._rate)
        return gradients


def measure(case: Case, settings: Settings, peaks: Peaks, clock: Clock) -> list[Measured]:
    """A row for each side, stock first.

    A side that raises an error, or whose output or a gradient differs from stock's by more than rounding, has a row
    that says so in place of figures; so has every side where stock itself fails.
    """
    sides = [name for name in settings.sides if not SIDES[name].why_not(case.section, settings.everything)]
    try:
        return _measure(case, sides, settings, peaks, clock)
    except Exception as error:  # Whatever it is, it concerns this case only: the run goes on.
        return [failed(case, name, describe(error)) for name in sides]


def describe(error: Exception) -> str:
    """An error in a line."""
    text = next(iter(str(error).splitlines()), "")
    return f"WRONG RESULT: {text}" if isinstance(error, WrongResult) else f"{type(error).__name__}: {text}"


def failed(case: Case, side: str, why: str) -> Measured:
    """The row of a side that has no figures."""
    return Measured(**case.labels(side), rounds=0, seconds=None, ratio=None, error=None, failure=why)


def _measure(case: Case, sides: Sequence[str], settings: Settings, peaks: Peaks, clock: Clock) -> list[Measured]:
    torch.manual_seed(settings.seed)
    contestants = {"stock": Contestant(SIDES["stock"], case, None)}
    expected = contestants["stock"].results()
    tolerances = {name: case.tolerance(name) for name in expected}
    moves = cache(partial(contestants["stock"].moves, settings.tf32)) if case.kinks else None
    errors, failures, counted = {"stock": 0.0}, dict[str, str](), dict[str, dict[str, Any]]()
    for name in sides:
        try:
            if name != "stock":
                contestant = Contestant(SIDES[name], case, contestants["stock"].dy)
                errors[name] = check(case.label, name, contestant.results(), expected, tolerances, moves)
                contestants[name] = contestant
            counted[name] = _count(case, contestants[name])
        except Exception as error:
            if name == "stock":
                raise
            failures[name] = describe(error)
            contestants.pop(name, None)
    work = case.work or count(contestants["stock"].step)
    steps = {name: contestant.step_for(case.part) for name, contestant in contestants.items()}
    rounds = _rounds(steps, settings, clock)
    within = {name: contestant.side.switch for name, contestant in contestants.items()}
    timed = interleave(steps, clock=clock, rounds=rounds, seed=settings.seed, within=within)
    rows = []
    for name in sides:
        if name in failures:
            rows.append(failed(case, name, failures[name]))
            continue
        seconds, reference = timed.time(name), SIDES[name].reference
        ratio = timed.ratio(name, reference) if reference in contestants else None
        rows.append(
            Measured(
                **case.labels(name),
                rounds=rounds,
                seconds=seconds,
                ratio=ratio,
                error=errors[name],
                tflops=work.flops / seconds.median / 1e12,
                gbs=work.traffic / seconds.median / 1e9,
                roofline=peaks.least_seconds(work.flops, work.traffic) / seconds.median,
                **counted[name],
            )
        )
    return rows


def _count(case: Case, contestant: Contestant) -> dict[str, Any]:
    """Bytes kept, peak and kernels; memory only of whole steps, where it is meaningful."""
    step = contestant.step_for(case.part)
    step()
    with profile() as recorded:
        step()
    counts = {"kernels": sum(row.instances for row in recorded.kernels())}
    if case.part == "step":
        device = contestant.x.device
        counts["bytes_kept"] = bytes_kept(contestant.forward, contestant.x) if contestant.wanted else 0
        counts["peak_bytes"] = trace(device, step).peak
    return counts


def _rounds(steps: dict[str, Timeable], settings: Settings, clock: Clock) -> int:
    """As many as fit the budget, between the least and the most that are allowed."""
    if settings.least_rounds >= settings.rounds:
        return settings.rounds
    one_round = sum(clock(step, 1) for step in steps.values())
    fitting = int(settings.budget / one_round) if one_round > 0 else settings.rounds
    return max(settings.least_rounds, min(settings.rounds, fitting))
