"""guard beside statistics, closures, LBFGS, lazy and converted parameters, and its handle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize, prune
from torch.optim import LBFGS, SGD, Optimizer

from freezekit.freezing import freeze, freeze_state, load_freeze_state, unfreeze
from freezekit.guarding import FrozenMoved, guard
from tests.freezing.cases import Choice
from tests.freezing.guarded import backward, learn, same, trained


def test_statistics_are_held_too() -> None:
    model, optimizer = trained()
    freeze(model, "0.1", optimizer=optimizer)
    with guard(model, optimizer) as held:
        model.train()
        learn(model, optimizer)
        model[0][1].training = True  # past train()
        with pytest.raises(FrozenMoved, match=r"'0\.1': its \.training was set past train\(\)"):
            optimizer.step()
        backward(model)  # and now they moved
        with pytest.raises(FrozenMoved) as error:
            held.check()
    assert error.value.names == ("0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked")


def test_restore_puts_statistics_and_mode_back() -> None:
    model, optimizer = trained()
    freeze(model, "0.1", optimizer=optimizer)
    before = copy.deepcopy(model[0][1].state_dict())
    with guard(model, optimizer, mode="restore"):
        model[0][1].training = True
        learn(model, optimizer)
    assert same(dict(model[0][1].state_dict()), dict(before))
    assert not model[0][1].training


def test_a_replaced_buffer_is_seen() -> None:
    model, optimizer = trained()
    freeze(model, "0.1", optimizer=optimizer)
    with guard(model, optimizer) as held:
        model[0][1].running_mean = model[0][1].running_mean + 1
        with pytest.raises(FrozenMoved, match="running_mean"):
            held.check()


def test_freezing_and_unfreezing_under_guard() -> None:
    model, optimizer = trained()
    with guard(model, optimizer, every=1):
        learn(model, optimizer)
        with freeze(model, "1", optimizer=optimizer, remove=True):
            learn(model, optimizer)
        unfreeze(model, "1", optimizer=optimizer)
        before = model[1].weight.clone()
        learn(model, optimizer)
        assert not torch.equal(model[1].weight, before)
        freeze(model, "1", optimizer=optimizer)  # at its new value
        learn(model, optimizer)


def test_lbfgs_that_holds_a_frozen_parameter() -> None:
    for mode in ("raise", "restore"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def closure(model: nn.Module = model, optimizer: Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(3, 2)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()
        model[0].requires_grad_(False)
        before = model[0].weight.clone()
        with guard(model, optimizer, mode=mode) as held:
            if mode == "raise":
                with pytest.raises(FrozenMoved, match=r"LBFGS writes .* remove=True, state='reset'"):
                    optimizer.step(closure)
            else:
                optimizer.step(closure)
                assert torch.equal(model[0].weight, before)
                assert held.undone == {"0.weight": 1, "0.bias": 1}


def test_sparse_gradients_are_read() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    model(torch.tensor([1])).sum().backward()
    model.weight.requires_grad_(False)
    with guard(model, optimizer), pytest.raises(FrozenMoved, match=r"\.grad is stale"):
        optimizer.step()


def test_a_closure_that_makes_a_gradient_for_a_frozen_parameter() -> None:
    for options in ({}, {"fused": True}):
        model, optimizer = trained(Choice(SGD, {"lr": 0.1, **options}))
        freeze(model, "1", optimizer=optimizer)
        before = model[1].weight.clone()

        def closure(model: nn.Module = model) -> None:
            model[1].weight.grad = torch.ones_like(model[1].weight)

        with guard(model, optimizer, mode="restore"):
            optimizer.step(closure)
        assert torch.equal(model[1].weight, before)
        model[1].weight.grad = None
        with guard(model, optimizer), pytest.raises(FrozenMoved, match=r"1\.weight"):
            optimizer.step(closure)


def test_a_change_of_dtype_cannot_be_undone_and_says_so() -> None:
    for mode in ("raise", "restore"):
        model, optimizer = trained()
        freeze(model, optimizer=optimizer)
        with guard(model, optimizer, mode=mode) as held:
            model.double()
            with pytest.raises(FrozenMoved, match=r"it was torch.float32 \(4, 4\) and is torch.float64"):
                held.check()


def test_lazy_parameters_are_held_once_they_have_data() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    optimizer = SGD(model[1].parameters(), lr=0.1)
    freeze(model, "0")
    with guard(model, optimizer, every=1) as held:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        model[0].weight.data.add_(1)
        with pytest.raises(FrozenMoved, match=r"0\.weight"):
            held.check()


SPARSE = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "bsr": lambda x: x.to_sparse_bsr((2, 2)),
    "bsc": lambda x: x.to_sparse_bsc((2, 2)),
}


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta")
@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_sparse_tensors_are_held(layout: str, mode: str) -> None:
    model = nn.Linear(2, 2)
    model.graph = nn.Parameter(
        SPARSE[layout](torch.eye(4)), requires_grad=False
    )  # an adjacency, as in networks of graphs
    optimizer = SGD([model.weight], lr=0.1)
    with guard(model, optimizer, every=1, mode=mode) as held:
        optimizer.step()
        held.check()
        (model.graph._values() if layout == "coo" else model.graph.values()).data.mul_(2)
        if mode == "raise":
            with pytest.raises(FrozenMoved, match="'graph'"):
                held.check()
        else:
            held.check()
            assert held.undone == {"graph": 1}
            assert torch.equal(model.graph.to_dense(), torch.eye(4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_tensors_are_held() -> None:
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), requires_grad=False)
    with guard(model, SGD([model.weight], lr=0.1), every=1) as held:
        held.check()
        model.codes.data.copy_(torch.zeros(4))
        with pytest.raises(FrozenMoved, match="'codes'"):
            held.check()


def test_the_handle_ends_it() -> None:
    model, optimizer = trained()
    held = guard(model, optimizer)
    model[1].weight.requires_grad_(False)
    held.remove()
    held.remove()
    optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"every": 0}, ValueError, "every must be a number of steps from 1 on, got 0"),
        ({"every": True}, ValueError, "every must be a number of steps from 1 on, got True"),
        ({"mode": "warn"}, ValueError, 'mode must be "raise" or "restore", got \'warn\''),
        ({"model": 3}, TypeError, "model must be an nn.Module, got int"),
        ({"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer or several, got int 3"),
    ],
)
def test_arguments_are_checked(arguments: dict, error: type[Exception], says: str) -> None:
    model, optimizer = trained()
    with pytest.raises(error) as caught:
        guard(**{"model": model, "optimizer": optimizer, **arguments})
    assert says in str(caught.value)


def normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def weight_normed() -> nn.Module:
    model = normed()
    torch.nn.utils.weight_norm(model[0])
    return model


def another_weight(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.randn(4, 3, 3, 3))


REPLACING: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object], str]] = {
    "weight norm removed": (weight_normed, lambda m: torch.nn.utils.remove_weight_norm(m[0]), "'0.weight': it trains"),
    "weight norm added": (normed, lambda m: torch.nn.utils.weight_norm(m[0]), "'0.weight_g': it trains"),
    "another parameter": (normed, another_weight, "'0.weight': it trains in place of '0.weight'"),
    "another norm": (normed, nn.SyncBatchNorm.convert_sync_batchnorm, "'1.running_mean': it is in a SyncBatchNorm now"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("mode", ["raise", "restore"])
@pytest.mark.parametrize("how", REPLACING)
def test_what_takes_the_place_of_a_frozen_tensor_and_learns_or_moves_is_told_before_the_step(
    how: str, mode: Any
) -> None:
    make, change, says = REPLACING[how]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "0", "1", norm="freeze")
    held = guard(model, optimizer, mode=mode)
    change(model)
    for _ in range(2):
        with pytest.raises(FrozenMoved, match=r"was not told to unfreeze it\n(.*\n)*.*" + says):
            optimizer.step()
    freeze(model, "0", "1", norm="freeze")
    optimizer.step()
    unfreeze(model, "0", "1")
    optimizer.step()
    held.remove()


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("how", REPLACING)
def test_what_was_unfrozen_first_or_is_accepted_may_be_replaced(how: str) -> None:
    make, change, _ = REPLACING[how]
    for accepted in (False, True):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        freeze(model, "0", "1", norm="freeze")
        held = guard(model, optimizer)
        if not accepted:
            unfreeze(model, "0", "1")
        change(model)
        if accepted:
            held.accept()
        optimizer.step()


def assigned(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("change", [REPLACING["weight norm added"][1], another_weight, assigned])
def test_what_was_replaced_first_and_then_unfrozen_trains(change: Callable[[nn.Module], object]) -> None:
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "0", "1", norm="freeze")
    guard(model, optimizer)
    change(model)
    unfreeze(model, "0")
    optimizer.step()


def test_what_was_replaced_first_and_then_unfrozen_by_a_state_trains() -> None:
    """As at a resume under guard; what the state holds frozen is still held."""
    model, other = normed(), normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "0", "1", norm="freeze")
    freeze(other, "1", norm="freeze")
    held = guard(model, optimizer)
    assigned(model)
    load_freeze_state(model, freeze_state(other))
    optimizer.step()
    with torch.no_grad():
        model[0].weight.add_(1)
        model[1].weight.add_(1)
    with pytest.raises(FrozenMoved) as error:
        held.check()
    assert error.value.names == ("1.weight",)


def test_a_parameter_names_what_took_its_own_place() -> None:
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "0")
    guard(model, optimizer)
    assigned(model)
    model.requires_grad_()
    with pytest.raises(FrozenMoved) as error:
        optimizer.step()
    assert "'0.weight': it trains in place of '0.weight', which is gone" in str(error.value)
    assert "'0.bias': it trains in place of '0.bias', which is gone" in str(error.value)


def test_a_new_layer_is_no_replacement_of_a_parameter_of_the_model_around_it() -> None:
    """As a vision transformer that loses its frozen token and gets another head."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.token = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "token", "0")
    guard(model, optimizer)
    model.token = None
    model[1] = nn.Linear(2, 3)
    optimizer.step()


