"""Checks that need a forward pass: buffers that move under frozen layers, trainable layers that lose their gradient.

The pass runs in the model's present mode on the given inputs, under a fork of the random state, and its buffers are put
back. There is no backward pass, so no gradient, hook of a parameter or communication of DDP is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from freezekit.freezing.bits import same_bits

from .report import Finding, brief
from .subject import Subject, can_train, is_in_frozen_block
from .tensors import moves_statistics

_LOST = "None of the inputs have requires_grad=True"


@dataclass
class Probe:
    """What one forward pass showed.

    moved: buffers that the pass changed; reached: ``id`` of each parameter that backward from the outputs would reach;
    nodes: class names of the graph's nodes; unrecorded: trainable modules that ran with gradients switched off;
    recorded: whether any output requires grad; lost: whether reentrant checkpointing said that it found no gradient;
    called: modules that ran.
    """

    moved: list[str] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)
    nodes: set[str] = field(default_factory=set)
    unrecorded: list[str] = field(default_factory=list)
    recorded: bool = False
    lost: bool = False
    called: set[int] = field(default_factory=set)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile, whose forward has no side effects of theirs."""
    while True:
        inner = model.module if isinstance(model, DDP) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _walk(outputs: list[torch.Tensor], probe: Probe) -> None:
    """Collect the graph behind the outputs, without running it."""
    stack: list[Any] = []
    for out in outputs:
        probe.recorded |= out.requires_grad
        if out.grad_fn is not None:
            stack.append(out.grad_fn)
        elif out.requires_grad:
            probe.reached.add(id(out))
    seen = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        probe.nodes.add(node.name())
        if hasattr(node, "variable"):
            probe.reached.add(id(node.variable))
        stack.extend(n for n, _ in node.next_functions if n is not None)


def _watch(model: nn.Module, names: dict[int, str], probe: Probe) -> list[RemovableHandle]:
    def before(module: nn.Module, args: Any) -> None:
        probe.called.add(id(module))
        own = any(p.requires_grad for p in module.parameters(recurse=False))
        if own and not torch.is_grad_enabled():
            probe.unrecorded.append(names[id(module)])

    return [m.register_forward_pre_hook(before) for m in model.modules()]


def run(subject: Subject) -> Probe:
    """One forward pass of the unwrapped model on ``subject.inputs``; whatever it raises is the caller's to see."""
    assert subject.inputs is not None
    model = unwrapped(subject.model)
    probe = Probe()
    names = {id(m): n for n, m in subject.modules()}
    before = {n: b.detach().clone() for n, b in model.named_buffers()}
    handles = _watch(model, names, probe)
    try:
        with torch.random.fork_rng(), torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs = subject.inputs.call(model)
    finally:
        for handle in handles:
            handle.remove()
        for name, buffer in model.named_buffers():
            if name in before and not same_bits(buffer, before[name]):
                probe.moved.append(name)
                with torch.no_grad():
                    buffer.copy_(before[name])
    probe.lost = any(_LOST in str(w.message) for w in caught)
    _walk([t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)], probe)
    return probe


def check_forward(subject: Subject) -> Iterator[Finding]:
    """Run the probe and report what it showed."""
    probe = run(subject)
    yield from _buffers(subject, probe)
    yield from _gradients(subject, probe)


def _buffers(subject: Subject, probe: Probe) -> Iterator[Finding]:
    model = unwrapped(subject.model)
    values: list[str] = []
    counters: list[str] = []
    for name in probe.moved:
        path, _, _ = name.rpartition(".")
        # Running statistics have a check of their own, which needs no inputs.
        if is_in_frozen_block(model, path) and not moves_statistics(model.get_submodule(path)):
            (values if can_train(model.get_buffer(name)) else counters).append(name)
    # An integer buffer is most often a counter that the output does not depend on.
    for names, severity in ((values, "error"), (counters, "info")):
        if names:
            yield Finding(
                "moving-buffer",
                severity,
                brief(names),
                f"{len(names)} buffer(s) of frozen modules changed in one forward pass",
                "call .eval() on these modules, or write the buffer in train mode only",
                tuple(names),
            )


def _gradients(subject: Subject, probe: Probe) -> Iterator[Finding]:
    if not subject.trainable:
        return
    checkpointed = any("CheckpointFunction" in n for n in probe.nodes)
    if probe.lost and probe.unrecorded:
        doubt = "some of " if checkpointed else ""
        yield Finding(
            "reentrant-checkpoint",
            "error",
            brief(probe.unrecorded),
            "reentrant checkpointing over inputs that need no gradient (a frozen prefix): "
            f"{doubt}{len(probe.unrecorded)} trainable module(s) inside get none",
            "checkpoint(..., use_reentrant=False), or make the input of the first block require grad",
            tuple(probe.unrecorded),
        )
        return
    if checkpointed:
        return  # what lies inside a reentrant checkpoint is not in this graph
    if not probe.recorded:
        yield Finding(
            "no-gradient",
            "error",
            "(root)",
            "the output requires no gradient although parameters are trainable: backward() raises",
            "look for detach(), .data or no_grad() in forward, or unfreeze a layer that it uses",
            tuple(subject.trainable),
        )
        return
    missed = tuple(n for n, p in subject.trainable.items() if id(p) not in probe.reached)
    if missed:
        yield Finding(
            "unreached",
            "info",
            brief(missed),
            f"{len(missed)} trainable parameter(s) get no gradient from these inputs",
            "freeze them if that is always so; under DDP they need find_unused_parameters=True",
            missed,
        )
