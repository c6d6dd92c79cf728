"""guard beside statistics, closures, LBFGS, lazy and converted parameters, and its handle."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.optim import LBFGS, SGD, Optimizer

from freezekit.freezing import freeze, unfreeze
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
    for mode, stale in product(("raise", "restore"), (True, False)):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def closure(model: nn.Module = model, optimizer: Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(3, 2)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        if not stale:
            optimizer.zero_grad()
        model[0].requires_grad_(False)
        before = model[0].weight.clone()
        with guard(model, optimizer, mode=mode) as held:
            if mode == "raise":
                with pytest.raises(FrozenMoved, match=r"LBFGS writes .* remove=True, state='reset'"):
                    optimizer.step(closure)
                assert torch.equal(model[0].weight, before) == stale, "a copy is kept of what has a gradient"
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


@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_shards_are_held(mode: Any, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        shards = distribute_tensor(model.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        model.weight = nn.Parameter(shards, requires_grad=False)
        before = shards.to_local().clone()
        average = before + 2
        with guard(model, SGD([model.bias], lr=0.1), mode=mode) as held:
            held.check()
            with torch.no_grad():
                model.weight.to_local().add_(1)
            with pytest.raises(FrozenMoved) if mode == "raise" else nullcontext():
                held.check()
            assert torch.equal(model.weight.to_local(), before + (mode == "raise"))
            model.weight._local_tensor.data = average  # which nothing public can put back
            with pytest.raises(FrozenMoved):
                held.check()
        assert torch.equal(average, before + 2)
    finally:
        dist.destroy_process_group()


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
    allowance = held.allow("1")
    held.remove()
    held.remove()
    allowance.end()
    for call in (held.check, held.accept, held.allow):
        with pytest.raises(RuntimeError, match="this guard was removed"):
            call()
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


def test_steps_after_a_scripted_model_was_unfrozen() -> None:
    """Any optimizer's: the hook that waits for steps is for all of them."""
    model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, "0", norm="freeze")
    with guard(model, optimizer):
        optimizer.step()
        unfreeze(model, "0")
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
    other = torch.nn.Linear(2, 2)
    torch.optim.SGD(other.parameters()).step()