def test_new_layers_adapters_and_other_forms_of_a_frozen_parameter_are_no_replacement() -> None:
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "0", "1", norm="freeze")
    guard(model, optimizer)
    model[0].lora = nn.Parameter(torch.randn(4, 3))  # beside the frozen weight
    model[2] = nn.Conv2d(4, 2, 1)
    optimizer.step()
    prune.l1_unstructured(model[0], "weight", 0.5)
    optimizer.step()
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    optimizer.step()
    parametrize.remove_parametrizations(model[0], "bias", leave_parametrized=False)
    optimizer.step()
    model[0] = nn.Conv2d(3, 4, 3)  # a layer of its own, which was never frozen
    optimizer.step()
    with torch.no_grad():
        model.load_state_dict(model.state_dict(), assign=True)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_wrapper_that_shortens_the_names_of_parameters() -> None:
    model = checkpoint_wrapper(weight_normed())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "0.bias", "0.weight_g", "0.weight_v")
    assert "0.bias" in dict(model.named_parameters())
    assert "0" not in dict(model.named_modules())
    guard(model, optimizer)
    optimizer.step()
    torch.nn.utils.remove_weight_norm(model._checkpoint_wrapped_module[0])
    with pytest.raises(FrozenMoved, match=r"'0.weight': it trains in place of '0.weight_[gv]', which is gone"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_another_frozen_layer_of_the_same_name_is_told_and_keeps_its_values(mode: Any) -> None:
    """As another pretrained stage: restoring wrote the old one's values into it."""
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "0", norm="freeze")
    held = guard(model, optimizer, mode=mode)
    model[0] = nn.Conv2d(3, 4, 3).requires_grad_(False)
    before = model[0].weight.clone()
    with pytest.raises(FrozenMoved, match=r"'0\.weight': it is another layer's now"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    held.accept()
    optimizer.step()
    model[0].weight.data.add_(1)
    if mode == "raise":
        with pytest.raises(FrozenMoved, match=r"'0\.weight': something wrote to it"):
            held.check()
    else:
        held.check()
        assert torch.equal(model[0].weight, before)


MOVING: dict[str, Callable[[nn.Sequential], object]] = {
    "inserted": lambda m: m.insert(0, nn.Linear(3, 3)),
    "frozen one inserted": lambda m: m.insert(0, nn.Linear(3, 3).requires_grad_(False)),
    "dropped": lambda m: m.pop(0),
    "swapped": lambda m: [m.__setitem__(i, layer) for i, layer in enumerate([m[1], m[0]])],
    "wrapped": lambda m: [m.__setitem__(i, layer) for i, layer in enumerate([m[1], nn.Sequential(m[0])])],
}


@pytest.mark.parametrize("mode", ["raise", "restore"])
@pytest.mark.parametrize("how", MOVING)
def test_frozen_layers_that_change_places_are_held_to_their_own_values(how: str, mode: Any) -> None:
    """As in a stack that grows or loses a layer: restoring wrote one layer's values into another."""
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = list(model)[:3]
    before = [layer.weight.detach().clone() for layer in layers]
    freeze(model, *layers)
    held = guard(model, optimizer, mode=mode)
    MOVING[how](model)
    optimizer.step()
    assert all(map(torch.equal, before, [layer.weight for layer in layers]))
    layers[1].weight.data.add_(1)
    if mode == "raise":
        with pytest.raises(FrozenMoved, match=r"weight': something wrote to it"):
            held.check()
    else:
        held.check()
        assert torch.equal(layers[1].weight, before[1])


@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_layers_that_change_places_and_get_other_tensors_at_once_are_told_and_keep_their_values(mode: Any) -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "0", "1")
    guard(model, optimizer, mode=mode)
    model.insert(0, nn.Linear(3, 3))
    assigned(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FrozenMoved, match=r"'1\.weight': it is another layer's now"):
        optimizer.step()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_norms_that_share_a_buffer_are_held(mode: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1]._buffers["running_mean"] = model[0].running_mean
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, norm="freeze")
    held = guard(model, optimizer, mode=mode)
    optimizer.step()
    before = model[0].running_mean.clone()
    model[0].running_mean.add_(1)
    with pytest.raises(FrozenMoved) if mode == "raise" else nullcontext():
        optimizer.step()
    held.remove()
    assert torch.equal(model[0].running_mean, before) == (mode == "restore")


