"""Compares freezekit with stock PyTorch: kernels that run, time, and bytes kept for the backward pass.

    python bench/compare.py                         under two minutes: the forum example, ResNet-50's layers, a step
    python bench/compare.py --quick                 a first look
    python bench/compare.py --all --json out.json --plot plots          everything, under twenty minutes
    python bench/compare.py --layers mobilenet_v3,convnext_tiny --sides stock,freezekit,stock_channels_last
    python bench/compare.py --device cuda --dtype bfloat16 --batch 64 --parts fprop,dgrad,wgrad

Every side is asked for the same gradients, and its outputs and gradients are held against stock's before it is timed.
Exit code 0; 1 if a side computed something else than stock; 2 for arguments that make no sense.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import baseline, document, options
from bench.environment import Environment, describe
from bench.measure import MakeCase, measure
from bench.measurement import Measurement
from bench.report import Report
from bench.sections import SECTIONS, kernels, layers, models
from bench.settings import Settings
from bench.sides import SIDES, cudnn_benchmark
from bench.timing import Clock, clock_for, small_heap
from bench.verify import WrongResult


class Run:
    """One comparison under way: measures, prints and collects."""

    def __init__(self, settings: Settings, report: Report, time_limit: float | None) -> None:
        self.settings = settings
        self.report = report
        self.end = time.monotonic() + time_limit if time_limit else None
        self.environment: Environment | None = None
        self.kernels: list[kernels.Profiled] = []
        self.rows: list[Measurement] = []
        self.skipped: list[str] = []

    def go(self, sections: Iterable[str]) -> None:
        """Runs the sections in order."""
        names = list(sections)
        self.environment = describe(self.settings.device, self.settings.dtype)
        for line in self.environment.lines():
            self.report.line(line)
        if "kernels" in names:
            self._show_kernels()
        cases = [SECTIONS[name](self.settings) for name in names if name != "kernels"]
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
            task = progress.add_task("", total=sum(map(len, cases)))
            for index, section in enumerate(cases):
                self._section(section, self._end_of(index, cases), clock, progress, task)
        self.report.summarise(self.rows)
        for line in self.skipped:
            self.report.line(line, "yellow")

    def _end_of(self, index: int, cases: list[list[MakeCase]]) -> float | None:
        """When a section must be done, so that those after it get their share of the time; by weight."""
        if self.end is None:
            return None
        left, now = sum(map(self._weight, cases[index:])), time.monotonic()
        return now + (self.end - now) * self._weight(cases[index]) / left

    def _weight(self, cases: list[MakeCase]) -> int:
        """Of a section's claim to time: in layers' steps, of which a network's is worth about five.

        Compiling a network for one case takes as long as timing some thirty layers.
        """
        networks = [make for make in cases if make.func is not layers.layer_case]
        compiled = [make for make in networks if any(self._compiles(side, make) for side in self.settings.sides)]
        return len(cases) + 4 * len(networks) + 30 * len(compiled)

    def _compiles(self, side: str, make: MakeCase) -> bool:
        section = make.args[0] if make.func is models.step_case else "blocks"
        return SIDES[side].slow and not SIDES[side].why_not(section, self.settings.everything)

    def _section(self, cases: list[MakeCase], end: float | None, clock: Clock, progress: Progress, task: Any) -> None:
        longest = 0.0
        for done, make in enumerate(cases):
            start = time.monotonic()
            settings, case = self.settings, make()
            if end is not None:
                left = end - start
                if left <= longest:  # Another case like the longest so far would end too late.
                    count = len(cases) - done
                    self.skipped.append(
                        f"not run within the time limit: {count} of {len(cases)} cases of {case.section} "
                        f"(--time-limit 0 runs all)"
                    )
                    progress.advance(task, count)
                    return
                # Half of a case's share is timing; checks and counts take the rest.
                settings = replace(settings, budget=min(settings.budget, left / (len(cases) - done) / 2))
            progress.update(task, description=case.label)
            assert self.environment is not None
            rows = measure(case, settings, self.environment.peaks, clock, self.skipped)
            self.rows += rows
            self.report.show(rows)
            progress.advance(task)
            longest = max(longest, time.monotonic() - start)

    def _show_kernels(self) -> None:
        self.report.heading("kernels: three Conv2d(3, 3, 3), x = randn(1, 3, 24, 24), forward and mean().backward()")
        for profiled in kernels.run(self.settings):
            self.kernels.append(profiled)
            counts = ", ".join(f"{profiled.counts[phase]} {phase}" for phase in ("fprop", "dgrad", "wgrad"))
            self.report.line()
            self.report.line(f"{profiled.regime}, {profiled.side}: {counts}", "bold")
            self.report.line(str(profiled.table))


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    """The command; see the module's text."""
    asked = options.parse(arguments)
    report = Report(console or Console(), asked.settings.sides)
    run = Run(asked.settings, report, asked.time_limit)
    for line in asked.notes:
        report.line(line, "yellow")
    run.skipped += asked.notes
    with options.threads(asked.threads), cudnn_benchmark(), small_heap():
        try:
            run.go(asked.sections)
        except WrongResult as wrong:
            report.line(f"WRONG RESULT: {wrong}", "bold red")
            return 1
    assert run.environment is not None
    result = document.build(run.environment, asked.settings, run.kernels, run.rows, run.skipped)
    _deliver(asked, report, result, run.rows)
    return 0


def _deliver(asked: options.Asked, report: Report, result: dict[str, Any], rows: list[Measurement]) -> None:
    """What follows a run: its file, its comparison with an earlier one, its pictures."""
    report.line()
    if asked.json is not None:
        document.write(result, asked.json)
        report.line(f"written: {asked.json}")
    if asked.baseline is not None:
        baseline.show(report, asked.baseline, rows)
    if asked.plot is not None:
        from bench import plots  # matplotlib is wanted for pictures alone.

        for path in plots.draw(result, asked.plot):
            report.line(f"drawn: {path}")


if __name__ == "__main__":
    sys.exit(main())
