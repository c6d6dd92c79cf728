"""guard where a model changes under it: it holds tensors, whatever their names, and tells of those that leave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import SGD, Optimizer

from freezekit import convert
from freezekit.conversion import revert
from freezekit.freezing import freeze, freeze_state, load_freeze_state, unfreeze
from freezekit.guarding import FrozenMoved, guard

Change = Callable[[Any], object]
MODES = pytest.mark.parametrize("mode", ["raise", "restore"])
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    normed = torch.nn.utils.weight_norm(nn.Linear(3, 3))
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), normed, nn.Linear(3, 3))


def frozen() -> tuple[nn.Sequential, Optimizer]:
    """Frozen but for its last layer."""
    model = net()
    freeze(model, "0", "1", "2", norm="freeze")
    return model, SGD(model.parameters(), lr=0.1)


def assign(model: nn.Module, by: int = 0) -> None:
    model.load_state_dict({name: tensor.detach() + by for name, tensor in model.state_dict().items()}, assign=True)


GONE, OTHER, TRAINS = "no longer in the model", "another tensor, of another value, is in its place", "is not frozen"
LEAVING: dict[str, tuple[Change, set[str], str]] = {
    "weight norm removed": (lambda m: torch.nn.utils.remove_weight_norm(m[2]), {"2.weight_g", "2.weight_v"}, GONE),
    "weight norm added": (lambda m: torch.nn.utils.weight_norm(m[0]), {"0.weight"}, GONE),
    "weight norm as a parametrization": (lambda m: parametrizations.weight_norm(m[0]), {"0.weight"}, GONE),
    "another parameter": (lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(3, 3))), {"0.weight"}, TRAINS),
    "another norm": (
        nn.SyncBatchNorm.convert_sync_batchnorm,
        {"1.running_mean", "1.running_var", "1.num_batches_tracked"},
        "it is in a SyncBatchNorm now",
    ),
    "dropped": (lambda m: m.pop(0), {"0.weight", "0.bias"}, OTHER),
    "a checkpoint": (lambda m: assign(m[0], 1), {"0.weight", "0.bias"}, OTHER),
}


@MODES
@pytest.mark.parametrize("how", LEAVING)
def test_what_leaves_is_told_before_every_step_until_it_is_accepted(how: str, mode: Any) -> None:
    change, names, says = LEAVING[how]
    model, optimizer = frozen()
    held = guard(model, optimizer, mode=mode)
    change(model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(FrozenMoved, match="moved or left outside") as told:
            optimizer.step()
        assert set(told.value.names) == names
        assert says in str(told.value)
    assert all(map(torch.equal, before.values(), model.state_dict().values())), "nothing that is somebody else's"
    held.accept()
    optimizer.step()


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize("allowed", [True, False])
def test_what_was_unfrozen_or_allowed_first_may_leave(how: str, allowed: bool) -> None:
    change, _, _ = LEAVING[how]
    model, optimizer = frozen()
    held = guard(model, optimizer)
    if not allowed:
        unfreeze(model)
    with held.allow() if allowed else nullcontext():
        change(model)
    optimizer.step()


def test_a_norm_that_was_replaced_may_be_frozen_again_or_unfrozen() -> None:
    model, optimizer = frozen()
    guard(model, optimizer)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(FrozenMoved):
        optimizer.step()
    freeze(model, "1", norm="freeze")
    optimizer.step()
    unfreeze(model, "1")
    optimizer.step()


def test_what_was_replaced_first_and_then_unfrozen_by_a_state_trains() -> None:
    """As at a resume under guard; what the state holds frozen is still held."""
    model, optimizer = frozen()
    other = net()
    freeze(other, "1", norm="freeze")
    held = guard(model, optimizer)
    assign(model)
    load_freeze_state(model, freeze_state(other))
    optimizer.step()
    with torch.no_grad():
        model[0].weight.add_(1)
        model[1].weight.add_(1)
    with pytest.raises(FrozenMoved) as error:
        held.check()
    assert error.value.names == ("1.weight",)


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 3))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale


def into_other_objects(model: nn.Module) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(memory_format=torch.channels_last)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


STAYING: dict[str, Change] = {
    "checkpointed": lambda m: m.__setitem__(0, checkpoint_wrapper(m[0])),
    "adapter beside": lambda m: m[0].register_parameter("lora", nn.Parameter(torch.randn(3))),
    "adapter around": lambda m: parametrize.register_parametrization(m[0], "weight", Adapter()),
    "pruned": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    "parametrized and back": lambda m: [
        parametrize.register_parametrization(m[0], "weight", nn.Identity()),
        parametrize.remove_parametrizations(m[0], "weight"),
    ],
    "other objects": into_other_objects,
    "converted and reverted": lambda m: [convert(m), revert(m)],
    "other memory": lambda m: [setattr(p, "data", p.detach().t().contiguous().t()) for p in m.parameters()],
    "in double and back": lambda m: m.double().float(),
}


@MODES
@pytest.mark.parametrize("how", STAYING)
def test_what_stays_is_held_under_whatever_name(how: str, mode: Any) -> None:
    model, optimizer = frozen()
    held = guard(model, optimizer, mode=mode)
    STAYING[how](model)
    optimizer.step()
    optimizer.step()
    for tensor in [p for p in model.parameters() if not p.requires_grad]:
        value = tensor.detach().clone()
        tensor.data.add_(1)
        if mode == "raise":
            with pytest.raises(FrozenMoved, match="something wrote to it"):
                held.check()
            held.accept()
        else:
            held.check()
            assert torch.equal(tensor, value)


@pytest.mark.parametrize("mode", ["raise", "restore", "allowed"])
def test_an_adapter_that_is_merged_into_a_frozen_weight_moves_it_though_the_weight_had_another_name(mode: Any) -> None:
    model, optimizer = frozen()
    before = model[0].weight.detach().clone()
    held = guard(model, optimizer, mode="raise" if mode == "allowed" else mode)
    parametrize.register_parametrization(model[0], "weight", Adapter())
    optimizer.step()
    with held.allow() if mode == "allowed" else nullcontext():
        parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model[0].weight, before + 1)
    if mode == "raise":
        with pytest.raises(FrozenMoved, match=r"frozen tensors moved outside.*\n  '0.weight'"):
            optimizer.step()
        return
    optimizer.step()
    assert torch.equal(model[0].weight, before + (mode == "allowed"))


@pytest.mark.parametrize("again", [lambda m: freeze(m, norm="freeze"), lambda m: m.requires_grad_(False)])
def test_what_trains_between_two_steps_of_a_guarded_optimizer(again: Change) -> None:
    """As a discriminator that an optimizer of its own steps."""
    model, optimizer = frozen()
    held = guard(model, optimizer)
    for _ in range(2):
        unfreeze(model)
        model[0].weight.data.add_(1)
        model[1].running_mean.add_(1)
        again(model)
        held.check()
    unfreeze(model)
    for _ in range(2):
        with freeze(model, norm="freeze"):
            held.check()
        model[0].weight.data.add_(1)


@pytest.mark.parametrize("size", [64, 100, 200, 300])
def test_memory_at_the_address_that_a_frozen_tensor_had_is_not_written_to(size: int) -> None:
    """As where it is emptied before a checkpoint is read: allocators give the same address again, for some sizes."""
    model = nn.Sequential(nn.Linear(size, size))
    freeze(model)
    held = guard(model, SGD(net().parameters(), lr=0.1), mode="restore")
    before = model[0].weight.detach().clone()
    model[0].weight.data = torch.empty(0)
    loaded = torch.full((size, size), 7.0)
    model[0].weight.data = loaded
    held.check()
    assert torch.equal(model[0].weight, before)
    assert bool((loaded == 7).all())


def test_memory_that_was_put_into_a_frozen_tensor_is_not_written_to() -> None:
    """As a trainer that swaps in averaged weights: restoring wrote the old ones into the average."""
    model, optimizer = frozen()
    held = guard(model, optimizer, mode="restore")
    before = model[0].weight.detach().clone()
    average = model[0].weight.detach() + 1
    model[0].weight.data = average
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert torch.equal(average, before + 1)
    model[0].weight.data.add_(1)
    held.check()
    assert torch.equal(model[0].weight, before)
    assert held.undone == {"0.weight": 2}
