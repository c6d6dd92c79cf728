"""The tables of docs/kernels.md are what their commands print, and the grids in them are good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.layer_lists import layers_of

from . import grids, traffic
from .emulated import Problem

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


@pytest.mark.parametrize("module", [traffic, grids], ids=["traffic", "grids"])
def test_the_document_has_the_table_of_today(module: object) -> None:
    table = "\n".join(module.table())  # type: ignore[attr-defined]
    assert table in DOCUMENT.read_text(), f"put this into {DOCUMENT.name}:\n{table}"


@pytest.mark.parametrize("operator", ["fprop", "dgrad", "wgrad"])
def test_resnet50_s_grids_fill_a_large_gpu_evenly(operator: str) -> None:
    for layer in layers_of("resnet50"):
        grid = grids.grid(operator, grids.problem_of(layer))
        assert grid.rounds >= 1.9, (layer, grid)
        assert grid.even >= (0.8 if operator == "wgrad" else 0.98), (layer, grid)
        assert grid.useful >= 0.75 or layer.in_channels == 3, (layer, grid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 8, 32])
def test_wgrad_of_small_batches_and_tiny_outputs_has_no_slice_too_small(batch: int, dtype: torch.dtype) -> None:
    for layer in layers_of("resnet50"):
        problem = grids.problem_of(layer, batch)
        grid = grids.grid("wgrad", problem, dtype)
        positions = batch * problem.p * problem.q
        assert grid.selection.split_k == 1 or positions / grid.selection.split_k >= 128
        assert grid.rounds >= 0.9 or positions < 8 * 128 * 132, (layer, grid)


def test_partial_sums_stay_small() -> None:
    """Their bytes bound the workspace, and what the ordered reduce reads."""
    for layer in layers_of("resnet50"):
        assert grids.grid("wgrad", grids.problem_of(layer)).selection.workspace <= 64 * 2**20
    stem = grids.grid("wgrad", Problem(n=128, c=3, k=64, h=224, w=224, r=7, s=7, pad=(3, 3), stride=(2, 2)))
    assert stem.selection.split_k > 50, "three tiles of dw are all that the stem has"
