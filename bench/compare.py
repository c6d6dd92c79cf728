"""Compares freezekit with stock PyTorch: kernels that run, time, and bytes kept for the backward pass.

    python bench/compare.py                         under two minutes: the forum example, ResNet-50's layers, a step
    python bench/compare.py --quick                 a first look
    python bench/compare.py --all --json out.json --plot plots          everything, under twenty minutes
    python bench/compare.py --layers mobilenet_v3,convnext_tiny --sides stock,freezekit,stock_channels_last
    python bench/compare.py --device cuda --dtype bfloat16 --batch 64 --parts fprop,dgrad,wgrad

Every side is asked for the same gradients, and its outputs and gradients are compared with stock's before it is timed.
A side that fails, or computes something else, has a row that says so; the run goes on, and its file is written after
each case. Exit code 0; 1 if a row failed; 2 for arguments that make no sense; 77 if `--until` left cases out.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import baseline, document, environment, options
from bench.child import Child, Lost, measure_there
from bench.environment import Environment
from bench.measure import Case, MakeCase, Measured, describe, failed, measure
from bench.report import Printout
from bench.sections import SECTIONS, kernels, layers, models
from bench.settings import NOT_RUN, Settings
from bench.sides import SIDES, cudnn_benchmark
from bench.timing import Clock, clock_for, small_heap


@dataclass(frozen=True)
class Turn:
    """A section's cases for a side that has a process of its own; "": for all that have none."""

    side: str
    cases: list[MakeCase]


UNLIMITED = 180.0  # seconds for a case in a process of its own, where the run has no time limit


def half_until(end: float | None) -> float:
    """Half of the seconds that are left: the other half is for what waits behind a case that hangs."""
    return UNLIMITED if end is None else (end - time.monotonic()) / 2


