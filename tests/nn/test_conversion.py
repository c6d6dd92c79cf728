"""`convert`, `revert` and the report: what is swapped, what is left alone and why, and calls that cannot be swapped."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from freezekit import nn as layers
from freezekit.conversion import SWAPS, conversion_report, convert, revert
from freezekit.freezing import PatternError
from tests.enabled.helpers import first
from tests.observe import bytes_saved

ARGUMENTS: dict[str, tuple[object, ...]] = {
    **{f"Conv{t}{i}d": (2, 4, 3) for i in (1, 2, 3) for t in ("", "Transpose")},
    **{f"BatchNorm{i}d": (4,) for i in (1, 2, 3)},
    **{f"{kind}Pad{i}d": (1,) for i in (1, 2, 3) for kind in ("Reflection", "Replication")},
    **{f"AdaptiveAvgPool{i}d": (1,) for i in (1, 2, 3)},
    **{f"AvgPool{i}d": (2,) for i in (1, 2, 3)},
    **{f"MaxPool{i}d": (2,) for i in (1, 2, 3)},
    **{f"InstanceNorm{i}d": (4,) for i in (1, 2, 3)},
    "LayerNorm": (4,),
    "GroupNorm": (2, 4),
}


class OwnReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Calling(nn.Module):
    """Calls functions where it could have layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), OwnReLU())
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(x))
        for _ in range(2):
            x = torch.relu(x - 0.1)
        x = F.max_pool2d(self.norm(x).relu(), 2)
        return F.dropout(F.pad(x, (1, 1, 1, 1), mode="reflect"), 0.5)


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize("stock", SWAPS, ids=lambda kind: kind.__name__)
def test_every_layer_is_its_stock_layer_and_comes_back(stock: type[nn.Module]) -> None:
    arguments = ARGUMENTS.get(stock.__name__, ())
    made, ours = stock(*arguments), SWAPS[stock](*arguments)
    assert isinstance(ours, stock)
    assert inspect.signature(type(ours)) == inspect.signature(stock)
    assert ours.extra_repr() == made.extra_repr()
    assert ours.state_dict().keys() == made.state_dict().keys()
    convert(made)
    assert type(made) is SWAPS[stock]
    assert type(pickle.loads(pickle.dumps(made))) is type(copy.deepcopy(made)) is SWAPS[stock]
    assert type(revert(made)) is stock


def layer_of_torch(name: str) -> nn.Module | None:
    """One of torch.nn's layers that takes images, volumes or sequences; None of any other."""
    arguments = {
        **ARGUMENTS,
        **{f"{kind}Pool{i}d": (2, 2) for i in (1, 2, 3) for kind in ("LP", "AdaptiveMax")},
        **{f"FractionalMaxPool{i}d": (2, 2) for i in (2, 3)},
        **{"SyncBatchNorm": (4,), "LocalResponseNorm": (2,), "CrossMapLRN2d": (2,), "RMSNorm": (4,), "Linear": (4, 4)},
        **{"Threshold": (0.1, 0.2), "AdaptiveMaxPool1d": (2,)},
    }
    kind = getattr(nn, name)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or name.startswith("Lazy"):
        return None
    try:
        return kind(*arguments.get(name, ()))
    except TypeError:  # it needs arguments, and is none that computes with neighbours or statistics
        return None


def test_the_report_names_every_layer_of_torch_that_keeps_more_than_it_would_while_enabled() -> None:
    found = []
    for name in dir(nn):
        layer = layer_of_torch(name)
        axes = next((int(digit) for digit in name if digit.isdigit()), 2)
        x = torch.randn(2, 2 if "Conv" in name else 4, *[4] * axes, requires_grad=True)
        try:
            assert layer is not None
            layer.requires_grad_(False)
            stock = bytes_saved(lambda: layer(x.clone()), layer.parameters())  # noqa: B023 (it is called here)
        except (AssertionError, RuntimeError, TypeError, ValueError, NotImplementedError):
            continue  # takes no images
        with fk.enabled():
            enabled = bytes_saved(lambda: layer(x.clone()), layer.parameters())  # noqa: B023
        if enabled < stock:
            found.append(name)
            assert conversion_report(layer), name
    assert {"LPPool2d", "LocalResponseNorm", "Threshold", "PReLU"} <= {*found}


