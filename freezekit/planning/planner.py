"""One forward pass without data for every way of freezing; on request a real step too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from freezekit._arguments import check_module, check_real
from freezekit._inputs import Arguments, arguments
from freezekit.explanation.trace import Trace, trace
from freezekit.planning.machine import Machine, seconds
from freezekit.planning.report import Option, Plan


def plan(
    model: nn.Module,
    inputs: Any,
    memory: float | None = None,
    time: float | None = None,
    machine: Machine | None = None,
    measure: bool = False,
) -> Plan:
    """Predicts kept bytes and backward time for every depth of freezing and for named regimes.

    Nothing of the model is changed and nothing of it is run on data: each option is a forward pass on the meta device.
    The depths freeze the first layers in forward order, which is what fine-tuning does most; bytes are those of the
    layers that the model has now, so convert it first.

    Args:
        model: any module that runs without data; see `explain`.
        inputs: as for `explain`.
        memory: budget in bytes for what is kept between forward and backward.
        time: budget in seconds for the backward pass.
        machine: what times are predicted from; None measures the device of the model's first parameter.
        measure: run each option too, on a copy of the model, and report bytes and time beside the predictions; needs
            inputs with data, and memory for a step with nothing frozen.

    Returns:
        Plan: `.choice` is the shallowest depth within the budget; `.print()`, `.to_json()`, `.plot("plan.png")`.

    Raises:
        ValueError: if a budget is not positive, the model has no parameters, or there is no data to measure with.
        TypeError, RuntimeError: as `explain`.

    >>> import torch, freezekit as fk
    >>> from torch import nn
    >>> net = fk.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)))
    >>> plan(net, torch.empty(2, 3, 32, 32, device="meta"), memory=60_000).choice.name
    'depth 2'
    """
    check_module(model)
    if machine is not None and not isinstance(machine, Machine):
        raise TypeError(f"machine must be a Machine, got {type(machine).__name__}")
    for name, budget in (("memory", memory), ("time", time)):
        if budget is not None:
            check_real(name, budget)
            if not budget > 0:
                raise ValueError(f"{name} must be positive, got {budget}")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("model has no parameters: there is nothing to freeze")
    given = arguments(inputs)
    tensors = [*model.parameters(), *torch.utils._pytree.tree_leaves(given)]
    if measure and any(isinstance(t, Tensor) and t.is_meta for t in tensors):
        raise ValueError("measure=True runs the model: it and inputs must hold data, got a tensor on the meta device")
    where = "cpu" if parameter.is_meta else parameter.device
    machine = machine or Machine.measure(where, parameter.dtype)
    planner = _Planner(model, given, machine)
    options = [*planner.depths(), *planner.regimes()]
    if measure:
        twin = copy.deepcopy(model)
        options = [_measure(twin, given, option) for option in options]
    return Plan(options, machine, memory, time)


class _Planner:
    def __init__(self, model: nn.Module, inputs: Arguments, machine: Machine) -> None:
        self.model = model
        self.inputs = inputs
        self.machine = machine
        self.parameters = dict(model.named_parameters())

    def depths(self) -> Iterator[Option]:
        frozen: list[str] = []
        yield self._option("depth 0", frozen)
        for depth, layer in enumerate(self._layers, 1):
            frozen += layer
            yield self._option(f"depth {depth}", frozen)

    def regimes(self) -> Iterator[Option]:
        norms = {f"{n}.{p}" for n, m in self.model.named_modules() if _is_norm(m) for p, _ in m.named_parameters()}
        last = set(self._layers[-1])
        learning: dict[str, Callable[[str], bool]] = {
            "biases learn": lambda name: name.endswith("bias"),
            "norms learn": lambda name: name in norms,
            "last layer learns": lambda name: name in last,
            "input learns": lambda name: False,
        }
        for regime, learns in learning.items():
            frozen = [name for name in self.parameters if not learns(name)]
            yield self._option(regime, frozen, input_learns=regime == "input learns")

    @cached_property
    def _layers(self) -> list[list[str]]:
        """Names of the parameters of each layer that has some, in forward order; those never called come last."""
        names = {id(p): name for name, p in self.parameters.items()}
        order: dict[str, list[str]] = {}
        for call in self._trace([], False).calls:
            if call.module is not None and not call.function:
                own = [names[id(p)] for p in call.module.parameters(recurse=False) if id(p) in names]
                if own:
                    order.setdefault(call.name, own)
        called = {name for layer in order.values() for name in layer}
        rest = [name for name in self.parameters if name not in called]
        return [*order.values(), *([rest] if rest else [])]

    def _option(self, name: str, frozen: list[str], input_learns: bool = False) -> Option:
        traced = self._trace(frozen, input_learns)
        flops, seconds = 0, 0.0
        for call in traced.calls:
            weight = None if call.function else getattr(call.module, "weight", None)
            wgrad = isinstance(weight, Tensor) and self._name(weight) not in frozen
            dgrad = call.input_needs_grad and call.output_needs_grad
            passes = wgrad + dgrad
            flops += call.flops * passes
            seconds += passes * max(call.flops / self.machine.flops, call.moved / self.machine.bandwidth)
        trainable = sum(p.numel() for n, p in self.parameters.items() if n not in frozen)
        return Option(name, tuple(frozen), traced.bytes_kept, flops, seconds, trainable)

    def _name(self, parameter: Tensor) -> str | None:
        return next((name for name, p in self.parameters.items() if p is parameter), None)

    def _trace(self, frozen: list[str], input_learns: bool) -> Trace:
        inputs = self.inputs
        if input_learns:
            inputs = torch.utils._pytree.tree_map(_learning, inputs)
        with _frozen(self.parameters, frozen):
            return trace(self.model, inputs)


def _measure(model: nn.Module, inputs: Arguments, option: Option) -> Option:
    """Bytes that autograd keeps in a real step, and the shortest of a few backward passes."""
    if option.name == "input learns":
        inputs = torch.utils._pytree.tree_map(
            lambda v: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v, inputs
        )
    own: set[int] = set()
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    device = next(model.parameters()).device
    with _frozen(dict(model.named_parameters()), list(option.frozen)):
        there = [*model.parameters(), *model.buffers()]
        own |= {tensor.untyped_storage()._cdata for tensor in there}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = inputs.call(model)
        outputs = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        count = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        elapsed = 0.0
        if outputs:
            ones = [torch.ones_like(t) for t in outputs]
            wanted = [
                t
                for t in [*model.parameters(), *torch.utils._pytree.tree_leaves(inputs)]
                if isinstance(t, Tensor) and t.requires_grad
            ]
            elapsed = seconds(
                lambda: torch.autograd.grad(outputs, wanted, ones, retain_graph=True, allow_unused=True), device
            )
    return replace(option, measured_bytes=count, measured_seconds=elapsed)


def _learning(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to("meta").requires_grad_()
    return value


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))


@contextmanager
def _frozen(parameters: dict[str, nn.Parameter], frozen: list[str]) -> Iterator[None]:
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name not in frozen)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
