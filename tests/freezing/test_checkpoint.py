"""Freezing across a restart: by name, strict, and with errors that say what does not fit."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

from freezekit.auditing import audit
from freezekit.freezing import freeze, freeze_state, is_held, load_freeze_state, unfreeze
from tests.freezing.cases import Tied


def build(seed: int = 0) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    rest = [*model[1].parameters(), *model[2].parameters()]
    return model, Adam([{"params": model[0].parameters()}, {"params": rest, "lr": 0.1}], lr=0.01)


def learn(model: nn.Module, optimizer: Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 2, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("remove", [False, True])
def test_a_resumed_run_goes_on_as_one_that_never_stopped(remove: bool) -> None:
    model, optimizer = build()
    learn(model, optimizer)
    freeze(model, "0", "1", "2.bias", optimizer=optimizer, remove=remove)
    learn(model, optimizer)
    saved = through_a_file([model.state_dict(), freeze_state(model, optimizer), optimizer.state_dict()])

    other, fresh = build(seed=1)
    other.load_state_dict(saved[0])
    load_freeze_state(other, saved[1], fresh)
    fresh.load_state_dict(saved[2])
    assert not other.train()[1].training
    for run in ((model, optimizer), (other, fresh)):
        learn(*run, seed=1)
        unfreeze(run[0], optimizer=run[1])
        assert [len(group["params"]) for group in run[1].param_groups] == [2, 4]
        learn(*run, seed=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert optimizer.state_dict()["param_groups"] == fresh.state_dict()["param_groups"]


def test_an_optimizer_built_from_the_trainable_ones_alone_can_be_resumed_into() -> None:
    model, optimizer = build()
    learn(model, optimizer)
    freeze(model, "2.weight", optimizer=optimizer, remove=True)
    freeze(model, "1.weight", optimizer=optimizer, remove=True)
    saved = [copy.deepcopy(freeze_state(model, optimizer)), optimizer.state_dict()]
    other, _ = build()
    fresh = Adam([{"params": other[0].parameters()}, {"params": [other[1].bias, other[2].bias]}])
    load_freeze_state(other, saved[0], fresh)
    fresh.load_state_dict(saved[1])
    unfreeze(other, optimizer=fresh)
    by_id = {id(p): name for name, p in other.named_parameters()}
    order = [by_id[id(p)] for p in fresh.param_groups[1]["params"]]
    assert order == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert fresh.state[other[2].weight]["step"] == 1
    learn(other, fresh)
    assert saved[0]["removed"][0]["2.weight"]["state"]["step"] == 1, "what was loaded from must not step along"


def test_it_is_plain_data() -> None:
    model, _ = build()
    freeze(model, "1")
    state = freeze_state(model)
    assert json.loads(json.dumps(state)) == state
    assert state == {
        "version": 1,
        "frozen": ["1.weight", "1.bias"],
        "trainable": ["0.weight", "0.bias", "2.weight", "2.bias"],
        "statistics": {"1": True},
        "batch": [],
        "learns": [],
        "removed": None,
    }


def test_loading_unfreezes_the_rest_and_can_be_undone() -> None:
    model, optimizer = build()
    state = freeze_state(model, optimizer)
    learn(model, optimizer)
    freeze(model, optimizer=optimizer, remove=True)
    with load_freeze_state(model, state, optimizer) as result:
        assert len(result.params) == 6
        assert result.norms == ("1",)
        assert all(p.requires_grad for p in model.parameters())
        assert model[1].training
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    assert not any(p.requires_grad for p in model.parameters())
    assert is_held(model[1])
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 0]


def test_gradients_of_what_becomes_frozen_are_dropped() -> None:
    model, optimizer = build()
    with freeze(model, "0"):
        state = freeze_state(model)
    learn(model, optimizer)
    result = load_freeze_state(model, state)
    assert result.grads == ("0.weight", "0.bias")
    assert model[0].weight.grad is None


def test_tied_names_fit_either_way() -> None:
    model = Tied()
    freeze(model, "back.weight")
    state = freeze_state(model)
    assert state["frozen"] == ["there.weight"]
    state["frozen"] = ["back.weight"]  # as an untied or reordered model would have saved it
    other = Tied()
    load_freeze_state(other, state)
    assert not other.there.weight.requires_grad


def test_names_that_do_not_fit_are_listed_and_nothing_changes() -> None:
    model, _ = build()
    freeze(model, "0")
    state = freeze_state(model)
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model has no '2\.weight' \(near: .*strict=False takes what fits"):
        load_freeze_state(other, state)
    assert all(p.requires_grad for p in other.parameters())
    result = load_freeze_state(other, state, strict=False)
    assert result.skipped == ("2.weight", "2.bias", "1")
    assert not other[0].weight.requires_grad
    bigger = nn.Sequential(*model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"state says nothing of '3\.weight'"):
        load_freeze_state(bigger, state)


def test_statistics_that_do_not_fit() -> None:
    model, _ = build()
    freeze(model)
    state = freeze_state(model)
    model[1] = nn.GroupNorm(1, 2)
    with pytest.raises(ValueError, match="model has no layer with running statistics '1'"):
        load_freeze_state(model, state)
    assert load_freeze_state(model, state, strict=False).skipped == ("1",)
    del state["statistics"]["1"]
    other, _ = build()
    freeze(other, "1")
    with pytest.raises(ValueError, match="state says nothing of the statistics of '1'"):
        load_freeze_state(other, state)
    load_freeze_state(other, state, strict=False)
    assert is_held(other[1])


def test_a_layer_frozen_by_a_load_follows_the_model_when_it_is_unfrozen() -> None:
    model, _ = build()
    freeze(model)
    state = freeze_state(model.eval())  # as in the middle of a validation
    other, _ = build()
    load_freeze_state(other, state)
    assert not other[1].training
    unfreeze(other)
    assert other[1].training


def found(model: nn.Module) -> list[tuple[str, str]]:
    return [(finding.severity, finding.code) for finding in audit(model)]


def test_what_was_asked_of_norms_is_known_after_a_resume() -> None:
    def moving() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))

    model, other = moving(), moving()
    freeze(model, "0", "1", norm="batch")
    freeze(model, "3", norm="freeze")
    unfreeze(model, "3", norm="freeze")
    state = through_a_file(freeze_state(model))
    assert state["batch"] == ["1"]
    assert state["learns"] == ["3"]
    asked = [("info", "moving-statistics")]
    assert found(model) == asked
    with load_freeze_state(other, state):
        assert found(other) == asked
        assert freeze_state(other) == state
    assert not freeze_state(other)["batch"]
    load_freeze_state(other, state)
    assert found(copy.deepcopy(other)) == found(pickle.loads(pickle.dumps(other))) == asked
    freeze(other, "3", norm="freeze")
    other[3].weight.requires_grad_(True)
    assert ("warning", "held-statistics") in found(other), "an older unfreeze must not speak for it"

    old = {key: value for key, value in state.items() if key not in ("batch", "learns")}
    for fresh in (moving(), model):
        before = freeze_state(fresh)
        load_freeze_state(fresh, old)
        assert [is_held(fresh[1]), is_held(fresh[3])] == [False, True]
        assert [freeze_state(fresh)[key] for key in ("batch", "learns")] == [before["batch"], before["learns"]]
    freeze(model, norm="freeze")
    assert not freeze_state(model)["batch"]


def test_a_state_fits_with_and_without_a_wrapper() -> None:
    def wrapped(model: nn.Module) -> nn.Module:
        return nn.DataParallel(torch.compile(model, backend="eager"))

    model, optimizer = build()
    freeze(model, "0", "1", optimizer=optimizer, remove=True)
    state = freeze_state(model, optimizer)
    assert freeze_state(wrapped(model), optimizer) == state

    def old(part: Any) -> Any:  # as it was written of a wrapped model
        if isinstance(part, dict):
            return {f"module._orig_mod.{name}": value for name, value in part.items()}
        return [f"module._orig_mod.{each}" if isinstance(each, str) else old(each) for each in part]

    before = {key: value if key == "version" else old(value) for key, value in state.items()}
    for given in (state, before):
        for wrap in (wrapped, lambda model: model):
            other, fresh = build()
            load_freeze_state(wrap(other), given, fresh)
            assert freeze_state(other, fresh) == state
    average = torch.optim.swa_utils.AveragedModel(model)  # has a part of that name itself
    assert load_freeze_state(average, freeze_state(average)).already == ()
    assert "module.0.weight" in freeze_state(average)["frozen"]


def test_a_lazy_layer_is_frozen_before_it_has_a_size() -> None:
    def lazy() -> nn.Sequential:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.LazyConv2d(2, 3))

    model, other = lazy(), lazy()
    freeze(model, "0", "1", norm="freeze")
    load_freeze_state(other, freeze_state(model))
    for net in (model, other):
        net.train()(torch.randn(2, 3, 8, 8)).sum().backward()
        assert [p.requires_grad for p in net.parameters()] == [False] * 4 + [True] * 2
        assert is_held(net[1])
        assert net[1].num_batches_tracked == 0
        unfreeze(net)
        assert net[1].training


def broken(**changes: Any) -> dict[str, Any]:
    model, optimizer = build()
    freeze(model, "0", optimizer=optimizer, remove=True)
    return {**freeze_state(model, optimizer), **changes}


ENTRY = {"group": 0, "position": 0, "state": {}}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ([], "state must be the dict that freeze_state returns, got list"),
        ({}, "state: not from freeze_state, it has no 'version', 'frozen', 'trainable', 'statistics', 'removed'"),
        (broken(version=2), "state: version 2, and this freezekit reads version 1"),
        (broken(frozen="0.weight"), "state: 'frozen' must be a list of names, got '0.weight'"),
        (broken(trainable=[1]), "state: 'trainable' must be a list of names, got [1]"),
        (broken(statistics={"1": "yes"}), "state: 'statistics' must map names to bools"),
        (broken(batch="1"), "state: 'batch' must be a list of names in 'statistics', got '1'"),
        (broken(learns=["0"]), "state: 'learns' must be a list of names in 'statistics', got ['0']"),
        (broken(trainable=["0.weight"]), "state: both frozen and trainable: 0.weight"),
        (broken(removed={}), "state: 'removed' must be a list of dicts or None"),
        (
            broken(removed=[{"0.weight": {"group": 0}}]),
            "'removed' entry '0.weight' must hold group, position",
        ),
        (broken(removed=[{"0.weight": {**ENTRY, "group": -1}}]), "state: group of removed '0.weight' must be an index"),
        (broken(removed=[{"0.weight": {**ENTRY, "group": 7}}]), "'0.weight' belongs to group 7 in state"),
        (broken(removed=[{"gone": ENTRY}]), "state: 'removed' names 'gone', which is neither frozen nor trainable"),
        (broken(removed=None), "state was taken with none and 1 given"),
        (broken(removed=[{}, {}]), "state was taken with 2 and 1 given"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_corrupt_states_are_refused_before_anything_changes(state: Any, says: str) -> None:
    model, optimizer = build()
    with pytest.raises(ValueError) as caught:
        load_freeze_state(model, state, optimizer)
    assert says in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]


def test_the_optimizer_must_be_there_when_it_is_needed() -> None:
    model, _ = build()
    with pytest.raises(ValueError, match="optimizer: state has 2 parameters out of their optimizer; pass optimizer="):
        load_freeze_state(model, broken())
    other = SGD(model.parameters(), lr=0.1)
    state = broken()
    state["removed"][0]["0.weight"]["group"] = 1
    with pytest.raises(ValueError, match=r"belongs to group 1 in state, and the optimizer has it in group 0"):
        load_freeze_state(model, state, other)


@pytest.mark.parametrize("part", ["0", "1"])
def test_lbfgs_has_its_history_from_its_own_state_dict(part: str) -> None:
    def run(model: nn.Module, optimizer: Optimizer) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(3, 2)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=3)
    freeze(model, part, optimizer=optimizer, remove=True, state="reset")
    run(model, optimizer)
    saved = copy.deepcopy([model.state_dict(), freeze_state(model, optimizer), optimizer.state_dict()])
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    used = LBFGS(other.parameters(), lr=0.1, max_iter=3)
    run(other, used)  # a history over all parameters, which must not meet the fewer ones
    load_freeze_state(other, saved[1], used)
    run(other, used)
    other.load_state_dict(saved[0])
    used.load_state_dict(saved[2])
    run(model, optimizer)
    run(other, used)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    unfreeze(other, part, optimizer=used, state="reset")
    run(other, used)
