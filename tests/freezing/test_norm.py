"""Held running statistics: used, kept, proof against train(), and carried by every way of copying a module."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from freezekit.freezing import NormWarning, freeze, is_held, unfreeze
from freezekit.freezing.norm import has_statistics
from freezekit.guarding import FrozenMoved, guard

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
    "bare": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 2, 2)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (4, 3, 2, 2)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, track_running_stats=True), (4, 3, 2, 2)),
}


def seen(make: Callable[[], nn.Module], size: tuple[int, ...]) -> nn.Module:
    """A model of one norm whose statistics are no longer those of its start."""
    model = nn.Sequential(make())
    for buffer in model.buffers():
        buffer.add_(torch.rand(buffer.shape).to(buffer.dtype) if buffer.is_floating_point() else 3)
    return model


@pytest.mark.parametrize("name", NORMS)
def test_a_frozen_norm_uses_and_keeps_its_statistics(name: str) -> None:
    make, size = NORMS[name]
    model = seen(make, size)
    x = torch.randn(size)
    want = copy.deepcopy(model).eval()(x)
    before = [buffer.clone() for buffer in model.buffers()]
    freeze(model)
    model.train()
    assert is_held(model[0])
    assert model.training
    assert not model[0].training
    assert torch.equal(model(x), want)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("name", [name for name in NORMS if name != "SyncBatchNorm"])  # in training it needs a GPU
def test_unfreeze_gives_back_batch_statistics(name: str) -> None:
    make, size = NORMS[name]
    model = seen(make, size)
    twin = copy.deepcopy(model)
    x = torch.randn(size)
    freeze(model)
    unfreeze(model)
    assert torch.equal(model(x), twin(x))
    assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), model.buffers(), strict=True))


@pytest.mark.parametrize(("asked", "mode"), [([], True), ([False], False), ([False, True], True), ([True], True)])
def test_unfreeze_returns_to_the_mode_of_the_model(asked: list[bool], mode: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    freeze(model)
    for one in asked:
        assert model.train(one) is model
        assert model[0].train(one) is model[0]
    unfreeze(model)
    assert model[0].training is mode
    assert "train" not in vars(model.train(mode)[0])


def test_a_norm_that_was_in_eval_returns_to_eval() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].eval()
    freeze(model)
    unfreeze(model)
    assert not model[0].training


@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy])
def test_a_norm_frozen_between_recording_and_restoring_is_told_and_put_right_at_the_next_step(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    """As Lightning does around a validation: its modes are attributes that it writes, past ``train()``."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    recorded = [module.training for module in model.modules()]
    freeze(model.eval(), "1")
    model = duplicate(model)
    for module, mode in zip(model.modules(), recorded, strict=True):
        module.training = mode
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 2)
    model(x).sum().backward()
    with pytest.warns(NormWarning, match=r"^BatchNorm1d\(2, .*past train\(\).*on_train_epoch_start"):
        optimizer.step()
    before = model[1].running_mean.clone()
    model(x).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy])