@pytest.mark.parametrize("train", [True, False])
def test_the_report_names_every_layer_of_torch_that_keeps_a_tensor_where_bits_or_bytes_would_do(train: bool) -> None:
    """Bits, where each element of the gradient is one of two multiples of dy's; bytes, in place of int64 indices."""
    found = set()
    for name in dir(nn):
        layer, axes = layer_of_torch(name), next((int(digit) for digit in name if digit.isdigit()), 2)
        x = 3 * torch.randn(2, 4, *[4] * axes, dtype=torch.float64)
        storages: list[Tensor] = []
        try:
            assert layer is not None
            layer.double().requires_grad_(False).train(train)
            with saved_tensors_hooks(lambda t: (storages.append(t), t)[1], lambda t: t):  # noqa: B023
                y = first(layer(x.requires_grad_()))
            dy = torch.rand_like(y) + 1
            (dx,) = torch.autograd.grad(y, x, dy)
        except (AssertionError, RuntimeError, TypeError, ValueError, NotImplementedError):
            continue  # takes no images
        parameters = [tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())]
        large = [t for t in storages if t.nbytes >= x.nbytes and t.data_ptr() not in parameters]
        by_bits = y.shape == x.shape and len((dx / dy).round(decimals=6).unique()) <= 2
        if (large and by_bits) or any(t.dtype is torch.int64 for t in storages):
            found.add(name)
            assert conversion_report(layer), name
    either = {"Softshrink", "Hardshrink", "Hardsigmoid", "ReLU", "AdaptiveMaxPool2d"}
    assert either | ({"AlphaDropout"} if train else {"RReLU", "BatchNorm2d"}) <= found


def test_every_layer_has_a_stock_class() -> None:
    assert {SWAPS[base] for base in SWAPS} == {getattr(layers, name) for name in layers.__all__}
    assert all(issubclass(kind, base) for base, kind in SWAPS.items())


def test_only_some() -> None:
    def kinds(model: nn.Module) -> list[bool]:
        return [type(m) in SWAPS.values() for m in (model.body[0], model.body[1], model.norm)]

    assert kinds(convert(Calling(), only=nn.ReLU)) == [False, True, False]
    assert kinds(convert(Calling(), only="body")) == [True, True, False]
    assert kinds(convert(Calling(), only=["body.0", nn.BatchNorm2d])) == [True, False, True]
    assert kinds(convert(Calling(), only="*.1")) == [False, True, False]
    model = Calling()
    assert kinds(convert(model, only=model.body)) == [True, True, False]
    assert kinds(convert(Calling(), only=["b?dy", ["norm"]])) == [True, True, True]
    assert kinds(revert(convert(Calling()), only="norm")) == [True, True, False]
    with pytest.raises(ValueError, match="only: 'bodi' matches no module or parameter of Calling; near names: 'body'"):
        convert(Calling(), only="bodi")
    with pytest.raises(PatternError, match="only: an empty list selects nothing"):
        convert(Calling(), only=[])
    with pytest.raises(PatternError, match="only: no module matches .*LSTM"):
        convert(Calling(), only=[nn.ReLU, nn.LSTM])
    with pytest.raises(TypeError, match=r"only must be names of modules, globs .*\ngot 3"):
        convert(Calling(), only=[3])
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        revert(3)


def test_parametrized_layers_and_instances_with_a_forward_of_their_own() -> None:
    norm = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 3))
    x = torch.randn(1, 2, 8)
    before = norm(x)
    convert(norm)
    assert isinstance(norm, layers.FreezableConv1d)
    assert parametrize.is_parametrized(norm)
    assert torch.equal(norm(x), before)
    revert(norm)
    assert not isinstance(norm, layers.FreezableConv1d)
    assert torch.equal(norm(x), before)
    relu = nn.ReLU()
    relu.forward = lambda x: x
    assert type(convert(relu)) is nn.ReLU


def test_the_report_of_layers() -> None:
    rows = {row.name: row for row in conversion_report(convert(Calling(), only=nn.Conv2d))}
    assert {name: row.status for name, row in rows.items()} == {
        "body.0": "freezekit", "body.1": "stock", "body.2": "left alone", "norm": "stock",
    }  # fmt: skip
    assert "OwnReLU is a subclass of ReLU with behaviour of its own" in rows["body.2"].reason


def test_the_report_of_calls_names_places_and_bytes() -> None:
    model = convert(Calling())
    x = torch.randn(2, 3, 8, 8)
    state = torch.random.get_rng_state()
    statistics = [b.clone() for b in model.buffers()]
    rows = [row for row in conversion_report(model, x) if row.status == "call"]
    found = {row.layer: (row.name, row.where, row.bytes_kept) for row in rows}
    big, small = 2 * 4 * 64 * 4, 2 * 4 * 16 * 4
    here = __file__
    assert found == {
        "F.relu": ("", f"{here}:{line_of('x = F.relu(self')}", big),
        "torch.relu": ("", f"{here}:{line_of('x = torch.relu(x')}", 2 * big),
        "Tensor.relu": ("", f"{here}:{line_of('x = F.max_pool2d(self')}", big),
        "F.max_pool2d": ("", f"{here}:{line_of('x = F.max_pool2d(self')}", big + 2 * small),
        "F.pad": ("", f"{here}:{line_of('return F.dropout(F.pad')}", small),
        "F.dropout": ("", f"{here}:{line_of('return F.dropout(F.pad')}", 2 * 4 * 36 * 4),
    }
    assert "2 times" in next(row.reason for row in rows if row.layer == "torch.relu")
    assert "freezekit.functional.max_pool2d" in next(row.reason for row in rows if row.layer == "F.max_pool2d")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    frozen = conversion_report(model.requires_grad_(False), (x,))
    assert not [row for row in frozen if row.status == "call"], "what keeps nothing needs no advice"


