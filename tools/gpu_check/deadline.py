"""A pytest plugin: tests that would begin late are skipped, and counted apart from other skips.

    python -m pytest -p tools.gpu_check.deadline --until INSTANT

A whole suite need not fit into what is left of nine minutes; what did not fit is said, and the run is then not a pass:
it exits with NOT_RUN where nothing failed. So it does where every test was skipped. A failure has a line at once: where
a later test hangs, pytest's own report is never printed.
"""

import time
from typing import Any

import pytest

from .step import MARGIN, NOT_RUN

LATE = "not run: no time was left"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, help="time.monotonic() at which, less a margin, tests are skipped")


def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("--until")
    if until is not None and time.monotonic() > until - MARGIN:
        pytest.skip(LATE)


class Told:
    """Prints failures as they are known."""

    def __init__(self, reporter: Any) -> None:
        self.reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = report.longreprtext.splitlines()
            why = next((line[1:].strip() for line in lines if line.startswith("E ")), "")
            self.reporter.write_line(f"\nFAILED {report.nodeid} ({report.when}): {why}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Told(reporter))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.exitstatus != pytest.ExitCode.OK or reporter is None:
        return
    if count_late(reporter) or not reporter.stats.get("passed"):
        session.exitstatus = NOT_RUN


def count_late(reporter: Any) -> int:
    """Tests that no time was left for."""
    return sum(LATE in str(report.longrepr) for report in reporter.stats.get("skipped", []))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of the output, for whoever reads one line of it."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    skipped, late = reporter.stats.get("skipped", []), count_late(reporter)
    counts = {name: len(reporter.stats.get(name, [])) for name in ("passed", "failed", "error")}
    said = [f"{count} {name}" for name, count in counts.items()]
    reporter.write_line(", ".join([*said, f"{len(skipped) - late} skipped", f"{late} not run for want of time"]))