def test_a_norm_released_between_recording_and_restoring_is_told_and_trains_from_the_next_step_on(
    duplicate: Callable[[nn.Module], nn.Module], again: bool
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    freeze(model, "1", norm="freeze")
    recorded = [module.training for module in model.modules()]
    unfreeze(model.eval(), "1")
    model = duplicate(model)
    for module, mode in zip(model.modules(), recorded, strict=True):
        module.training = mode
    if again:  # what follows is what it is to have been trained
        freeze(model, "1", norm="freeze")
        unfreeze(model, "1")
        assert model[1][0].training
    optimizer, norm, x = torch.optim.SGD(model.parameters(), lr=0.1), model[1][0], torch.randn(4, 2)
    model(x).sum().backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step()
    assert [w.category for w in told] == [] if again else [NormWarning]
    assert again or str(told[0].message).startswith("BatchNorm1d(2, ")
    assert norm.training
    assert "train" not in vars(norm)
    norm.eval()  # by hand
    optimizer.step()
    assert not norm.training


@pytest.mark.parametrize("evaluate", [lambda norm: norm.eval(), lambda norm: norm.train(False)])
def test_a_released_norm_in_eval_mode_by_hand_is_left_alone(evaluate: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    freeze(model, "1", norm="freeze")
    unfreeze(model.eval(), "1")
    evaluate(model.train()[1])
    model(torch.randn(4, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not model[1].training


def test_a_norm_released_while_it_evaluates_is_plain_torch_in_a_file_and_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    freeze(model, "1", norm="freeze")
    unfreeze(model.eval(), "1")
    assert b"freezekit" not in pickle.dumps(model)
    for other in (pickle.loads(pickle.dumps(model)), loaded(model)):
        assert other.train()[1].training
        assert not other.eval()[1].training
        freeze(other, norm="freeze")
        unfreeze(other)
        assert other.train()[1].training
    alone = copy.deepcopy(model[1])
    assert alone.train().training
    assert not model[1].training


@pytest.mark.parametrize("released", [False, True], ids=["held", "released"])
@pytest.mark.parametrize("evaluates", [False, True])
def test_a_shallow_copy_has_a_mode_of_its_own(released: bool, evaluates: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train(not evaluates)
    freeze(model, norm="freeze")
    if released:
        unfreeze(model)
    twin = copy.copy(model[1])
    again = copy.copy(twin)
    assert type(twin) is nn.BatchNorm1d
    assert twin.running_mean is model[1].running_mean
    for one in (twin, again):
        before = model[1].training
        assert one.train() is one
        assert one.training is released
        assert one.eval() is one
        assert not one.training
        assert model[1].training is before
    unfreeze(model.train())
    assert model[1].training
    assert twin.eval() is twin
    assert model[1].training
    assert is_held(twin) is not released
    unfreeze(twin)
    assert twin.train().training
    assert model.eval()[1].training is False
    assert twin.training
    freeze(twin)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), copy.deepcopy(copy.copy(twin))):
        assert is_held(other)
        assert other.train() is other
        assert not other.training
    assert model.train()[1].training


def test_copies_of_a_layer_with_a_reduction_of_its_own_are_what_it_makes_them() -> None:
    norm, stock = Reduced(2), Reduced(2)
    freeze(norm, norm="freeze")
    for other in (copy.copy(norm), copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), copy.copy(stock)):
        assert not is_held(other)
        assert other.eval() is other
    assert stock.training


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle_holds_a_frozen_norm(protocol: int) -> None:
    norm = nn.BatchNorm1d(2)
    freeze(norm, norm="freeze")
    file = pickle.dumps(norm, protocol)
    assert b"freezekit" not in file
    assert is_held(pickle.loads(file))
    assert not is_held(pickle.loads(pickle.dumps(nn.BatchNorm1d(2), protocol)))


class Reduced(nn.BatchNorm1d):
    def __reduce__(self) -> tuple[object, ...]:
        return Reduced, (self.num_features,)


def test_a_released_norm_in_train_mode_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    freeze(model, "1")
    unfreeze(model, "1")
    model(torch.randn(4, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model[1].training


def test_norm_batch_freezes_parameters_alone_and_releases() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    assert freeze(model, norm="batch").norms == ()
    model(torch.randn(4, 2))
    assert model[0].num_batches_tracked == 1
    assert not model[0].weight.requires_grad
    assert freeze(model).norms == ("0",)
    assert freeze(model, norm="batch").norms == ("0",)
    assert not is_held(model[0])


def test_unfreeze_can_keep_the_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    freeze(model)
    unfreeze(model, norm="freeze")
    assert is_held(model[0])
    assert model[0].weight.requires_grad


def test_nothing_to_hold_without_statistics() -> None:
    for module in (nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2, affine=True), nn.GroupNorm(1, 2)):
        assert not has_statistics(module)
        freeze(module)
        assert not is_held(module)
        assert module.training


def loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), loaded])
def test_copies_are_held_by_themselves(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    freeze(model)
    other = duplicate(model)
    assert other.train()[0].training is False
    unfreeze(other)
    assert other[0].training
    assert is_held(model[0])
    assert not model.train()[0].training


def test_a_file_of_a_held_norm_needs_no_more_than_plain_names_of_python() -> None:
    names = []
    for model in (nn.Sequential(nn.BatchNorm1d(2)), nn.Sequential(nn.BatchNorm1d(2))):
        if names:
            freeze(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        names.append(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)))
    assert names[1] - names[0] == {"builtins.getattr", "functools.partial", "_warnings.warn"}


def test_a_shallow_copy_does_not_disturb_its_source() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    freeze(model)
    replica = model[0]._replicate_for_data_parallel()  # what DataParallel runs on each device
    replica.train()
    assert not replica.training
    assert not model[0].training


