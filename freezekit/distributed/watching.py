"""Where what a DDP wrapper reduces differs from what trains inside it, and hooks that raise before that does harm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.hooks import RemovableHandle

from freezekit._arguments import check_module
from freezekit.distributed.rewrapping import check_ddp, retired


class StaleWrapperError(RuntimeError):
    """A DDP wrapper no longer fits what is frozen inside it."""


@dataclass(frozen=True)
class Mismatch:
    """How a DDP wrapper differs from the module inside it.

    Attributes:
        frozen: parameters whose gradients DDP waits for, and which are frozen.
        unfrozen: parameters that train, and whose gradients DDP does not reduce.
        unnamed: a sentence, when the numbers differ but it cannot be told which parameters; else "".
    """

    frozen: tuple[str, ...] = ()
    unfrozen: tuple[str, ...] = ()
    unnamed: str = ""

    def __bool__(self) -> bool:
        return bool(self.frozen or self.unfrozen or self.unnamed)


def wrappers(model: nn.Module) -> Iterator[tuple[str, DDP]]:
    """Name and wrapper of every DDP in the model, itself included."""
    check_module(model)
    for name, module in model.named_modules():
        if isinstance(module, DDP):
            yield name, module


def wrapper_prefix(model: Any) -> str:
    """What stands before the names of parameters in ``model`` because DDP, DataParallel or torch.compile wraps it.

    >>> wrapper_prefix(nn.DataParallel(nn.Linear(2, 2))), wrapper_prefix(nn.Linear(2, 2))
    ('module.', '')
    """
    name = "module" if isinstance(model, DDP | nn.DataParallel) else "_orig_mod"
    inner = getattr(model, name, None)
    return f"{name}.{wrapper_prefix(inner)}" if isinstance(inner, nn.Module) else ""


def unwrapped(model: Any) -> Any:
    """What is inside DDP, DataParallel and torch.compile; anything else, a module or not, is returned as it is.

    >>> net = nn.Linear(2, 2)
    >>> unwrapped(net) is unwrapped(nn.DataParallel(net)) is net
    True
    """
    return reduce(getattr, wrapper_prefix(model).split(".")[:-1], model)


def _candidates(ddp: DDP) -> dict[str, nn.Parameter]:
    """The parameters that DDP would reduce if they required grad, each once."""
    return {n: p for n, p in ddp.module.named_parameters() if n not in ddp.parameters_to_ignore}


def _marks(p: nn.Parameter) -> dict[str, Any]:
    """The free-form dictionary on the parameter's gradient accumulator (typed as a method in torch's stubs)."""
    metadata: Any = torch.autograd.graph.get_gradient_edge(p).node.metadata
    return metadata


def _is_held(p: nn.Parameter) -> bool:
    """Whether something keeps the parameter's gradient accumulator alive, as DDP's reducer does.

    The accumulator is made when a graph needs it and dies with the last graph; a mark on it survives only if it is
    held. ``requires_grad`` is as before when this returns.
    """
    if not (p.is_leaf and (p.is_floating_point() or p.is_complex())):
        return False
    before = p.requires_grad
    p.requires_grad_(True)
    try:
        _marks(p)["freezekit_held"] = True
        return _marks(p).pop("freezekit_held", False)
    finally:
        p.requires_grad_(before)


def _built_for(ddp: DDP) -> tuple[int, int]:
    """Number and total bytes of the parameters that the reducer was built for."""
    data = ddp._get_ddp_logging_data()
    return data["num_parameter_tensors"], data["total_parameter_size_bytes"]


def reduced(ddp: DDP) -> frozenset[str] | None:
    """Names of the parameters whose gradients DDP reduces; None when it cannot be told.

    It cannot while an older graph still holds accumulators of other parameters, and under DDP's mixed precision.
    """
    check_ddp(ddp)
    held = frozenset(n for n, p in _candidates(ddp).items() if _is_held(p))
    return held if len(held) == _built_for(ddp)[0] else None


def mismatch(ddp: DDP) -> Mismatch:
    """What was frozen or unfrozen since ``ddp`` was built.

    Args:
        ddp: the wrapper. Nothing is changed, and nothing is communicated.

    Returns:
        A `Mismatch`, falsy when the wrapper fits.
    """
    return _compare(ddp, reduced(ddp))


def _compare(ddp: DDP, built: frozenset[str] | None) -> Mismatch:
    trainable = {n: p for n, p in _candidates(ddp).items() if p.requires_grad}
    if built is not None:
        now = frozenset(trainable)
        return Mismatch(tuple(sorted(built - now)), tuple(sorted(now - built)))
    was = _built_for(ddp)
    now_size = (len(trainable), sum(p.numel() * p.element_size() for p in trainable.values()))
    if was == now_size:
        return Mismatch()
    return Mismatch(unnamed=f"DDP was built for {was[0]} trainable parameters ({was[1]} bytes), and the module now has "
                    f"{now_size[0]} ({now_size[1]} bytes)")  # fmt: skip


def waits_for_frozen(ddp: DDP) -> bool:
    """Whether a parameter frozen after wrapping makes DDP wait for a gradient that never comes.

    With ``find_unused_parameters=True`` and no static graph it finds that out by itself, and where all that it reduces
    is frozen, as a discriminator for the generator's step, it never begins to wait.
    """
    if ddp.static_graph:
        return True
    return not ddp.find_unused_parameters and any(p.requires_grad for p in _candidates(ddp).values())


_CURE = "Build the wrapper anew after freezing or unfreezing: ddp = freezekit.distributed.rewrap(ddp)"


def _raise(ddp: DDP, found: Mismatch) -> None:
    parts = []
    if found.unfrozen:
        parts.append(
            f"{', '.join(found.unfrozen)} became trainable after DDP wrapped the model: their gradients would not be "
            "reduced and the ranks would diverge"
        )
    if found.frozen and waits_for_frozen(ddp):
        parts.append(
            f"{', '.join(found.frozen)} were frozen after DDP wrapped the model: DDP would wait for their gradients"
        )
    if found.unnamed and any(p.requires_grad for p in _candidates(ddp).values()):
        parts.append(found.unnamed)
    if parts:
        raise StaleWrapperError("; ".join(parts) + ". " + _CURE)


def check(ddp: DDP) -> None:
    """Raise `StaleWrapperError`, naming the parameters and the cure, when ``ddp`` no longer fits what is frozen.

    Freezing under ``find_unused_parameters=True`` is not an error, nor is freezing everything: DDP copes with both.
    """
    _raise(ddp, mismatch(ddp))


class _Watch:
    """Forward pre-hook of a DDP wrapper, or of a module inside one: checks what is frozen before every forward pass.

    What the reducer holds is asked once per reducer, and kept; after that a pass costs one look at each parameter.
    """

    def __init__(self) -> None:
        self.reducer: Any = None
        self.built: frozenset[str] | None = None
        # Not as a decorator: it imports all of torch._dynamo, a second that `import freezekit` would take.
        self.look = torch.compiler.disable(self._look)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return _Watch()

    def __reduce__(self) -> tuple[Any, ...]:
        # A model's pickle holds plain Python only, so that it loads without freezekit: this hook returns the arguments
        # as they came. The next freeze() in the process that loads it places a new watch.
        return getattr, ({}, "get")

    def __call__(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, DDP):
            self.look(module)
        elif not torch.compiler.is_compiling() and DDP._active_ddp_module is not None:
            # Not in a compiled module inside the wrapper: the look would break its graph in two.
            self.look(DDP._active_ddp_module)

    def _look(self, ddp: DDP) -> None:
        if not torch.is_grad_enabled():
            return
        if retired(ddp):
            raise StaleWrapperError("this DDP wrapper was replaced: use the one that rewrap returned")
        if self.reducer is not ddp.reducer or self.built is None:
            self.reducer, self.built = ddp.reducer, reduced(ddp)
        _raise(ddp, _compare(ddp, self.built))


def watch(module: nn.Module) -> RemovableHandle:
    """Check before every forward pass under grad that DDP still fits what is frozen; a misfit raises.

    Args:
        module: a DDP wrapper, or a module that is (or will be) inside one: then the check runs when a DDP forward
            pass reaches the module, unless the module is compiled. Watching twice gives two hooks.

    Returns:
        A handle; ``handle.remove()`` ends the watch.
    """
    check_module(module, "module")
    return module.register_forward_pre_hook(_Watch())


def note_freeze(model: nn.Module) -> None:
    """To be called when ``requires_grad`` of parameters of ``model`` changed: watches every DDP in and around it.

    `freezekit.freezing.freeze` and ``unfreeze`` call it. Does nothing unless torch.distributed is initialised, and
    nothing when called again.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    targets: list[nn.Module] = [ddp for _, ddp in wrappers(model)] or [model]
    for target in targets:
        if not any(isinstance(hook, _Watch) for hook in target._forward_pre_hooks.values()):
            watch(target)