class Adapter(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones_like(weight))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale


@pytest.mark.parametrize("mode", ["raise", "restore", "allowed"])
def test_an_adapter_that_is_merged_into_a_frozen_weight_moves_it_though_the_weight_had_another_name(mode: Any) -> None:
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "0", norm="freeze")
    before = model[0].weight.detach().clone()
    held = guard(model, optimizer, mode="raise" if mode == "allowed" else mode)
    parametrize.register_parametrization(model[0], "weight", Adapter(model[0].weight))
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


def test_steps_after_a_scripted_model_was_unfrozen() -> None:
    """Any optimizer's: the hook that waits for steps is for all of them."""
    model = torch.jit.script(normed())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "0", norm="freeze")
    with guard(model, optimizer):
        optimizer.step()
        unfreeze(model, "0")
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
    other = torch.nn.Linear(2, 2)
    torch.optim.SGD(other.parameters()).step()


@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_a_checkpoint_that_was_assigned_is_not_written_to(mode: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    loaded = {name: tensor.detach() + 1 for name, tensor in model.state_dict().items()}
    kept = copy.deepcopy(loaded)
    optimizer = SGD(model[1].parameters(), lr=0.1)
    held = guard(model, optimizer, mode=mode)
    model.load_state_dict(loaded, assign=True)
    with pytest.raises(FrozenMoved, match="another tensor, of another value, was put in its place"):
        optimizer.step()
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)
    held.accept()
    optimizer.step()
