"""FreezableConv2d inside what people wrap around an nn.Conv2d: parametrizations, pruning, averages, hooks, copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import freezekit as fk
from tests.dropin.twins import assert_same, gradients, kinds, nets, turns
from tests.observe import Calls, bytes_kept

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
KINDS = (fk.FreezableConv2d, nn.Conv2d)


def both(wrap: Callable[[nn.Conv2d], Any], steps: int = 1) -> tuple[Any, Any]:
    """`wrap` applied to a layer of each kind with the same parameters."""
    made = []
    for kind in KINDS:
        torch.manual_seed(0)
        made.append(wrap(kind(3, 4, 3)))
    return made[0], made[1]


WRAPS: dict[str, Callable[[nn.Conv2d], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda conv: parametrizations.spectral_norm(conv).eval(),
    "orthogonal": parametrizations.orthogonal,
    "weight_norm, old": lambda conv: torch.nn.utils.weight_norm(conv),
    "spectral_norm, old": lambda conv: torch.nn.utils.spectral_norm(conv).eval(),
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "prune, removed": lambda conv: prune.remove(prune.random_unstructured(conv, "weight", 0.5), "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", WRAPS)
def test_reparametrized(name: str, frozen: bool) -> None:
    ours, stock = both(WRAPS[name])
    for layer in (ours, stock):
        layer.requires_grad_(not frozen)
    assert_same(gradients(ours, X), gradients(stock, X))
    if frozen and "prune" not in name:
        # The weight is made anew at each call; nothing of it needs a gradient, so the input is not kept.
        hidden = X.clone().requires_grad_()
        with Calls() as calls:
            ours(hidden).sum().backward()
        assert calls.gradients == (1, 0)


def test_half_of_a_parametrization_frozen() -> None:
    """weight_norm with a frozen direction and a trainable scale: the weight that arrives needs a gradient."""
    ours, stock = both(parametrizations.weight_norm)
    for layer in (ours, stock):
        layer.parametrizations.weight.original1.requires_grad_(False)
    assert_same(gradients(ours, X), gradients(stock, X))
    parametrize.remove_parametrizations(ours, "weight")
    assert type(ours) is fk.FreezableConv2d


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["SWA", "EMA"])
def test_averaged_models(average: Any, way: str) -> None:
    averaged = []
    for net in turns(way):
        model = AveragedModel(net, multi_avg_fn=average)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(X).square().mean().backward()
            optimizer.step()
            model.update_parameters(net)
        averaged.append({**dict(model.named_parameters()), "y": model(X)})
    assert_same(*averaged)


def test_lazy_layers_convert_once_they_know_their_size() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    lazy(X)
    expected = lazy(X)
    fk.convert(lazy)
    assert type(lazy[0]) is fk.FreezableConv2d
    assert torch.equal(lazy(X), expected)


def test_sync_batch_norm_conversion_leaves_the_convolutions() -> None:
    net = nn.Sequential(fk.FreezableConv2d(3, 4, 3), nn.BatchNorm2d(4))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert [type(m) for m in converted] == [fk.FreezableConv2d, nn.SyncBatchNorm]
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(fk.nn.FreezableBatchNorm2d(4))) is nn.SyncBatchNorm


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "load_state_dict": lambda net: (lambda new: (new.load_state_dict(net.state_dict()), new)[1])(nets()[0]),
    "torch.save": lambda net: _saved(net, weights_only=False),
}


def _saved(value: Any, weights_only: bool) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


@pytest.mark.parametrize("name", COPIES)
def test_copies_compute_the_same_and_stay_frozen(name: str) -> None:
    net = nets()[0]
    net[0].weight.requires_grad_(False)
    other = COPIES[name](net)
    if name == "load_state_dict":
        other[0].weight.requires_grad_(False)
    assert type(other[0]) is fk.FreezableConv2d
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in net.parameters()]
    assert_same(gradients(other, X), gradients(net, X))
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in net.parameters()}


def test_state_dicts_go_both_ways_with_weights_only() -> None:
    ours, stock = nets()
    assert list(ours.state_dict()) == list(stock.state_dict())
    other_ours, other_stock = (type(net)(*copy.deepcopy(list(net))) for net in (ours, stock))
    for p in (*other_ours.parameters(), *other_stock.parameters()):
        p.data.zero_()
    other_stock.load_state_dict(_saved(ours.state_dict(), weights_only=True))
    other_ours.load_state_dict(_saved(stock.state_dict(), weights_only=True))
    assert torch.equal(other_stock(X), ours(X))
    assert torch.equal(other_ours(X), stock(X))


def test_a_layer_loads_from_a_file_that_stock_wrote_before_padding_modes() -> None:
    conv = fk.FreezableConv2d(3, 4, 3, padding=1)
    state = conv.__getstate__() if hasattr(conv, "__getstate__") else conv.__dict__
    state = {k: v for k, v in state.items() if k != "padding_mode"}
    old = fk.FreezableConv2d.__new__(fk.FreezableConv2d)
    old.__setstate__(state)
    assert old.padding_mode == "zeros"
    assert torch.equal(old(X), conv(X))


def test_hooks_of_every_kind() -> None:
    seen: dict[type, list[str]] = {kind: [] for kind in KINDS}
    results = []
    for kind in KINDS:
        torch.manual_seed(0)
        conv, note = kind(3, 4, 3), seen[kind].append
        conv.register_forward_pre_hook(lambda m, args, note=note: (note("pre"), (args[0] * 2,))[1])
        conv.register_forward_pre_hook(lambda m, a, k, note=note: note("pre with kwargs"), with_kwargs=True)
        conv.register_forward_hook(lambda m, args, y, note=note: (note("forward"), y + 1)[1])
        conv.register_forward_hook(lambda m, a, y, note=note: note("always"), always_call=True)
        conv.register_full_backward_pre_hook(lambda m, g, note=note: (note("backward pre"), (g[0] * 3,))[1])
        conv.register_full_backward_hook(lambda m, gi, go, note=note: (note("backward"), (gi[0] * 2,))[1])
        conv.register_state_dict_pre_hook(lambda m, prefix, keep, note=note: note("state dict"))
        conv.register_load_state_dict_post_hook(lambda m, keys, note=note: note("load"))
        conv.weight.register_hook(lambda g, note=note: (note("weight"), g * 5)[1])
        conv.weight.register_post_accumulate_grad_hook(lambda p, note=note: note("accumulated"))
        results.append(gradients(conv, X))
        conv.load_state_dict(conv.state_dict())
    assert_same(*results)
    assert seen[KINDS[0]] == seen[KINDS[1]]
    assert len(seen[KINDS[0]]) == 11 - 1


def test_conv_forward_overridden_or_called(way: str) -> None:
    def subclass(base: type[nn.Conv2d]) -> type[nn.Conv2d]:
        class Standardized(base):  # type: ignore[valid-type, misc]
            def forward(self, x: Tensor) -> Tensor:
                weight = (self.weight - self.weight.mean((1, 2, 3), True)) / (
                    self.weight.std((1, 2, 3), keepdim=True) + 1e-5
                )
                return self._conv_forward(x, weight, self.bias)

        return Standardized

    results = []
    for kind in kinds(way):
        torch.manual_seed(0)
        results.append(gradients(subclass(kind)(3, 4, 3, padding=1, padding_mode="circular"), X))
    assert_same(*results)


EDITS: dict[str, Any] = dict(
    stride=(2, 2), padding=(2, 1), dilation=(2, 1), padding_mode="replicate", bias=None, groups=1, padding_name="same"
)


@pytest.mark.parametrize("attribute", EDITS)
def test_attributes_edited_after_construction(attribute: str, way: str) -> None:
    outputs = []
    for kind in kinds(way):
        torch.manual_seed(0)
        conv = kind(3, 4, 3, padding=1)
        setattr(conv, attribute.replace("_name", ""), EDITS[attribute])
        outputs.append(gradients(conv, X))
    assert_same(*outputs)


def test_parameters_replaced_after_construction(way: str) -> None:
    outputs = []
    for kind in kinds(way):
        torch.manual_seed(0)
        conv = kind(3, 4, 3)
        conv.weight = nn.Parameter(torch.ones(5, 3, 1, 1), requires_grad=False)
        conv.bias = None
        outputs.append(gradients(conv, X))
    assert_same(*outputs)
    assert outputs[0]["y"].shape[1] == 5


def test_a_shared_module_gathers_both_gradients(way: str) -> None:
    results = []
    for kind in kinds(way):
        torch.manual_seed(0)
        conv = kind(3, 3, 3, padding=1)
        results.append(gradients(nn.Sequential(conv, nn.ReLU(), conv), X))
    assert_same(*results)


def test_a_shared_parameter_frozen_in_one_is_frozen_in_the_other() -> None:
    a, b = fk.FreezableConv2d(3, 3, 3), fk.FreezableConv2d(3, 3, 3)
    b.weight = a.weight
    a.weight.requires_grad_(False)
    assert bytes_kept(b, X.clone().requires_grad_()) == 0


def test_data_parallel_without_a_device_is_the_module() -> None:
    ours, stock = (nn.DataParallel(net) for net in nets())
    assert_same(gradients(ours, X), gradients(stock, X))


@pytest.mark.parametrize("swap", [False, True], ids=["", "by swapping tensors"])
def test_moves_and_casts(swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", swap)
    ours, stock = nets()
    fk.freeze(ours[2]), fk.freeze(stock[2])
    for change in (nn.Module.double, nn.Module.bfloat16, nn.Module.float):
        change(ours), change(stock)
        x = X.to(ours[0].weight.dtype)
        assert torch.equal(ours(x), stock(x))
    ours.to(memory_format=torch.channels_last), stock.to(memory_format=torch.channels_last)
    assert ours(X).stride() == stock(X).stride()
    assert ours.to_empty(device="meta")(X.to("meta")).is_meta
