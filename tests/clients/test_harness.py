"""What the table of clients is made of."""

from __future__ import annotations

import torch
from torch import nn

from tests.clients.cases import Case
from tests.clients.harness import WAYS, runs

PLANE = 64 * 64 * 4  # bytes of one channel


def test_bytes_are_those_of_the_network_alone() -> None:
    """A loss that weighs each output would keep its weights."""
    network = lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.SiLU()).requires_grad_(False)  # noqa: E731
    side = runs(Case("own", "convs and SiLU", network, shape=(1, 3, 64, 64)), torch.float32)
    assert side["stock"].kept() == (3 + 4 + 8) * PLANE
    assert {side[way].kept() for way in WAYS} == {8 * PLANE}
