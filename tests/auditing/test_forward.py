"""What one forward pass shows: lost gradients, moving buffers, casts under autocast."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from freezekit.auditing import audit
from tests.auditing.helpers import found, net, the


class Checkpointed(nn.Module):
    """A frozen stem before a checkpointed trainable block."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.block, self.reentrant = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)


def test_reentrant_checkpointing_over_a_frozen_prefix() -> None:
    x = torch.ones(2, 3)
    assert the(audit(Checkpointed(True), inputs=x), "reentrant-checkpoint").names == ("block",)
    assert not len(audit(Checkpointed(False), inputs=x))


class Detaching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, cut_all: bool = False) -> torch.Tensor:
        y = self.head(self.body(x).detach())
        return y.detach() if cut_all else y


def test_parameters_that_get_no_gradient() -> None:
    x = torch.ones(2, 3)
    assert the(audit(Detaching(), inputs=(x,)), "unreached").names == ("body.weight", "body.bias")
    assert the(audit(Detaching(), inputs=(x, True)), "no-gradient").severity == "error"


class Counting(nn.Linear):
    """A frozen layer with a buffer of its own that moves."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


def test_a_buffer_that_moves() -> None:
    model = nn.Sequential(Counting().requires_grad_(False), nn.Linear(3, 1))
    state = torch.random.get_rng_state()
    assert the(audit(model, inputs=torch.ones(2, 3)), "moving-buffer").names == ("0.calls",)
    assert float(model[0].calls) == 0, "the probe's effect on buffers must be undone"
    assert torch.equal(state, torch.random.get_rng_state())


def test_autocast_casts_frozen_weights() -> None:
    model = net().eval()
    model[0].requires_grad_(False)
    assert not found(audit(model), "autocast-cast")
    with torch.autocast("cpu", torch.bfloat16):
        assert the(audit(model), "autocast-cast").names == ("0",)


class Referring(nn.Module):
    """A model whose head is told by a weak proxy; of the copy it is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)
        self.last: Any = weakref.proxy(self.head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(x).detach())


def test_a_module_that_is_told_by_a_weak_proxy() -> None:
    assert the(audit(Referring(), inputs=torch.ones(2, 3)), "unreached").names == ("body.weight", "body.bias")
