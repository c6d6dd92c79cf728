"""Nothing made from a parameter outlives the call that made it: a write to a frozen weight is seen at the next call."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import freezekit as fk
from bench.memory import trace
from tests.conftest import on
from tests.fusion.nets import BasicBlock, plain, settled

CPU = torch.device("cpu")


def stock_net() -> nn.Module:
    """Wide enough for the tensor-core kernels to make W' of it."""
    return settled(nn.Sequential(*plain(1, 16), BasicBlock(16)))


def data(net: nn.Module) -> None:
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point():
            tensor.data.mul_(0.5).add_(0.25)


def numpy(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.detach().numpy()[...] *= 1.5


def data_assigned(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data * 0.5


def through_a_step(net: nn.Module) -> None:
    weight = net[0].weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()
    weight.grad = None


@contextmanager
def swapping() -> Iterator[None]:
    """`.to()` as it may become: the parameter keeps its Python object and gets another tensor behind it."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def to_by_swapping(net: nn.Module) -> None:
    with swapping():
        net.to(torch.float64).to(torch.float32)
    net[0].weight.mul_(2)


def replaced(net: nn.Module) -> None:
    net[0].weight = nn.Parameter(net[0].weight * 2, requires_grad=False)


def student_of(net: nn.Module) -> nn.Module:
    student = copy.deepcopy(net)
    for parameter in student.parameters():
        parameter.data.add_(0.5)
    return student


# How people move a frozen network after a learning one.
def mean_teacher(teacher: nn.Module) -> None:
    for ema, parameter in zip(teacher.parameters(), student_of(teacher).parameters(), strict=True):
        ema.data.mul_(0.5).add_(parameter.data, alpha=0.5)


def moco(teacher: nn.Module) -> None:
    for q, k in zip(student_of(teacher).parameters(), teacher.parameters(), strict=True):
        k.data = k.data * 0.5 + q.data * 0.5


def byol(teacher: nn.Module) -> None:
    for current, ma in zip(student_of(teacher).parameters(), teacher.parameters(), strict=True):
        ma.data = ma.data * 0.5 + current.data * 0.5


def dino(teacher: nn.Module) -> None:
    with torch.no_grad():
        for q, k in zip(student_of(teacher).parameters(), teacher.parameters(), strict=True):
            k.data.mul_(0.5).add_(0.5 * q.detach().data)


def averaged_model(teacher: nn.Module) -> None:
    ema = torch.optim.swa_utils.AveragedModel(teacher, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ema.update_parameters(student_of(teacher))
    ema.update_parameters(student_of(teacher))
    for theirs, parameter in zip(ema.module.parameters(), teacher.parameters(), strict=True):
        parameter.data.copy_(theirs)


def merged_adapter(net: nn.Module) -> None:
    weight = net[0].weight
    down, up = torch.ones(4, weight[0].numel()), torch.ones(weight.shape[0], 4) * 0.01
    weight.data += (up @ down).view_as(weight)


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "data": data,
    "numpy": numpy,
    "copy_": lambda net: net[0].weight.copy_(net[0].weight * 2),
    ".data =": data_assigned,
    "a slice of data": lambda net: net[0].weight.data[0].zero_(),
    "foreach": lambda net: torch._foreach_mul_([p.data for p in net.parameters()], 0.5),
    "optimizer": through_a_step,
    "load_state_dict": lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}),
    "assigned": lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}, assign=True),
    "to and back": lambda net: [net.double().float(), net[0].weight.data.mul_(2)],
    "to by swapping": to_by_swapping,
    "replaced": replaced,
    "set_": lambda net: net[0].weight.set_(net[0].weight * 2),
    "statistics": lambda net: [net[1].running_mean.data.add_(1), net[1].running_var.data.mul_(2)],
    "eps": lambda net: setattr(net[1], "eps", 0.5),
    "inference": lambda net: torch.inference_mode()(lambda: net[0].weight.mul_(2))(),
    "channels_last": lambda net: [net.to(memory_format=torch.channels_last), net[0].weight.data.mul_(2)],
    "mean teacher": mean_teacher,
    "MoCo": moco,
    "BYOL": byol,
    "DINO": dino,
    "AveragedModel": averaged_model,
    "merged adapter": merged_adapter,
}
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "freeze, fuse": lambda net: fk.fuse(net),
    "convert": lambda net: fk.convert(net),
    "convert, fuse": lambda net: fk.fuse(fk.convert(net)),
}
BACKENDS = ["auto", "emulated"]


def frozen_copy(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    fk.freeze(net)
    return net


def step(net: nn.Module, x: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net(leaf)
    return y, torch.autograd.grad(y.float().sum(), leaf)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("edit", EDITS)
def test_every_write_is_seen_at_the_next_call(edit: str, way: str, autocast: bool, backend: str) -> None:
    stock = stock_net()
    ours = copy.deepcopy(stock)
    fk.freeze(ours)
    ours = WAYS[way](ours)
    x = torch.randn(2, 16, 6, 6)
    with on(backend):
        before = step(ours, x, autocast)
        for net in (stock, ours):
            with torch.no_grad():
                EDITS[edit](net)
            net.requires_grad_(False)
        after = step(ours, x, autocast)
        # What a model that was never another gives, to the bit; by stock's layers in float32, where rounding is small.
        fresh = step(WAYS[way](frozen_copy(stock)), x, autocast)
        expected = after if autocast else step(stock, x, autocast)
    for now, then, anew, theirs in zip(after, before, fresh, expected, strict=True):
        assert torch.equal(now, anew)
        torch.testing.assert_close(now, theirs, rtol=1e-4, atol=1e-4 * theirs.float().abs().max().item())
        assert not torch.equal(now, then)


def tensors_alive() -> dict[int, int]:
    """Elements of each tensor, by its id. Other modules' tests hold nested ones, which have no shape."""
    gc.collect()
    return {id(o): o.numel() for o in gc.get_objects() if isinstance(o, Tensor)}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_leaves_no_tensor_of_a_weights_size(way: str, backend: str, autocast: bool) -> None:
    net = stock_net()
    fk.freeze(net)
    x = torch.randn(1, 16, 3, 3, requires_grad=True)
    there = tensors_alive()
    before = {id(p) for p in net.parameters()}
    WAYS[way](net)
    kept: list[Tensor] = []
    with (
        on(backend),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = net(x)
    if not autocast:  # under autocast torch too keeps the copy that the convolution read
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        smallest = min(p.nbytes for p in net.parameters() if p.dim() == 4)
        assert all(t.untyped_storage().data_ptr() in own or t.nbytes < smallest for t in kept)
    kept.clear()
    y.float().sum().backward()
    net.zero_grad()
    x.grad = None
    del y
    left = [elements for key, elements in tensors_alive().items() if key not in there]
    assert all(elements < net[0].weight.numel() for elements in left)
    assert {id(p) for p in net.parameters()} == before


@pytest.mark.parametrize("leaks", [False, True], ids=["", "planted"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_leaves_no_memory(way: str, backend: str, leaks: bool) -> None:
    net, kept = frozen_copy(stock_net()), []
    first, x = net[0].weight, torch.randn(1, 16, 3, 3, requires_grad=True)

    def one() -> None:
        with on(backend):
            WAYS[way](net)(x).sum().backward()
        net.zero_grad()
        x.grad = None
        if leaks:
            kept.append(first.detach().clone())
        gc.collect()

    assert (trace(CPU, one).kept >= first.nbytes) == leaks


def test_a_weight_that_comes_to_learn_gets_its_gradient() -> None:
    conv = fk.FreezableConv2d(4, 8, 3).requires_grad_(False)
    x = torch.ones(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        conv(x)
        conv.requires_grad_(True)(x).float().sum().backward()
    assert conv.weight.grad is not None


def test_inference_mode_makes_nothing_that_training_would_meet() -> None:
    net = fk.fuse(stock_net())
    with torch.inference_mode():
        net(torch.ones(1, 16, 6, 6))
    x = torch.ones(1, 16, 6, 6, requires_grad=True)
    net(x).sum().backward()
    assert x.grad is not None


@pytest.mark.gpu
def test_a_captured_step_reads_the_weight_as_it_is_at_replay() -> None:
    weight = torch.randn(32, 16, 3, 3, dtype=torch.bfloat16, device="cuda")
    dy = torch.randn(1, 32, 6, 6, dtype=torch.bfloat16, device="cuda")
    fresh = fk.conv2d_dgrad(dy, weight, (1, 16, 8, 8), backend="native")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dx = fk.conv2d_dgrad(dy, weight, (1, 16, 8, 8), backend="native")
    weight.data.mul_(2)
    graph.replay()
    assert torch.equal(dx, 2 * fresh)