class Run:
    """One comparison under way: measures, prints, collects, and writes the file after each case."""

    def __init__(
        self, settings: Settings, report: Printout, time_limit: float | None, file: Path | None = None
    ) -> None:
        apart = [name for name in settings.sides if SIDES[name].is_apart(settings.device)]
        self.settings = settings
        self.here = tuple(name for name in settings.sides if name not in apart)
        self.children = {name: Child() for name in apart}
        self.of_tables = next(iter(self.children.values()), Child())
        self.report = report
        self.file = file
        self.end = time.monotonic() + time_limit if time_limit else None
        self.environment: Environment  # once it goes
        self.kernels: list[kernels.Profiled] = []
        self.rows: list[Measured] = []
        self.skipped: list[str] = []
        self.late = 0  # cases that the time limit left out
        self.unwritten = ""  # why the file does not hold all that is known

    def go(self, sections: Iterable[str]) -> None:
        """Runs the sections in order: all that this process measures, then the sides that have one of their own."""
        names = list(sections)
        for child in self.children.values():
            child.start()
        self.environment = environment.describe(self.settings.device, self.settings.dtype)
        for line in self.environment.lines():
            self.report.line(line)
        if "kernels" in names:
            self._show_kernels()
        cases = {name: SECTIONS[name](self.settings) for name in names if name != "kernels"}
        turns = [Turn("", made) for made in cases.values()]
        for side in self.children:
            takes_part = [name for name in cases if not SIDES[side].why_not(name, self.settings.everything)]
            turns += [Turn(side, cases[name]) for name in takes_part]
        clock = clock_for(self.settings.device, self.settings.cold)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.report.console,
            transient=True,
            disable=not self.report.console.is_terminal,
        ) as progress:
            task = progress.add_task("", total=sum(len(turn.cases) for turn in turns))
            for index, turn in enumerate(turns):
                self._take(turn, self._end_of(index, turns), clock, progress, task)
        for child in (self.of_tables, *self.children.values()):
            child.close()
        self.report.summarise(self.rows)
        for line in self.skipped:
            self.report.line(line, "yellow")

    def _end_of(self, index: int, turns: list[Turn]) -> float | None:
        """When a turn must be over so that those after it get their share of the time, by weight."""
        if self.end is None:
            return None
        left, now = sum(map(self._weight, turns[index:])), time.monotonic()
        return now + (self.end - now) * self._weight(turns[index]) / left

    def _weight(self, turn: Turn) -> int:
        """A turn's claim to time, in steps of a layer; a network's step counts as five.

        Compiling a network for one case takes as long as timing some thirty layers.
        """
        sides = (turn.side,) if turn.side else self.here
        networks = [make for make in turn.cases if make.func is not layers.layer_case]
        compiled = [make for make in networks if any(self._compiles(side, make) for side in sides)]
        return len(turn.cases) + 4 * len(networks) + 30 * len(compiled)

    def _compiles(self, side: str, make: MakeCase) -> bool:
        section = make.args[0] if make.func is models.step_case else "blocks"
        return SIDES[side].slow and not SIDES[side].why_not(section, self.settings.everything)

    def _take(self, turn: Turn, end: float | None, clock: Clock, progress: Progress, task: Any) -> None:
        longest = 0.0
        for done, make in enumerate(turn.cases):
            start = time.monotonic()
            settings = self.settings
            try:
                case = make()
            except Exception as error:
                self.skipped.append(f"FAILED: {make.func.__name__}{make.args[:-1]} cannot be made: {describe(error)}")
                progress.advance(task)
                continue
            if end is not None:
                left = end - start
                if left <= longest:  # Another case as long as the longest so far would end too late.
                    count = len(turn.cases) - done
                    self.late += count
                    self.skipped.append(
                        f"not run within the time limit: {count} of {len(turn.cases)} cases of {case.section}"
                        f"{turn.side and ', ' + turn.side} (--time-limit 0 runs all)"
                    )
                    progress.advance(task, count)
                    return
                # Half of a case's share is timing; checks and counts take the rest.
                settings = replace(settings, budget=min(settings.budget, left / (len(turn.cases) - done) / 2))
            progress.update(task, description=case.label)
            if turn.side:
                rows = self._apart(turn.side, case, make, settings, end)
            else:
                rows = measure(case, replace(settings, sides=self.here), self.environment.peaks, clock)
            self.rows += rows
            self.write()
            self.report.show(rows)
            progress.advance(task)
            if not any(row.failure for row in rows):  # of which a hang says nothing
                longest = max(longest, time.monotonic() - start)

    def _apart(self, side: str, case: Case, make: MakeCase, settings: Settings, end: float | None) -> list[Measured]:
        """The row of a side that runs in a process of its own, beside the stock that it is compared with."""
        beside = replace(settings, sides=tuple(dict.fromkeys(("stock", SIDES[side].reference, side))))
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # What this process holds for later the other one needs now.
        try:
            work = partial(measure_there, make, beside, self.environment.peaks)
            answer = self.children[side].ask(work, half_until(end))
            return [row for row in answer if row.side == side]
        except Lost as lost:
            return [failed(case, side, str(lost))]

    @property
    def failures(self) -> int:
        """Rows and tables without figures, and a file that could not be written."""
        lines = sum(line.startswith("FAILED") for line in (*self.skipped, self.unwritten))
        return lines + sum(bool(row.failure) for row in self.rows) + sum(bool(made.failure) for made in self.kernels)

    def document(self) -> dict[str, Any]:
        """What is known by now."""
        return document.build(self.environment, self.settings, self.kernels, self.rows, self.skipped)

    def write(self) -> None:
        """Replaces the file, where there is one: a run that is cut short has left what it measured."""
        if self.file is not None:
            self.unwritten = document.keep(self.document(), self.file)

    def _show_kernels(self) -> None:
        self.report.heading("kernels: three Conv2d(3, 3, 3), x = randn(1, 3, 24, 24), forward and mean().backward()")
        for regime in kernels.EXPECTED:
            for profiled in self._tables(regime):
                self.kernels.append(profiled)
                self.write()
                if profiled.failure:
                    self.report.line(f"{profiled.regime}, {profiled.side}: FAILED: {profiled.failure}", "bold red")
                    continue
                counts = ", ".join(f"{profiled.counts[phase]} {phase}" for phase in ("fprop", "dgrad", "wgrad"))
                self.report.line()
                self.report.line(f"{profiled.regime}, {profiled.side}: {counts}", "bold")
                self.report.line(str(profiled.table))

    def _tables(self, regime: str) -> list[kernels.Profiled]:
        """The tables of one regime, made in a process of its own where kernels of freezekit's may run on a GPU."""
        if not SIDES[kernels.OWN].is_apart(self.settings.device):
            return kernels.run(regime, self.settings)
        try:
            return self.of_tables.ask(partial(kernels.run, regime, self.settings), half_until(self.end))
        except Lost as lost:
            return [kernels.failed(regime, name, str(lost)) for name in kernels.sides(self.settings)]


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    """The command; see the module's text."""
    asked = options.parse(arguments, __doc__)
    report = Printout(console or Console(), asked.settings.sides)
    run = Run(asked.settings, report, asked.time_limit, asked.json)
    for line in asked.notes:
        report.line(line, "yellow")
    run.skipped += asked.notes
    with options.threads(asked.threads), cudnn_benchmark(), small_heap():
        run.go(asked.sections)
    result = run.document()
    document.validate(result)
    run.write()
    _deliver(asked, report, result, run)
    if run.failures:
        report.line(f"{run.failures} rows FAILED", "bold red")
    return 1 if run.failures else NOT_RUN if run.late and asked.until else 0


def _deliver(asked: options.Asked, report: Printout, result: dict[str, Any], run: Run) -> None:
    """What follows a run: its comparison with an earlier one, and its pictures."""
    report.line()
    if run.unwritten:
        report.line(run.unwritten, "bold red")
    elif asked.json is not None:
        late = f"; {run.late} cases were not run within the time limit" if run.late else ""
        report.line(f"written: {asked.json}: {len(run.rows)} rows{late}")
    if asked.baseline is not None:
        baseline.show(report, asked.baseline, run.rows)
    if asked.plot is not None:
        from bench import plots  # Only pictures need matplotlib.

        for path in plots.draw(result, asked.plot):
            report.line(f"drawn: {path}")


if __name__ == "__main__":
    sys.exit(main())
