"""The constant cache: made once where declared, never stale, never where nobody declared."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import freezekit as fk
from freezekit import constants
from freezekit.freezing import load_freeze_state
from tests.observe import Calls


def frozen_conv(declare: bool = True) -> fk.FreezableConv2d:
    conv = fk.FreezableConv2d(4, 8, 3, bias=False).requires_grad_(False)
    if declare:
        constants.declare_constant(conv.weight)
    return conv


def run(conv: nn.Module, x: Tensor | None = None) -> Tensor:
    x = torch.ones(1, 4, 8, 8) if x is None else x
    with torch.autocast("cpu", torch.bfloat16):
        return conv(x)


def casts(conv: nn.Module) -> int:
    """Casts of one call, that of the input aside."""
    x = torch.ones(1, 4, 8, 8, dtype=torch.bfloat16)
    with Calls() as calls:
        run(conv, x)
    return calls.count["aten::_to_copy"] + calls.count["aten::copy_"]


def expected(conv: nn.Module) -> Tensor:
    w = conv.weight.detach().bfloat16()
    return torch.nn.functional.conv2d(torch.ones(1, 4, 8, 8, dtype=torch.bfloat16), w)


def test_a_declared_weight_is_cast_once() -> None:
    conv = frozen_conv()
    assert casts(conv) == 1
    before = constants.usage()["hits"]
    assert casts(conv) == 0
    assert casts(conv) == 0
    assert constants.usage()["hits"] == before + 2
    assert torch.equal(run(conv), expected(conv))


def test_an_undeclared_weight_is_cast_at_each_call_and_never_stale() -> None:
    conv = frozen_conv(declare=False)
    assert casts(conv) == casts(conv) == 1
    conv.weight.data.mul_(3)
    assert torch.equal(run(conv), expected(conv))


def reload(conv: nn.Module) -> None:
    conv.load_state_dict({"weight": torch.randn(8, 4, 3, 3)})


def through_a_step(conv: nn.Module) -> None:
    conv.weight.grad = torch.ones_like(conv.weight)
    torch.optim.SGD([conv.weight], lr=1.0).step()


def swap_data_through_empty(conv: nn.Module) -> None:
    old = conv.weight.data
    conv.weight.data = torch.empty(0)
    fresh = torch.randn_like(old)
    del old
    conv.weight.data = fresh


@contextmanager
def swapping() -> Iterator[None]:
    """`.to()` as it may become: the parameter keeps its Python object and gets another tensor behind it."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def to_by_swapping(conv: nn.Module) -> None:
    with swapping():
        conv.to(torch.float64).to(torch.float32).weight.mul_(1.5)


def reload_by_swapping(conv: nn.Module) -> None:
    with swapping():
        reload(conv)


