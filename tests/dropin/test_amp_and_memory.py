"""Autocast, GradScaler, checkpointing, saved-tensor hooks and in-place edits, beside stock."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import freezekit as fk
from tests.dropin.twins import assert_same, gradients, turns
from tests.nn.test_every_backend import axes_of, data, layer
from tests.observe import Calls


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, frozen: bool, way: str) -> None:
    results = []
    for net in turns(way):
        net[2].weight.requires_grad_(not frozen)
        with torch.autocast("cpu", dtype=dtype):
            results.append(gradients(net, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))))
    assert results[0]["y"] is not None
    assert results[0]["y"].dtype == dtype
    assert_same(*results)


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learns"])
@pytest.mark.parametrize("name", fk.nn.__all__)
def test_every_layer_gives_the_dtypes_of_stock(name: str, learns: bool) -> None:
    ours = layer(name).requires_grad_(learns)
    stock = fk.revert(copy.deepcopy(ours))
    assert type(stock) is not type(ours)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = data(axes_of(name), learns=False).to(dtype)
        for low in (torch.bfloat16, torch.float16):
            for needs_gradient in (False, True):
                with torch.autocast("cpu", low):
                    expected, found = (one(x.detach().requires_grad_(needs_gradient)) for one in (stock, ours))
                assert (found.dtype, found.requires_grad) == (expected.dtype, expected.requires_grad), (dtype, low)


def test_autocast_leaves_float64_and_disabled_regions_alone() -> None:
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(1, 3, 6, 6, dtype=dtype)
        outputs = []
        for kind in (nn.Conv2d, fk.FreezableConv2d):
            torch.manual_seed(0)
            conv = kind(3, 2, 3, dtype=dtype)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs.append(conv(x))
                with torch.autocast("cpu", enabled=False):
                    outputs.append(conv(x))
        assert [y.dtype for y in outputs[:2]] == [y.dtype for y in outputs[2:]]
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[3])


def casts(kind: type[nn.Conv2d], frozen: bool, cache: bool) -> int:
    conv = kind(3, 2, 3, bias=False).requires_grad_(not frozen)
    x = torch.randn(1, 3, 6, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache), Calls() as calls:
        conv(x), conv(x)
    return calls.count["aten::_to_copy"]


def test_autocast_s_cache_serves_trainable_weights_as_in_stock() -> None:
    for kind in (nn.Conv2d, fk.FreezableConv2d):
        assert casts(kind, frozen=False, cache=True) == 1
        assert casts(kind, frozen=False, cache=False) == 2


def test_a_weight_edited_between_two_autocast_regions_is_cast_again() -> None:
    conv, x = fk.FreezableConv2d(1, 1, 1, bias=False).requires_grad_(False), torch.ones(1, 1, 1, 1)
    values = []
    for value in (1.0, 2.0, 3.0):
        conv.weight.fill_(value)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values.append(conv(x).item())
    assert values == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("frozen", [False, True])
def test_grad_scaler(frozen: bool, way: str) -> None:
    states = []
    for net in turns(way):
        net[0].requires_grad_(not frozen)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
        for step in range(4):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", dtype=torch.float16):
                loss = net(x).float().square().mean() * (float("inf") if step == 1 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        states.append({"scale": torch.tensor(scaler.get_scale()), **net.state_dict()})
    assert_same(*states)


CHECKPOINTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "reentrant": lambda net, x: checkpoint(net, x, use_reentrant=True),
    "non-reentrant": lambda net, x: checkpoint(net, x, use_reentrant=False),
    "sequential": lambda net, x: checkpoint_sequential(net, 2, x, use_reentrant=False),
    "selective": lambda net, x: checkpoint(
        net,
        x,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts([torch.ops.aten.convolution.default]),
    ),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointing(how: str, frozen: bool, way: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    results = []
    for net in turns(way):
        net[2].requires_grad_(not frozen)
        results.append(gradients(lambda x, net=net: CHECKPOINTS[how](net, x), x, net))
    assert_same(*results)


def test_the_policy_of_a_selective_checkpoint_meets_torch_s_convolution(way: str) -> None:
    counts = []
    for net in turns(way):
        met = []

        def policy(ctx: Any, op: Any, *args: Any, met: list[bool] = met, **kwargs: Any) -> CheckpointPolicy:
            is_convolution = op is torch.ops.aten.convolution.default
            met.append(is_convolution)
            return CheckpointPolicy.MUST_SAVE if is_convolution else CheckpointPolicy.PREFER_RECOMPUTE

        def contexts(policy: Any = policy) -> Any:
            return create_selective_checkpoint_contexts(policy)

        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        checkpoint(net, x, use_reentrant=False, context_fn=contexts).sum().backward()
        counts.append(sum(met))
    assert counts[0] == counts[1] > 0


def test_saved_tensor_hooks_see_what_is_kept_and_no_more() -> None:
    packed: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    conv = fk.FreezableConv2d(3, 4, 3)
    for frozen in (False, True):
        packed.clear()
        conv.weight.requires_grad_(not frozen)
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = conv(x)
        y.sum().backward()
        assert packed == ([] if frozen else [(2, 3, 8, 8)]) + [(4, 3, 3, 3)]


def test_hooks_that_lower_precision_change_the_gradient_as_in_stock(way: str) -> None:
    def lowered(t: Tensor) -> Tensor:
        return t.bfloat16().float() if t.is_floating_point() else t  # bits are not numbers

    results = []
    for net in turns(way):
        with torch.autograd.graph.saved_tensors_hooks(lowered, lambda t: t):
            results.append(gradients(net, torch.ones(1, 3, 6, 6).mul(1.01)))
    assert_same(*results)


def test_save_on_cpu(way: str) -> None:
    results = []
    for net in turns(way):
        with torch.autograd.graph.save_on_cpu():
            results.append(gradients(net, torch.ones(1, 3, 6, 6)))
    assert_same(*results)


@pytest.mark.parametrize("edited", ["input", "weight"])
@pytest.mark.parametrize("frozen", [False, True])
def test_editing_what_is_kept_is_found(edited: str, frozen: bool) -> None:
    """As in stock, but for a frozen layer's input: nobody reads it, so editing it harms nobody."""
    for kind in (nn.Conv2d, fk.FreezableConv2d):
        conv = kind(3, 4, 3)
        conv.weight.requires_grad_(not frozen)
        hidden = torch.randn(1, 3, 6, 6, requires_grad=True) * 1
        y = conv(hidden)
        with torch.no_grad():
            (hidden if edited == "input" else conv.weight).mul_(2)
        if edited == "input" and frozen and kind is fk.FreezableConv2d:
            y.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_anomaly_mode_names_the_forward_call(recwarn: pytest.WarningsRecorder) -> None:
    conv = fk.FreezableConv2d(1, 1, 1)
    with torch.autograd.detect_anomaly():
        y = conv(torch.ones(1, 1, 2, 2, requires_grad=True))
        with pytest.raises(RuntimeError, match=r"FreezekitConv2dBackward.*nan"):
            y.backward(torch.full_like(y, float("nan")))
    assert any("Error detected in FreezekitConv2dBackward" in str(w.message) for w in recwarn.list)


def test_hooks_on_the_node_and_on_the_output() -> None:
    conv = fk.FreezableConv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(3.0)
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    seen = []
    y = conv(x)
    y.grad_fn.register_prehook(lambda grads: seen.append("node, before"))
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append("node, after"))
    y.register_hook(lambda grad: grad * 2)
    y.retain_grad()
    y.sum().backward()
    assert seen == ["node, before", "node, after"]
    assert torch.equal(x.grad, torch.full_like(x, 6.0))
    assert torch.equal(y.grad, torch.full_like(y, 2.0))
