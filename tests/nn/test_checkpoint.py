"""Exceptions that others throw through a layer, as checkpointing does to stop early, pass through it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import freezekit
from freezekit import nn as layers
from tests.nn.test_conversion import ARGUMENTS


def layer_and_input(name: str) -> tuple[nn.Module, Tensor]:
    layer = getattr(layers, name)(*ARGUMENTS.get(name.removeprefix("Freezable"), ())).requires_grad_(False)
    axes = int(name[-2]) if name.endswith("d") else 2
    channels = 2 if "Conv" in name else 4
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        layer = type(layer)(4, track_running_stats=True)
    layer.train(isinstance(layer, nn.Dropout))
    return layer, torch.randn(2, channels, *[4] * axes, requires_grad=True)


@pytest.mark.parametrize("name", layers.__all__)
def test_a_checkpointed_block_may_end_with_any_layer(name: str) -> None:
    layer, x = layer_and_input(name)
    block = nn.Sequential(layer)
    gradients = []
    for run in (block, lambda t: checkpoint(block, t, use_reentrant=False)):
        torch.manual_seed(0)
        gradients += torch.autograd.grad(run(x).square().sum(), x)
    assert torch.equal(*gradients)


def written_and_read_whole(x: Tensor, activation: nn.Module) -> Tensor:
    whole = x.sin()
    part = whole[:, :2]
    activation(part).mul_(2)
    return whole


VIEWS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "view": lambda x, activation: activation(x.sin().view(2, -1)),
    "slice": lambda x, activation: activation(x.sin()[:, :2]),
    "instance norm": lambda x, activation: activation(F.instance_norm(x)),
    "whole": written_and_read_whole,
}


@pytest.mark.parametrize("way", VIEWS)
@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU", "Hardtanh"])
def test_a_view_may_be_written_to_in_a_checkpoint_under_create_graph(name: str, way: str) -> None:
    gradients = []
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    for package in (nn, layers):
        activation = getattr(package, name)(inplace=True)
        y = checkpoint(VIEWS[way], x * 1, activation, use_reentrant=False)
        (dx,) = torch.autograd.grad(y.square().mean(), x, create_graph=True)
        gradients += torch.autograd.grad(dx.square().sum(), x)
    assert torch.equal(*gradients)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", layers.__all__)
def test_an_exception_of_a_hook_is_seen_at_once(name: str) -> None:
    layer, x = layer_and_input(name)
    calls, raised = 0, False

    def pack(tensor: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        raise Stop

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        try:
            layer(x)
        except Stop:
            raised = True
    assert calls == int(raised)
    assert raised or name.startswith(("Avg", "Adaptive", "Reflection", "Replication"))


@pytest.mark.parametrize("package", ["functional", "nn"])
def test_layers_catch_nothing(package: str) -> None:
    files = sorted((Path(freezekit.__file__).parent / package).glob("*.py"))
    assert files
    found = [
        f"{file.name}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Try)
    ]
    assert not found
