"""Fused blocks under a trace: which would run as one operator now, so that a trace leaves their layers unwatched.

A hook on a layer makes its block run layer by layer, and a trace watches layers by hooks. It must not change what it
looks at: layers of blocks that would run fused get none, and their operator is told by the block's name.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from freezekit.fusion.classes import plan_of
from freezekit.fusion.layers import why_unfused
from freezekit.fusion.plan import BlockNames
from freezekit.fusion.report import block_layers

OPERATORS = (torch.ops.freezekit.frozen_conv2d.default, torch.ops.freezekit.frozen_conv2d_shared.default)


class FusedBlocks:
    """The blocks of models that would run fused in a call made now."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.labels: dict[int, list[str]] = {}
        self.unwatched: set[int] = set()
        for module in (part for model in models for part in model.modules()):
            plan = plan_of(module)
            if plan is None or "forward" in module.__dict__ or id(module) in self.unwatched:
                continue
            # A hook on a sequence that the plan looks into would change what runs.
            self.unwatched |= {id(module.get_submodule(path)) for path in plan.sequences}
            for names in plan.blocks:
                layers = block_layers(module, names)
                if layers is not None and not why_unfused(*layers):
                    self.labels.setdefault(id(module), []).append("fused " + label(names))
                    self.unwatched |= {id(layer) for layer in layers if isinstance(layer, nn.Module)}

    def label_of(self, module: nn.Module | None, number: int) -> str:
        """What the `number`-th fused operator in a module's forward stands for; "" for a module without any."""
        labels = self.labels.get(id(module))
        return labels[min(max(number, 1), len(labels)) - 1] if labels else ""


def label(names: BlockNames) -> str:
    """``conv1 + bn1 + add + relu``."""
    parts = (names.conv, names.norm, "add" if names.adds else "", names.activation)
    return " + ".join(part for part in parts if part)
