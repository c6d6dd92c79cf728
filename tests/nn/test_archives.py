"""A converted or fused model, traced or exported without gradients, is an archive of torch's operators alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import freezekit as fk
from tests.fresh import Fresh

LOAD = """
import sys, torch
path, x = sys.argv[1], torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
y = (torch.export.load(path).module() if path.endswith("pt2") else torch.jit.load(path))(x)
assert not any(name.startswith("freezekit") for name in sys.modules)
print(y.sum(dtype=torch.float64).item())
"""


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.GroupNorm(2, 4),
        nn.ReLU6(),
        nn.Dropout(0.1),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(2),
        nn.Conv1d(4, 2, 3),
        nn.LayerNorm(7),
        nn.LeakyReLU(),
    )
    return fk.convert(layers).eval()


class Residual(nn.Module):
    """Two blocks for `fuse`, the second with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + x)


def fused() -> nn.Module:
    torch.manual_seed(0)
    return fk.fuse(nn.Sequential(Residual(), Residual()).eval())


@pytest.fixture(scope="module")
def torch_alone() -> Iterator[Fresh]:
    """Processes that have imported what torch reads archives with."""
    made = Fresh("torch._export.serde.serialize", {})
    yield made
    made.close()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("way", ["export", "trace"])
@pytest.mark.parametrize("make", [model, fused])
def test_it_loads_without_freezekit(
    make: Callable[[], nn.Module], way: str, frozen: bool, tmp_path: Path, torch_alone: Fresh
) -> None:
    """Frozen weights and an input that does not learn need no gradient; elsewhere `no_grad` says so."""
    net, x = make().requires_grad_(not frozen), torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    path = str(tmp_path / ("archive.pt2" if way == "export" else "archive.pt"))
    with torch.set_grad_enabled(frozen or way == "trace"):
        if way == "export":
            torch.export.save(torch.export.export(net, (x,)), path)
        else:
            torch.jit.save(torch.jit.trace(net, x), path)
    loaded = torch_alone.run(LOAD, path, folder=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert float(loaded.stdout) == pytest.approx(net(x).sum(dtype=torch.float64).item(), rel=1e-5)


@pytest.mark.parametrize("make", [model, fused])
def test_an_export_to_onnx_is_of_torch_s_operators_with_gradients_too(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = make().requires_grad_(True), torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # as its exporter says while it runs torch's
    program = torch.export.export(net, (x,))
    assert "freezekit" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), net(x))
