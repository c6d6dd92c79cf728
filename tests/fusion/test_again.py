"""A call like one before is not decided again; whatever differs is; and nothing outlives what it was made of."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import freezekit as fk
from freezekit import _C
from freezekit.backends import current_backend
from freezekit.constants import invalidate
from freezekit.fusion import block as block_module
from freezekit.fusion import folding, fuse, unfuse
from tests.fusion.nets import Bottleneck, plain, settled


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a block was decided on, and folded."""
    count: Counter[str] = Counter()
    decide, make = block_module._runs_fused, folding._make
    monkeypatch.setattr(block_module, "_runs_fused", lambda *args: [count.update(["decided"]), decide(*args)][1])
    monkeypatch.setattr(folding, "_make", lambda *args: [count.update(["folded"]), make(*args)][1])
    return count


def x(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 6, 6)


def test_the_same_call_is_decided_once(decisions: Counter[str]) -> None:
    model = fuse(settled(nn.Sequential(Bottleneck(8, 16), Bottleneck(16, 16))))
    for _ in range(3):
        model(x())
    assert decisions == {"decided": 7, "folded": 7}


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "trainable": lambda m: m[0].requires_grad_(True),
    "training": lambda m: m.train(),
    "eps": lambda m: setattr(m[1], "eps", 0.5),
    "statistics": lambda m: m[1].running_mean.add_(1),
    "data": lambda m: [m[0].weight.data.mul_(2), invalidate(m)],
    "another weight": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight * 2, requires_grad=False)),
    "swapped": lambda m: torch.utils.swap_tensors(m[0].weight, nn.Parameter(m[0].weight * 2, requires_grad=False)),
    "padding": lambda m: setattr(m[0], "padding", (0, 0)),
    "list for a tuple": lambda m: setattr(m[0], "padding", [2, 2]),
    "padding mode": lambda m: setattr(m[0], "padding_mode", "nonsense") or setattr(m[0], "padding_mode", "zeros"),
    "hook": lambda m: m[0].register_forward_hook(lambda layer, args, y: y * 2),
    "own forward": lambda m: setattr(m[1], "forward", lambda y: y * 3),
    "activation": lambda m: m.__setitem__(2, nn.ReLU6()),
    "bias": lambda m: m[0].register_parameter("bias", nn.Parameter(torch.ones(8), requires_grad=False)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_decided_again(name: str, decisions: Counter[str]) -> None:
    model = fuse(settled(plain(1, 8)))
    model(input := x())
    decisions.clear()
    with torch.no_grad():
        CHANGES[name](model)
    ours = model(input)
    assert decisions["decided"] == (0 if name == "padding mode" else 1)
    torch.testing.assert_close(ours, unfuse(copy.deepcopy(model))(input))


def test_each_kind_of_call_is_remembered(decisions: Counter[str]) -> None:
    model = fuse(settled(plain(1, 8)))
    calls: list[Callable[[], Tensor]] = [
        lambda: model(x()),
        lambda: model(x(3)),
        lambda: model(x().to(memory_format=torch.channels_last)),
        lambda: torch.autocast("cpu", torch.bfloat16)(model)(x()),
        lambda: fk.backend("emulated").__enter__() and model(x()),
        lambda: fk.backend("aten").__enter__() and model(x()),
    ]
    current = current_backend()
    try:
        for call in calls:
            call()
            fk.backends._current = current
        assert decisions["decided"] == 5  # the layout of what goes in asks for no decision
        for call in calls:
            call()
            fk.backends._current = current
        assert decisions["decided"] == 5
    finally:
        fk.backends._current = current


class Head(nn.Module):
    """One convolution for several inputs, with a norm and an activation of its own for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(self.norms[0](self.conv(a))), F.relu6(self.norms[1](self.conv(b)) + b)


def test_a_shared_convolution(decisions: Counter[str]) -> None:
    model = fuse(settled(Head()))
    a, b = x(), x(1)
    for _ in range(3):
        torch.testing.assert_close(model(a, b), unfuse(copy.deepcopy(model))(a, b))
    assert decisions["decided"] == 2


def test_nothing_outlives_the_model() -> None:
    model = fuse(settled(plain(1, 8)))
    model[1].friend = model  # a circle that only Python's collector opens
    model(x())
    folded = weakref.ref(folding.folded(model[0], model[1]).weight)
    conv = weakref.ref(model[0])
    del model
    gc.collect()
    assert conv() is None
    assert folded() is None


def test_thawing_drops_what_was_folded() -> None:
    model = fuse(settled(plain(1, 8)))
    model(x())
    folded = weakref.ref(folding.folded(model[0], model[1]).weight)
    model.requires_grad_(True)(x())
    gc.collect()
    assert folded() is None


def test_function_modes_see_the_operator() -> None:
    names = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    model = fuse(settled(plain(1, 8)))
    model(x())
    with Mode():
        model(x())
    assert "freezekit.frozen_conv2d.default" in names


def test_errors_are_torchs_own() -> None:
    model = fuse(settled(plain(1, 8)))
    model(x())
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(2, 7, 6, 6))
    with pytest.raises(TypeError, match="run takes 8 arguments, got 0"):
        _C.blocks.run()


def test_replicas_run_their_layers() -> None:
    """DataParallel makes replicas that have tensors where the model has parameters."""
    model = fuse(settled(plain(1, 8)))
    expected = model(input := x())
    replicas = [module._replicate_for_data_parallel() for module in model.modules()]
    for i, child in enumerate(replicas[1:]):
        replicas[0]._modules[str(i)] = child
        source = model[i]
        for name, parameter in source._parameters.items():
            if parameter is None:
                child._parameters[name] = None
            else:
                setattr(child, name, parameter.detach())
        child._buffers.update(source._buffers)
    torch.testing.assert_close(replicas[0](input), expected)


def test_weights_under_transforms() -> None:
    model = fuse(settled(plain(2, 8)))
    input, stock = x(), unfuse(copy.deepcopy(model))
    state = {name: value.detach() for name, value in model.named_parameters()}
    state |= dict(model.named_buffers())
    stacked = {name: torch.stack([value, value * 2]) if value.dim() else value for name, value in state.items()}
    axes = {name: 0 if value.dim() else None for name, value in state.items()}

    def call(net: nn.Module) -> Tensor:
        f = lambda state: torch.func.functional_call(net, state, (input,))  # noqa: E731
        return torch.vmap(f, in_dims=(axes,))(stacked)

    torch.testing.assert_close(call(model), call(stock))
    loss = lambda net: lambda weight: torch.func.functional_call(net, {"0.weight": weight}, (input,)).sum()  # noqa: E731
    weight = model[0].weight.detach()
    torch.testing.assert_close(torch.func.grad(loss(model))(weight), torch.func.grad(loss(stock))(weight))


def folds_logged(model: nn.Module, steps: int, input: Tensor) -> Counter[str]:
    _C.set_launch_log(True)
    try:
        with fk.backend("emulated"):
            for _ in range(steps):
                model(input).sum().backward()
        return Counter(row["kernel"] for row in _C.take_launch_log() if row["operator"] == "filter_transform")
    finally:
        _C.set_launch_log(False)


def test_folding_is_one_launch_a_block_and_kept() -> None:
    model = fuse(settled(plain(2, 16)).bfloat16())
    input = x().repeat(1, 2, 1, 1).bfloat16().requires_grad_()
    assert folds_logged(model, 1, input) == {"filter_transform_fold": 2, "filter_transform": 2}
    assert folds_logged(model, 2, input) == {}
    with torch.no_grad():
        model[1].running_var.mul_(2)
    assert folds_logged(model, 2, input) == {"filter_transform_fold": 1, "filter_transform": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm_dtype", [None, torch.float32], ids=str)
def test_the_kernels_fold_is_atens(dtype: torch.dtype, norm_dtype: torch.dtype | None) -> None:
    conv, norm = nn.Conv2d(8, 12, 3, groups=4).to(dtype), settled(nn.Sequential(nn.BatchNorm2d(12)))[0]
    norm.to(norm_dtype or dtype)
    conv.requires_grad_(False)
    kernel, aten = (folding._make(conv, norm, by) for by in ("emulated", "aten"))
    assert kernel.weight.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in ((kernel.weight, aten.weight), (kernel.bias, aten.bias)):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(ours.dtype).eps, atol=0)


@pytest.mark.parametrize("part", ["mean", "bias"])
def test_a_fold_of_wrong_sizes_is_refused(part: str) -> None:
    tensors = {"mean": torch.zeros(4), "var": torch.ones(4), "bias": None, part: torch.ones(3)}
    with pytest.raises(RuntimeError, match=r"(running_mean|bias) must have size \[4\]"):
        _C.blocks.fold(
            torch.ones(4, 2, 1, 1), tensors["bias"], tensors["mean"], tensors["var"], None, None, 0.1, "emulated"
        )
    with pytest.raises(
        RuntimeError, match="'native' cannot compute frozen_conv2d: it needs CUDA tensors, got one on cpu"
    ):
        _C.blocks.fold(torch.ones(3, 2, 1, 1), None, torch.ones(3), torch.ones(3), None, None, 0.1, "native")
