"""Models that were traced or exported in train mode move their statistics whatever freeze does: it says so."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from freezekit.freezing import freeze, freeze_state, is_held, load_freeze_state, unfreeze


def net(training: bool) -> nn.Module:
    torch.manual_seed(0)
    norms = nn.Sequential(nn.BatchNorm2d(4)), nn.InstanceNorm2d(4, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.BatchNorm2d(4, track_running_stats=False)).train(training)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


class Functional(nn.Module):
    def __init__(self, training: bool) -> None:
        super().__init__()
        self.norm, self.reads = nn.BatchNorm2d(3), training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=self.reads)


def traced(training: bool) -> nn.Module:
    return torch.jit.trace(net(training), images(), check_trace=False)


def loaded(training: bool) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(traced(training), file)
    file.seek(0)
    return torch.jit.load(file)


GRAPHS: dict[str, Callable[[bool], nn.Module]] = {
    "traced": traced,
    "loaded": loaded,
    "traced within": lambda training: nn.Sequential(nn.Identity(), traced(training)),
    "exported": lambda training: torch.export.export(net(training), (images(),)).module(),
    "decomposed": lambda training: torch.export.export(Functional(training), (images(),)).run_decompositions().module(),
    "fx": lambda training: fx.symbolic_trace(Functional(training)),
}


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for name, value in model.state_dict().items() if "running" in name]


@pytest.mark.parametrize("kind", GRAPHS)
def test_what_moves_in_any_mode_is_not_held(kind: str) -> None:
    model = GRAPHS[kind](True)
    flags = [p.requires_grad for p in model.parameters()]
    state = freeze_state(model)
    state["statistics"] = dict.fromkeys(state["statistics"], True)
    for take in (
        lambda: freeze(model),
        lambda: freeze(model, norm="freeze"),
        lambda: unfreeze(model, norm="freeze"),
        lambda: load_freeze_state(model, state),
    ):
        with pytest.raises(ValueError, match=r"^model: the running statistics of '[\w.]+' cannot be frozen: .*\n"):
            take()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(is_held(module) for module in model.modules())
    before = statistics(model)
    if flags:
        freeze(model, norm="batch")
    model(images())
    assert not any(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))


@pytest.mark.parametrize("kind", GRAPHS)
def test_what_was_recorded_in_eval_mode_is_held(kind: str) -> None:
    model = GRAPHS[kind](False)
    freeze(model, norm="freeze")
    before = statistics(model)
    model(images())
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    unfreeze(model)


def test_a_scripted_model_whose_mode_is_read_is_held() -> None:
    model = torch.jit.script(net(True))
    freeze(model, norm="freeze")
    before = statistics(model.train())
    model(images())
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
