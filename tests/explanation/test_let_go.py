"""What a forward detaches, or only chooses by, is let go of before its end, and is not kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import freezekit as fk
from tests.observe import bytes_kept


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)) for _ in range(2))


class Teacher(Two):
    """A target that was not computed under no_grad."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(x) - self.other(x).sigmoid().detach()).square()


class Codebook(Two):
    """The nearest code, straight through, as in vector quantization."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.one(x).flatten(2).transpose(1, 2)
        codes = self.other[2].weight.flatten(1)
        nearest = (z.unsqueeze(2) - codes).square().sum(-1).argmin(-1)
        return z + (codes[nearest] - z).detach()


class Chosen(Two):
    """Rows by the best scores, as a detector's second stage."""

    def forward(self, x: Tensor) -> Tensor:
        best = self.other(x).exp().amax((1, 2, 3)).topk(1).indices
        return self.one(x)[best]


class Stored(Two):
    """A loss that is read later holds its graph."""

    def forward(self, x: Tensor) -> Tensor:
        self.penalty = self.other(x).exp().mean()
        return self.one(x)


class Penalised(Two):
    """A gradient within the forward frees nothing of the graph that it is differentiated by."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.one(x).sigmoid().sum(), x, create_graph=True)
        return gradient.square()


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("kind", [Teacher, Codebook, Chosen, Penalised])
def test_what_is_let_go_of_is_not_counted(kind: type[nn.Module], converted: bool) -> None:
    model, x = kind(), torch.randn(4, 3, 8, 8)
    if converted:
        fk.convert(model)
    expected = bytes_kept(model, x)
    assert [fk.explain(model, x, measure=measure).bytes_kept for measure in (False, True)] == [expected] * 2


def test_what_the_model_stores_is_counted() -> None:
    model, x = Stored(), torch.randn(4, 3, 8, 8)
    expected = fk.explain(lambda x: (model(x), model.penalty), x).bytes_kept
    assert fk.explain(model, x).bytes_kept == expected > fk.explain(model.one, x).bytes_kept
