"""A net to audit, and ways to look into a report."""

from __future__ import annotations

import torch
from torch import nn

from freezekit.auditing import Finding, Report


def net() -> nn.Sequential:
    """conv - bn - relu - linear on 3x8x8 inputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def found(report: Report, code: str) -> list[Finding]:
    return [f for f in report if f.code == code]


def the(report: Report, code: str) -> Finding:
    matches = found(report, code)
    assert len(matches) == 1, f"expected one {code}, got {[f.code for f in report]}"
    return matches[0]