class NormAct(nn.BatchNorm2d):
    """As timm's: a norm with a forward of its own, and an activation inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training))


def test_the_report_names_every_layer_that_keeps_what_a_kind_of_freezekit_s_would_not() -> None:
    model = nn.Sequential(
        nn.PReLU(), nn.PReLU().requires_grad_(False), NormAct(3), nn.SyncBatchNorm(3), nn.AdaptiveMaxPool2d(2),
        nn.InstanceNorm2d(3, track_running_stats=True).eval(), nn.InstanceNorm2d(3), nn.Threshold(0, 0),
        nn.Threshold(1, 0), nn.MaxPool3d(2), nn.MaxPool1d(2), nn.RReLU(), nn.RReLU().eval(), nn.Sigmoid(),
    )  # fmt: skip
    rows = {int(row.name.split(".")[0]): row for row in conversion_report(convert(model)) if row.name != "2.act"}
    left = {i: row.reason for i, row in rows.items() if row.status == "left alone"}
    kept = {i: row.reason for i, row in rows.items() if row.status == "freezekit"}
    assert kept == {
        0: "its slope learns: the gradient reads its input, which is kept",
        1: "",
        5: "",
        6: "normalises by its input: the gradient reads it, so it is kept, frozen or not",
        9: "",
        10: "",
    }
    assert left.keys() == {2, 3, 4, 7, 8, 12}
    assert all(("freezekit.enable() reaches" in reason) == (i != 4) for i, reason in left.items())
    assert "NormAct is a subclass of BatchNorm2d" in left[2]
    assert "int64 indices" in left[4]


def test_the_report_names_no_call_that_would_keep_the_same() -> None:
    slope, weight = torch.ones(3, requires_grad=True), torch.ones(4, 3, 1, 1, requires_grad=True)

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.prelu(F.relu_(x * 1), slope)
            x = F.prelu(x, slope.detach())
            x = F.group_norm(F.batch_norm(x, None, None, training=True), 1)
            return F.conv2d(F.conv2d(x, weight.detach()), torch.cat([weight, weight], 1)[:, :4])

    rows = conversion_report(Net(), torch.randn(2, 3, 8, 8, requires_grad=True))
    lines = [line_of("slope.detach())"), line_of("F.relu_(x * 1)"), line_of("weight.detach())")]
    assert [(row.layer, int(row.where.rsplit(":", 1)[1])) for row in rows] == [
        ("F.relu_", lines[1]), ("F.prelu", lines[0]), ("F.conv2d", lines[2]),
    ]  # fmt: skip


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_report_names_no_call_whose_tensors_the_forward_s_own_hooks_take(reentrant: bool) -> None:
    def body(x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(x), 2)

    class Checkpointed(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(body, super().forward(x), use_reentrant=reentrant)

    class Halved(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            with saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
                x = torch.dropout(x, 0.5, True)
            return F.relu(x)

    x = torch.randn(2, 3, 8, 8)
    with saved_tensors_hooks(lambda t: t, lambda t: t):  # around the report: of no effect
        assert [row for row in conversion_report(Checkpointed(3, 4, 3), x) if row.status == "call"] == []
        halved = [row for row in conversion_report(Halved(3, 4, 3), x) if row.status == "call"]
    assert [(row.layer, row.bytes_kept) for row in halved] == [("F.relu", 2 * 4 * 36 * 4)]
    model = Checkpointed(3, 4, 3)
    bytes_of_input, bytes_of_result = 2 * 3 * 64 * 4, 2 * 4 * 36 * 4
    assert fk.explain(model, x).bytes_kept == bytes_of_input + bytes_of_result


def test_the_report_counts_no_call_whose_graph_the_forward_lets_go_of() -> None:
    class Gated(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            scores = F.relu(x).detach()
            chosen = F.relu(x).amax(1).argmax()
            for gated in (False, True):
                y = F.relu(x)  # of two calls one is held
                if gated:
                    x = y
            return x * scores + chosen

    row, *others = [row for row in conversion_report(Gated(3, 4, 3), torch.randn(2, 3, 8, 8)) if row.status == "call"]
    assert not others
    assert row.bytes_kept == 2 * 4 * 36 * 4
    assert "times" not in row.reason


def test_top_level_names() -> None:
    assert fk.convert is convert
