"""Every probe there is. A new family of instructions adds its module here, and its kernels to place.SOURCES."""

from __future__ import annotations

from . import sm80, sm90
from .probe import Probe


def probes() -> tuple[Probe, ...]:
    """All probes, by the capability that they need."""
    return (*sm80.probes(), *sm90.probes())
