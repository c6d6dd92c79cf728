"""No false alarms: `audit` has nothing but information to give about a model that is as it should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from freezekit.auditing import Report, audit
from freezekit.freezing import freeze, unfreeze


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


class Tied(nn.Module):
    """An embedding and an output layer over one weight, trainable."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x.long().clamp(0, 3)))


class OwnFlags(nn.Module):
    """A model with attributes of its own on modules and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.freeze, self.trainable, self.is_shared = False, False, True, False
        self.body = nn.Linear(4, 4)
        self.body.weight._no_weight_decay = True
        self.body.bias.tensor_parallel = False
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.body(x) * self.scale


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5, 2, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x[:, None])[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:, None])


class Images(nn.Module):
    """Convolutions of many kinds, with the norms that go with them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 1, padding_mode="reflect"), nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2, groups=4), nn.BatchNorm2d(4, affine=False),
            nn.ConvTranspose2d(4, 2, 2), nn.GroupNorm(1, 2), nn.Flatten(), nn.LazyLinear(2),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.view(-1, 1, 2, 2))


def normed() -> nn.Module:
    normal = nn.utils.parametrizations
    return nn.Sequential(normal.weight_norm(nn.Linear(4, 4)), normal.spectral_norm(nn.Linear(4, 2)))


NETS: list[Callable[[], nn.Module]] = [mlp, Tied, OwnFlags, Recurrent, Attention, Images, normed]
OPTIMIZERS = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adamax"]


def alarms(report: Report) -> list[str]:
    return [f"{f.code}: {f.where}" for f in report if f.severity != "info"]


def x() -> torch.Tensor:
    return torch.rand(6, 4, generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(x()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", NETS)
def test_untrained_and_trained(make: Callable[[], nn.Module]) -> None:
    model = make()
    model(x())  # lazy layers get their shapes
    opt = torch.optim.Adam(model.parameters())
    assert alarms(audit(model, opt, x())) == []
    train(model, opt)
    assert alarms(audit(model, opt, x())) == []
    opt.zero_grad(set_to_none=False)
    assert alarms(audit(model, opt, x())) == []
    model.eval()
    assert alarms(audit(model, opt, x())) == []


@pytest.mark.parametrize("make", NETS)
def test_lazy_meta_low_precision_and_inference(make: Callable[[], nn.Module]) -> None:
    assert alarms(audit(make())) == []
    model = make()
    model(x())
    assert alarms(audit(model.bfloat16())) == []
    assert alarms(audit(model.to("meta"))) == []
    frozen = make()
    frozen(x())
    frozen.requires_grad_(False).eval()
    assert alarms(audit(frozen, inputs=x())) == []


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_prefix_frozen_as_it_should_be(data: st.DataObject) -> None:
    """Any prefix of any net, in eval mode with no gradient left, under any optimizer, before or after steps."""
    make = data.draw(st.sampled_from([n for n in NETS if n is not Tied]))
    model = make()
    model(x())
    opt = getattr(torch.optim, data.draw(st.sampled_from(OPTIMIZERS)))(model.parameters(), lr=0.01)
    if data.draw(st.booleans()):
        train(model, opt)
    leaves = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    for module in leaves[: data.draw(st.integers(0, len(leaves) - 1))]:
        module.training = False
        for p in module.parameters(recurse=False):
            p.requires_grad_(False)
    for module in model.modules():  # norms without parameters, and spectral norm's iteration, go with their block
        inside = list(module.parameters())
        if inside and not any(p.requires_grad for p in inside):
            module.eval()
    for p in model.parameters():
        if not p.requires_grad:
            p.grad = None
    assert alarms(audit(model, opt, x())) == []


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_freeze_leaves(data: st.DataObject) -> None:
    """freeze and unfreeze, of any parameters in any policy, after a backward pass too, leave nothing to complain of."""
    # Not normed: freeze does not stop spectral norm's power iteration, of which audit rightly complains.
    model = data.draw(st.sampled_from([n for n in NETS if n not in (Tied, normed)]))()
    model(x())
    opt = getattr(torch.optim, data.draw(st.sampled_from(OPTIMIZERS)))(model.parameters(), lr=0.01)
    train(model, opt)
    names = [n for n, _ in model.named_parameters()]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=len(names) - 1, unique=True))
    remove, state = data.draw(st.booleans()), data.draw(st.sampled_from(["keep", "reset"]))
    frozen = freeze(model, *chosen, optimizer=opt, remove=remove, state=state)
    model.train()
    assert alarms(audit(model, opt, x())) == []
    back = data.draw(st.lists(st.sampled_from(chosen), min_size=1, unique=True))
    unfreeze(model, *back, optimizer=opt)
    assert alarms(audit(model, opt, x())) == []
    frozen.restore()
    assert alarms(audit(model, opt, x())) == []


def test_two_optimizers_and_a_parameter_of_the_loss() -> None:
    generator, critic = mlp(), mlp()
    both = nn.ModuleDict({"g": generator, "c": critic})
    temperature = nn.Parameter(torch.ones(()))
    opts = [torch.optim.Adam([*generator.parameters(), temperature]), torch.optim.SGD(critic.parameters(), lr=0.1)]
    assert alarms(audit(both, opts)) == []


def test_compiled() -> None:
    model = torch.compile(mlp(), backend="eager")
    model(x())
    assert alarms(audit(model, torch.optim.SGD(model.parameters(), lr=0.1), x())) == []