def freeze_again(conv: nn.Module) -> None:
    fk.unfreeze(conv)
    conv.weight.data.mul_(2)
    fk.freeze(conv)


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": reload,
    "copy_": lambda conv: conv.weight.copy_(torch.randn(8, 4, 3, 3)),
    "in place": lambda conv: conv.weight.mul_(2),
    "optimizer": through_a_step,
    ".data =": lambda conv: setattr(conv.weight, "data", torch.randn(8, 4, 3, 3)),
    ".data = twice": swap_data_through_empty,
    ".to(float64)": lambda conv: conv.to(torch.float64).to(torch.float32).weight.mul_(1.5),
    ".to() by swapping": to_by_swapping,
    "load_state_dict by swapping": reload_by_swapping,
    "assigned": lambda conv: conv.load_state_dict({"weight": torch.randn(8, 4, 3, 3)}, assign=True),
    "foreach": lambda conv: torch._foreach_mul_([conv.weight], 2.0),
    "unfreeze, edit unseen, freeze": freeze_again,
    "channels_last": lambda conv: conv.to(memory_format=torch.channels_last),
    "a slice": lambda conv: conv.weight[0].zero_(),
    "set_": lambda conv: conv.weight.set_(torch.randn(8, 4, 3, 3)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_every_edit_that_can_be_seen_is_seen(edit: Callable[[nn.Module], object]) -> None:
    conv = frozen_conv()
    run(conv)
    with torch.no_grad():
        edit(conv)
    assert torch.equal(run(conv), expected(conv))
    constants.verify_constants(conv)


def test_an_unseen_edit_is_found_by_verify_and_cured_by_invalidate() -> None:
    conv = frozen_conv()
    run(conv)
    conv.weight.data.mul_(2)
    with pytest.raises(RuntimeError, match=r"kept cast of constant 'weight' is stale.*invalidate"):
        constants.verify_constants(conv)
    constants.invalidate(conv)
    assert torch.equal(run(conv), expected(conv))
    constants.verify_constants(conv)


def test_a_weight_that_needs_a_gradient_is_not_served() -> None:
    conv = frozen_conv()
    run(conv)
    conv.weight.requires_grad_(True)
    conv.weight.data.mul_(2)
    x = torch.ones(1, 4, 8, 8)
    y = run(conv, x)
    assert torch.equal(y, expected(conv))
    y.float().sum().backward()
    assert conv.weight.grad is not None


def test_inference_mode_makes_nothing_that_training_would_meet() -> None:
    conv = frozen_conv()
    with torch.inference_mode():
        run(conv)
    x = torch.ones(1, 4, 8, 8, requires_grad=True)
    run(conv, x).float().sum().backward()
    assert x.grad is not None


def test_copies_and_files_know_nothing_of_it() -> None:
    conv = frozen_conv()
    run(conv)
    twin = copy.deepcopy(conv)
    assert not constants.is_constant(twin.weight)
    assert conv.state_dict().keys() == twin.state_dict().keys() == {"weight"}
    loaded = pickle.loads(pickle.dumps(conv))
    assert not constants.is_constant(loaded.weight)
    file = io.BytesIO()
    torch.save(conv.state_dict(), file)
    assert len(file.getvalue()) < conv.weight.nbytes + 4096
    twin.weight.data.mul_(2)
    assert torch.equal(run(twin), expected(twin))


def test_what_is_cached_dies_with_its_weight() -> None:
    gc.collect()
    before = constants.usage()
    conv = frozen_conv()
    run(conv)
    during = constants.usage()
    assert during["declared"] == before["declared"] + 1
    assert during["bytes"] == before["bytes"] + conv.weight.numel() * 2
    del conv
    gc.collect()
    after = constants.usage()
    assert (after["declared"], after["bytes"]) == (before["declared"], before["bytes"])


def test_threads_share_it() -> None:
    conv = frozen_conv()
    wanted = expected(conv)
    wrong: list[int] = []

    def work() -> None:
        for i in range(50):
            if i % 10 == 0:
                constants.invalidate(conv.weight)
            if not torch.equal(run(conv), wanted):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_parametrized_weight_is_new_at_each_call() -> None:
    conv = fk.FreezableConv2d(4, 8, 3, bias=False)
    torch.nn.utils.parametrizations.weight_norm(conv)
    conv.requires_grad_(False)
    run(conv)
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(2)
    assert torch.equal(run(conv), expected(conv))


@pytest.mark.gpu
def test_a_cuda_graph_neither_fills_nor_uses_it_while_captured() -> None:
    conv = frozen_conv().cuda()
    constants.declare_constant(conv.weight)
    x = torch.ones(1, 4, 8, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        conv(x)
    before = constants.usage()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        y = conv(x)
    after = constants.usage()
    assert (after["cached"], after["hits"]) == (before["cached"], before["hits"])
    conv.weight.data.mul_(2)
    graph.replay()
    torch.testing.assert_close(y, 2 * torch.nn.functional.conv2d(x, conv.weight / 2).bfloat16(), rtol=1e-2, atol=1e-1)


def test_freeze_declares_and_unfreeze_withdraws() -> None:
    conv = fk.FreezableConv2d(4, 8, 3)
    fk.freeze(conv)
    assert constants.is_constant(conv.weight)
    assert casts(conv) == 2  # weight and bias
    assert casts(conv) == 0
    fk.unfreeze(conv)
    assert not constants.is_constant(conv.weight)
    with fk.freeze(conv):
        assert constants.is_constant(conv.weight)
    assert not constants.is_constant(conv.weight)
    state = fk.freeze_state(fk.FreezableConv2d(4, 8, 3).requires_grad_(False))
    load_freeze_state(conv, state)
    assert constants.is_constant(conv.weight)
