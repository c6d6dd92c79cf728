"""Hooks that stand outside a layer: torch's global module hooks, and those of state dictionaries and their loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks

import freezekit as fk
from tests.dropin.twins import assert_same, gradients, turns

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def name_of(module: nn.Module) -> str:
    return type(module).__name__.replace("Freezable", "")


def test_global_module_hooks(way: str) -> None:
    seen: list[list[tuple[str, str]]] = []
    results = []
    for net in turns(way):
        seen.append([])

        def note(kind: str, change: float | None = None, log: list[tuple[str, str]] = seen[-1]) -> Any:
            def hook(module: nn.Module, *given: Any) -> Any:
                log.append((kind, name_of(module)))
                return None if change is None else given[-1] * change

            return hook

        handles = [
            global_hooks.register_module_forward_pre_hook(note("pre")),
            global_hooks.register_module_forward_hook(note("forward", 1.5)),
            global_hooks.register_module_full_backward_pre_hook(note("backward pre")),
            global_hooks.register_module_full_backward_hook(note("backward")),
            global_hooks.register_module_parameter_registration_hook(note("parameter")),
        ]
        try:
            results.append(gradients(net, X))
            net[0].extra = nn.Parameter(torch.zeros(1))
            del net[0].extra
        finally:
            for handle in handles:
                handle.remove()
    assert_same(*results)
    assert seen[0] == seen[1]
    assert {kind for kind, _ in seen[0]} == {"pre", "forward", "backward pre", "backward", "parameter"}


def test_hooks_of_state_dictionaries() -> None:
    seen: list[list[str]] = []
    for kind in (fk.FreezableConv2d, nn.Conv2d):
        log: list[str] = []
        seen.append(log)
        conv = kind(3, 4, 3)

        def after(module: nn.Module, state: dict[str, Any], *_: Any, log: list[str] = log) -> None:
            log.append("saved")
            state["old_name"] = state.pop("weight")

        def before(module: nn.Module, state: dict[str, Any], *_: Any, log: list[str] = log) -> None:
            log.append("loading")
            state["weight"] = state.pop("old_name")

        conv.register_state_dict_post_hook(after)
        conv.register_load_state_dict_pre_hook(before)
        state = conv.state_dict()
        assert "weight" not in state
        log.append(str(conv.load_state_dict(state)))
    assert seen[0] == seen[1]
