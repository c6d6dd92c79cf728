"""One forward pass of a copy for every way of freezing; on request a real step too."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from freezekit._arguments import check_flag, check_real
from freezekit._inputs import Arguments, arguments, tensors_in
from freezekit._twin import Twin, has_data, looking_once, roots_of
from freezekit.distributed.watching import unwrapped
from freezekit.explanation.record import Trace
from freezekit.explanation.report import learning
from freezekit.explanation.trace import trace
from freezekit.freezing import freeze, unfreeze
from freezekit.planning.report import Machine, Option, Plan, seconds


def plan(
    model: Callable[..., Any],
    inputs: Any,
    memory: float | None = None,
    time: float | None = None,
    machine: Machine | None = None,
    measure: bool = False,
) -> Plan:
    """Predicts kept bytes and backward time for every depth of freezing and for named regimes.

    Each option is played by `unfreeze` and `freeze` on a copy of the model, norms included, and a forward pass of that
    copy, without data where that tells (see `explain`); nothing of the model changes. The depths freeze the first
    layers in forward order, which is what fine-tuning does most; bytes are those of the layers that the model has now,
    so convert it first. Where the forward refuses inputs that need a gradient, there is no option "input learns".

    Args:
        model, inputs: as for `explain`.
        memory: budget in bytes for what is kept between forward and backward.
        time: budget in seconds for the backward pass.
        machine: what times are predicted from; None measures the device of the model's first parameter.
        measure: run each option on data too, and report bytes and time beside the predictions; needs inputs with data,
            and memory for a copy of the model and a step with nothing frozen.

    Returns:
        Plan: `.choice` is the shallowest depth within the budget; `.print()`, `.to_dict()`, `.plot("plan.png")`.

    Raises:
        ValueError: if a budget is not positive, the model has no parameters, or there is no data to measure with.
        TypeError, RuntimeError: as `explain`.

    >>> import torch, freezekit as fk
    >>> from torch import nn
    >>> net = fk.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)))
    >>> plan(net, torch.empty(2, 3, 32, 32, device="meta"), memory=60_000).choice.name
    'depth 2'
    """
    if machine is not None and not isinstance(machine, Machine):
        raise TypeError(f"machine must be a Machine, got {type(machine).__name__}")
    for name, budget in (("memory", memory), ("time", time)):
        if budget is not None:
            check_real(name, budget)
            if not budget > 0:
                raise ValueError(f"{name} must be positive, got {budget}")
    check_flag("measure", measure)
    model, roots = unwrapped(model), roots_of(unwrapped(model))
    parameter = next((p for root in roots.values() for p in root.parameters()), None)
    if parameter is None:
        raise ValueError("model has no parameters: there is nothing to freeze")
    given = arguments(inputs)
    if measure and not has_data(roots, given):
        raise ValueError("measure=True runs the model: it and inputs must hold data, got a tensor on the meta device")
    where = "cpu" if parameter.is_meta else parameter.device
    machine = machine or Machine.measure(where, parameter.dtype)
    planner = _Planner(model, given, machine)
    with looking_once():
        options = [*planner.depths(), *planner.regimes()]
        if measure:
            options = [planner.measured(option) for option in options]
    return Plan(options, machine, memory, time)


class _Planner:
    def __init__(self, model: Callable[..., Any], inputs: Arguments, machine: Machine) -> None:
        self.model = model
        self.inputs = inputs
        self.machine = machine
        self.roots = roots_of(model)
        self.sizes = {
            name: parameter.numel()
            for prefix, root in self.roots.items()
            for name, parameter in root.named_parameters(prefix)
        }

    def depths(self) -> list[Option]:
        frozen: list[str] = []
        options = [self._option("depth 0", frozen)]
        called = {name for layer in self._layers for name in layer}
        rest = [name for name in self.sizes if name not in called]
        for depth, layer in enumerate([*self._layers, *([rest] if rest else [])], 1):
            frozen += layer
            options.append(self._option(f"depth {depth}", frozen))
        return options

    def regimes(self) -> list[Option]:
        modules = [item for prefix, root in self.roots.items() for item in root.named_modules(prefix=prefix)]
        norms = {name for prefix, m in modules if _is_norm(m) for name, _ in m.named_parameters(prefix)}
        last = set(self._layers[-1]) if self._layers else set()
        learning: dict[str, Callable[[str], bool]] = {
            "biases learn": lambda name: name.endswith("bias"),
            "norms learn": lambda name: name in norms,
            "last layer learns": lambda name: name in last,
            "input learns": lambda name: False,
        }
        options = []
        for regime, learns in learning.items():
            frozen = [name for name in self.sizes if not learns(name)]
            try:
                options.append(self._option(regime, frozen))
            except RuntimeError:
                # The last depth has run with all of it frozen: it is an input that cannot need a gradient.
                if regime != "input learns":
                    raise
        return options

    @cached_property
    def _layers(self) -> list[list[str]]:
        """Names of the parameters of each layer that has some and is called, in forward order."""
        owned: dict[str, list[str]] = defaultdict(list)
        for name in self.sizes:
            owned[layer_of(name.rpartition(".")[0])].append(name)
        order: dict[str, list[str]] = {}
        for call in self._trace("depth 0", []).calls:
            layer = layer_of(call.name)
            # A parametrized layer has children, and is known by the functions that it calls.
            parametrized = layer != call.name or (call.module is not None and is_parametrized(call.module))
            if layer in owned and (parametrized or not call.function):
                order.setdefault(layer, owned[layer])
        return list(order.values())

    def _option(self, name: str, frozen: list[str]) -> Option:
        traced = self._trace(name, frozen)
        flops, seconds = 0, 0.0
        for call in traced.calls:
            passes = call.learns("weight") + (call.input_needs_grad and call.output_needs_grad)
            flops += call.flops * passes
            seconds += passes * max(call.flops / self.machine.flops, call.moved / self.machine.bandwidth)
        trainable = sum(size for name, size in self.sizes.items() if name not in frozen)
        return Option(name, tuple(frozen), traced.bytes_kept, flops, seconds, trainable)

    def _trace(self, option: str, frozen: list[str], measure: bool | None = None) -> Trace:
        try:
            return trace(self.model, self._inputs_of(option), measure, _freezer(frozen))
        except Exception as error:  # whatever a model raises that needs gradients of what is frozen
            if not frozen:
                raise
            raise RuntimeError(f"{option}, {len(frozen)} of {len(self.sizes)} parameters frozen: {error}") from error

    def _inputs_of(self, option: str) -> Arguments:
        return learning(self.inputs) if option == "input learns" else self.inputs

    def measured(self, option: Option) -> Option:
        """With the bytes that autograd keeps in a real step, and the shortest of a few backward passes."""
        frozen, inputs = list(option.frozen), self._inputs_of(option.name)
        count = self._trace(option.name, frozen, measure=True).bytes_kept
        twin = Twin(self.model, inputs, data=True)
        for name, root in twin.roots.items():
            _freezer(frozen)(name, root)
        with twin.undisturbed(), torch.enable_grad():
            outputs = [t for t in tensors_in(twin.run()) if t.requires_grad]
            leaves = [*twin.tensors(), *tensors_in(tuple(twin.inputs))]
            wanted = [t for t in leaves if t.requires_grad]
            ones = [torch.ones_like(t) for t in outputs]

            def backward() -> object:
                try:
                    return torch.autograd.grad(outputs, wanted, ones, retain_graph=True, allow_unused=True)
                except RuntimeError as error:
                    if "use_reentrant" not in str(error):
                        raise
                    raise RuntimeError(
                        "measure=True times torch.autograd.grad, which a reentrant checkpoint in the forward refuses: "
                        "call checkpoint(..., use_reentrant=False), or plan without measure=True"
                    ) from error

            elapsed = seconds(backward, next(twin.tensors()).device) if outputs and wanted else 0.0
        return replace(option, measured_bytes=count, measured_seconds=elapsed)


def _freezer(frozen: list[str]) -> Callable[[str, nn.Module], None]:
    """What plays an option on a copy: everything unfrozen, then these parameters frozen."""

    def play(prefix: str, root: nn.Module) -> None:
        own = dict(root.named_parameters(prefix))
        if own:
            unfreeze(root)
        if held := [parameter for name, parameter in own.items() if name in frozen]:
            freeze(root, held, norm="freeze")

    return play


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))


def layer_of(path: str) -> str:
    """The module at a path, or the one whose parametrization it is part of.

    >>> layer_of("0.1"), layer_of("0.parametrizations.weight.0")
    ('0.1', '0')
    """
    return re.sub(r"(^|\.)parametrizations(\..*)?$", "", path)
