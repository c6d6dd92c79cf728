"""Fused blocks give results the strides that torch's layers give them: dropout behind them draws in that order."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

import freezekit as fk
from freezekit.fusion import fusion_report


def chain(mode: str) -> nn.Sequential:
    """Two blocks, so that one result is read by a block alone."""
    layers = [nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_strides_and_what_dropout_drops(mode: str, dtype: torch.dtype) -> None:
    formats = (torch.contiguous_format, torch.channels_last)
    for weight, data in product(formats, formats):
        net = chain(mode).to(dtype).to(memory_format=weight)
        net[6].train()
        x, results = torch.randn(2, 3, 8, 8, dtype=dtype).to(memory_format=data), []
        for change in (fk.unfuse, fk.fuse):
            change(net)
            torch.manual_seed(1)
            results.append(net(x))
        assert any(row.fused for row in fusion_report(net))
        assert results[1].stride() == results[0].stride(), (weight, data)
        torch.testing.assert_close(results[1], results[0])
