"""Checks that need a forward pass: tensors that move under frozen layers, trainable layers that lose their gradient.

The pass runs on a copy of the model, in its present mode. There is no backward pass, so no gradient, hook of a
parameter or communication of DDP is touched.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from freezekit._inputs import tensors_in
from freezekit._twin import CannotWatch, Twin
from freezekit.distributed.watching import unwrapped
from freezekit.freezing.bits import same_bits

from .dropping import Dropping
from .report import Finding, about
from .subject import Subject, can_train, is_in_frozen_block
from .tensors import active_dropout, dropout_in_frozen_parts, drops, moves_statistics

_LOST = "None of the inputs have requires_grad=True"


class CannotCopy(Exception):
    """A forward pass was to run on a copy of the model, and there is none."""


@dataclass
class Probe:
    """What one forward pass showed.

    moved: buffers and parameters that the pass changed; reached: ``id`` of each parameter that backward from the
    outputs would reach; nodes: class names of the graph's nodes; unrecorded: trainable modules that ran with gradients
    switched off; dropping: modules that called a function which drops at random; between: modules that dropped what
    frozen parameters made and frozen ones read; recorded: whether any output requires
    grad; lost: whether reentrant checkpointing said that it found no gradient.
    """

    moved: list[str] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)
    nodes: set[str] = field(default_factory=set)
    unrecorded: list[str] = field(default_factory=list)
    dropping: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    recorded: bool = False
    lost: bool = False


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


def run(subject: Subject) -> Probe:
    """One forward pass of a copy of the unwrapped model; whatever it raises is the caller's to see.

    Raises:
        CannotCopy: the model has no copy to run.
    """
    assert subject.inputs is not None
    model = unwrapped(subject.model)
    probe = Probe()
    try:
        twin = Twin(model, subject.inputs, data=True)
    except (TypeError, ValueError) as error:
        raise CannotCopy(str(error)) from error
    copied = twin.roots[""]
    # By names, the first of each last: what is a weak proxy of a module has a copy of its own.
    parts, named = dict(model.named_modules(remove_duplicate=False)), {id(m): name for name, m in subject.modules()}
    every = list(copied.named_modules(remove_duplicate=False))[::-1]
    names = {id(module): named[id(parts[name])] for name, module in every}
    originals = dict(model.named_parameters(remove_duplicate=False))
    sources = {id(p): id(originals[name]) for name, p in copied.named_parameters(remove_duplicate=False)}

    def before(module: nn.Module, args: Any) -> None:
        own = any(p.requires_grad for p in module.parameters(recurse=False))
        if own and not torch.is_grad_enabled():
            probe.unrecorded.append(names[id(module)])

    dropping = Dropping()
    for module in copied.modules():
        module.register_forward_pre_hook(before)
        dropping.watch(module)
    with twin.undisturbed(), torch.enable_grad(), dropping, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outputs = twin.run()
        except CannotWatch as error:
            raise CannotCopy(str(error)) from error
    probe.dropping = list(dict.fromkeys(names[id(m)] for m in dropping.called if id(m) in names and not drops(m)))
    probe.between = list(dict.fromkeys(names[id(m)] for m in dropping.between if id(m) in names))
    probe.lost = any(_LOST in str(w.message) for w in caught)
    _walk(tensors_in(outputs), probe)
    now = dict(_tensors(copied, remove_duplicate=False))  # of which the pass may have taken some away, or added some
    probe.moved = [n for n, source in _tensors(model) if n in now and not same_bits(now[n], source)]
    probe.reached = {sources[key] for key in probe.reached if key in sources}
    return probe


def _tensors(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_buffers(remove_duplicate=remove_duplicate)
    yield from model.named_parameters(remove_duplicate=remove_duplicate)


def check_forward(subject: Subject, probe: Probe) -> Iterator[Finding]:
    """Report what the probe showed."""
    yield from _moved(subject, probe)
    yield from _gradients(subject, probe)
    if not subject.trainable:
        return
    dropping = [path for path in probe.dropping if path != "(root)" and is_in_frozen_block(subject.model, path)]
    if dropping:
        yield from active_dropout(dropping, f"{len(dropping)} frozen module(s) call functions that drop at random")
    known = {*dropping, *dropout_in_frozen_parts(subject.model)}
    if between := [path for path in probe.between if path not in known]:
        yield from active_dropout(between, f"{len(between)} module(s) drop at random between frozen layers")


def _moved(subject: Subject, probe: Probe) -> Iterator[Finding]:
    model = unwrapped(subject.model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    parameters = [name for name in probe.moved if name in frozen]
    yield from about(
        parameters,
        "moving-parameter",
        "error",
        f"{len(parameters)} frozen parameter(s) were written to in one forward pass, as nn.Embedding(max_norm=...) "
        "does",
        "keep the forward from writing to them, or unfreeze them",
    )
    buffers = dict(model.named_buffers())
    values: list[str] = []
    counters: list[str] = []
    for name in probe.moved:
        path, _, _ = name.rpartition(".")
        # Running statistics have a check of their own, which needs no inputs.
        if name in buffers and is_in_frozen_block(model, path) and not moves_statistics(model.get_submodule(path)):
            (values if can_train(buffers[name]) else counters).append(name)
    # An integer buffer is most often a counter that the output does not depend on.
    for names, severity in ((values, "error"), (counters, "info")):
        yield from about(
            names,
            "moving-buffer",
            severity,
            f"{len(names)} buffer(s) of frozen modules changed in one forward pass",
            "call .eval() on these modules, or write the buffer in train mode only",
        )


def _gradients(subject: Subject, probe: Probe) -> Iterator[Finding]:
    if not subject.trainable:
        return
    checkpointed = any("CheckpointFunction" in n for n in probe.nodes)
    if probe.lost and probe.unrecorded:
        doubt = "some of " if checkpointed else ""
        yield from about(
            probe.unrecorded,
            "reentrant-checkpoint",
            "error",
            "reentrant checkpointing over inputs that need no gradient (a frozen prefix): "
            f"{doubt}{len(probe.unrecorded)} trainable module(s) inside get none",
            "checkpoint(..., use_reentrant=False), or make the input of the first block require grad",
        )
        return
    if checkpointed:
        return  # the inside of a reentrant checkpoint is not in this graph
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
    yield from about(
        missed,
        "unreached",
        "info",
        f"{len(missed)} trainable parameter(s) get no gradient from these inputs",
        "freeze them if that is always so; under DDP they need find_unused_parameters=True",
    )