def test_the_state_dict_and_the_type_are_untouched() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    keys = list(model.state_dict())
    for change in (lambda: freeze(model), lambda: unfreeze(model.eval()), lambda: freeze(model, norm="batch")):
        change()
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        assert list(torch.load(file, weights_only=True)) == list(model.state_dict()) == keys
    freeze(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert repr(model) == repr(nn.Sequential(nn.BatchNorm2d(2)))
    model.load_state_dict(nn.Sequential(nn.BatchNorm2d(2)).state_dict())


def test_a_train_method_of_the_user_survives() -> None:
    calls = []

    class Noisy(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> nn.Module:
            calls.append(mode)
            return super().train(mode)

    model = nn.Sequential(Noisy(2))
    own = lambda mode=True: model[0]  # noqa: E731
    freeze(model)
    model.train()
    assert calls == [False, False]
    unfreeze(model)
    assert calls[-1] is True
    model[0].train = own
    freeze(model)
    unfreeze(model)
    assert model[0].train is own


def test_train_refuses_what_torch_refuses() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    freeze(model)
    with pytest.raises(ValueError, match="mode must be a bool, got 'yes'"):
        model[0].train("yes")


def test_fx_and_compile_see_frozen_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    freeze(model)
    x = torch.randn(2, 2, 3, 3)
    want = model(x)
    traced = torch.fx.symbolic_trace(model).train()
    assert torch.equal(traced(x), want)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled.train()
    assert torch.equal(compiled(x), want)
    counter = torch._dynamo.testing.CompileCounter()
    again = torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True)
    for _ in range(3):
        again.train()
        again(x)
    assert counter.frame_count == 1, "train() on a held norm must not recompile"


@pytest.mark.parametrize("wrap", [torch.nn.utils.parametrizations.spectral_norm, torch.nn.utils.spectral_norm])
def test_spectral_norm_stands_still(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Flatten(), wrap(nn.Linear(32, 32)))
    x = torch.randn(2, 32)
    model.requires_grad_(False)
    assert not torch.equal(model(x), model(x)), "its vectors move, so a frozen weight is not a frozen layer"
    result = freeze(model)
    model.train()
    first = model(x)
    assert torch.equal(first, model(x))
    assert len(result.norms) == 1
    unfreeze(model)
    assert not torch.equal(first, model(x))


def _again(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def _precise(data: list[torch.Tensor], model: nn.Module) -> None:
    """As tools do that compute precise statistics: reset, train mode, cumulative momentum, forwards."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # which calls reset_running_stats
            module.momentum = None
    model.train()
    for x in data:
        model(x)


@pytest.mark.parametrize("compute", [torch.optim.swa_utils.update_bn, _precise])
@pytest.mark.parametrize("duplicate", [lambda model: model, AveragedModel, copy.deepcopy, copy.copy, _again])
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "cumulative", "InstanceNorm2d"])
def test_what_computes_statistics_anew_leaves_held_ones_as_they_are_and_is_told(
    name: str,
    duplicate: Callable[[nn.Module], nn.Module],
    compute: Callable[[list[torch.Tensor], nn.Module], None],
) -> None:
    make, size = NORMS[name]
    model = seen(make, size)
    freeze(model, norm="freeze")
    model = duplicate(model)
    before = [buffer.clone() for buffer in model.buffers()]
    if name == "InstanceNorm2d" and compute is not _precise:  # which update_bn passes over
        compute([torch.randn(size)], model)
    else:
        with pytest.warns(UserWarning, match=r"freeze\(\) holds: they stay as they are, .* call unfreeze\(\) before"):
            compute([torch.randn(size)], model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    unfreeze(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute([torch.randn(size)], model)
    if name != "InstanceNorm2d":
        assert not any(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True) if a.numel() > 1)


def test_held_statistics_without_data_are_filled_by_a_reset_and_kept_once_frozen_again() -> None:
    lazy, meta = nn.LazyBatchNorm1d(), nn.BatchNorm1d(3, device="meta")
    for norm in (lazy, meta):
        freeze(norm, norm="freeze")
    lazy(torch.randn(4, 3))
    meta.to_empty(device="cpu").reset_parameters()
    for norm in (lazy, meta):
        assert norm.running_mean.tolist() == [0, 0, 0]
        assert norm.running_var.tolist() == [1, 1, 1]
        norm.running_mean.fill_(2)
        freeze(norm, norm="freeze")
        with pytest.warns(NormWarning, match="reset_running_stats"):
            norm.reset_running_stats()
        assert norm.running_mean.tolist() == [2, 2, 2]
        unfreeze(norm)
        norm.reset_running_stats()
        assert norm.running_mean.tolist() == [0, 0, 0]


def test_guard_sees_what_writes_to_held_statistics_itself() -> None:
    model = seen(*NORMS["BatchNorm1d"])
    freeze(model)
    spare = nn.Parameter(torch.zeros(1))
    with guard(model, torch.optim.SGD([spare])) as held:
        model[0].running_mean = torch.zeros_like(model[0].running_mean)  # as Lightning's weight averaging does
        with pytest.raises(FrozenMoved, match=r"0\.running_mean"):
            held.check()
