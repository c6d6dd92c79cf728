"""What an audit found: the findings, a table for people, data for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from freezekit._arguments import brief
from freezekit._showing import Shown, console_for

if TYPE_CHECKING:
    from rich.console import Console

SEVERITIES = ("error", "warning", "info")
_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True)
class Finding:
    """One pitfall that was seen.

    Attributes:
        code: what kind of pitfall, a stable string such as ``"would-move"``.
        severity: ``"error"`` (the result is wrong), ``"warning"`` (it costs something or is probably not meant) or
            ``"info"`` (worth knowing).
        where: the place, for a reader: a parameter, a module, or the first of them and how many more.
        why: what happens, and because of what.
        mend: what to do about it.
        names: every parameter, buffer or module concerned, by its name in the model.
    """

    code: str
    severity: str
    where: str
    why: str
    mend: str
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {SEVERITIES}, got {self.severity!r}")


class AuditError(RuntimeError):
    """Raised by `Report.raise_for_errors`. ``report`` is the whole report."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def about(names: Sequence[str], code: str, severity: str, why: str, mend: str) -> Iterator[Finding]:
    """What was seen of several parameters, buffers or modules; nothing where there are none."""
    if names:
        yield Finding(code, severity, brief(names), why, mend, tuple(names))


@dataclass(frozen=True)
class Report(Shown):
    """The findings of `audit`, errors first.

    Iterating gives `Finding` objects and ``len`` counts them. ``bool(report)`` is always true: compare ``len(report)``.

    Attributes:
        model: class name of the audited model.
        findings: the findings, sorted by severity.
        skipped: check name -> why it could not run (for instance, no inputs were given).
    """

    model: str
    findings: tuple[Finding, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __bool__(self) -> bool:
        return True

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of severity ``"error"``."""
        return self.of("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings of severity ``"warning"``."""
        return self.of("warning")

    def of(self, severity: str) -> tuple[Finding, ...]:
        """The findings of one severity."""
        if severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {SEVERITIES}, got {severity!r}")
        return tuple(f for f in self.findings if f.severity == severity)

    def counts(self) -> dict[str, int]:
        """How many findings there are of each severity."""
        return {severity: len(self.of(severity)) for severity in SEVERITIES}

    def print(self, console: Console | None = None) -> None:
        """Print the findings as a table, and which checks could not run."""
        from rich.table import Table
        from rich.text import Text

        console = console_for(console)
        counts = self.counts()
        title = f"audit of {self.model}: " + ", ".join(f"{n} {severity}" for severity, n in counts.items())
        table = Table(title=title, show_lines=True, title_justify="left")
        for column in ("severity", "code", "where", "why", "how to mend"):
            table.add_column(column, overflow="fold")
        for f in self.findings:
            # Text, not str: a name may hold brackets, which rich would read as markup.
            table.add_row(Text(f.severity, _STYLES[f.severity]), *map(Text, (f.code, f.where, f.why, f.mend)))
        if self.findings:
            console.print(table)
        else:
            console.print(title)
        for check, why in self.skipped.items():
            console.print(f"not checked: {check} ({why})", markup=False, highlight=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for `json.dumps`.

        The shape is stable within ``"version"``::

            {"version": 1, "model": str, "summary": {"error": int, "warning": int, "info": int},
             "findings": [{"code": str, "severity": str, "where": str, "why": str, "mend": str, "names": [str]}],
             "skipped": {check: reason}}
        """
        findings = [{**asdict(f), "names": list(f.names)} for f in self.findings]
        return {
            "version": 1,
            "model": self.model,
            "summary": self.counts(),
            "findings": findings,
            "skipped": dict(self.skipped),
        }

    def raise_for_errors(self) -> None:
        """Raise `AuditError` when there is a finding of severity ``"error"``, naming each with its cure."""
        if not self.errors:
            return
        lines = [f"- {f.code}: {', '.join(f.names) or f.where}: {f.why}. {f.mend}" for f in self.errors]
        raise AuditError(f"audit found {len(lines)} error(s) in {self.model}:\n" + "\n".join(lines), self)
