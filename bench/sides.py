"""The competitors: each gets its own copy of the stock module and turns it into what it stands for."""

import contextlib
import copy
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from freezekit.backends import Backend


class Checkpointed(nn.Module):
    """Keeps only the inputs of `module`, and computes its forward pass again in the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=False)


@dataclass(frozen=True)
class Side:
    """One competitor.

    Attributes:
        name: as on the command line and in tables.
        prepare: makes this side's module from a copy of stock's; may change and return the copy.
        channels_last: whether module and input are converted to channels_last first.
        backend: freezekit's backend during the forward pass, where it is not the automatic one.
        hopper: whether that backend may run the kernels for sm_90a.
        enabled: whether freezekit's kernels stand in for torch's operators in the forward pass.
        sections: where it takes part; () is everywhere.
        slow: preparing it takes seconds, so a run of everything leaves it out of the hundreds of layers.
    """

    name: str
    prepare: Callable[[nn.Module], nn.Module]
    channels_last: bool = False
    backend: Backend | None = None
    hopper: bool = False
    enabled: bool = False
    sections: tuple[str, ...] = ()
    slow: bool = False

    def why_not(self, section: str, everything: bool) -> str:
        """Why it takes no part in a section of a run, of everything or not; "" if it does.

        >>> SIDES["checkpoint"].why_not("layers", everything=False)
        'takes part only in blocks, models, memory, scaling'
        """
        if self.sections and section not in self.sections:
            return f"takes part only in {', '.join(self.sections)}"
        if self.slow and everything and section == "layers":
            return "compiling every layer takes too long: ask for it with --section layers"
        return ""

    def is_apart(self, device: torch.device) -> bool:
        """Whether it has a process of its own (bench.child), since it may run freezekit's kernels on a GPU.

        They have run on none yet: one that hangs, or leaves an error that stays, must not take other sides with it.

        >>> SIDES["freezekit"].is_apart(torch.device("cuda")), SIDES["freezekit"].is_apart(torch.device("cpu"))
        (True, False)
        """
        own = self.name.startswith("freezekit") and self.backend != "aten"
        return own and (device.type == "cuda" or self.hopper)

    @property
    def reference(self) -> str:
        """The side that ratios are taken to: stock in the same memory format.

        >>> SIDES["freezekit"].reference, SIDES["freezekit_channels_last"].reference
        ('stock', 'stock_channels_last')
        """
        return "stock_channels_last" if self.channels_last and self.name != "stock_channels_last" else "stock"

    def build(self, stock: nn.Module) -> nn.Module:
        """This side's module; `stock` stays as it is."""
        module = copy.deepcopy(stock)
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self.prepare(module)

    def place(self, x: Tensor) -> Tensor:
        """This side's input, a leaf that shares nothing with `x`."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        return x.detach().clone(memory_format=layout).requires_grad_(x.requires_grad)

    def switch(self) -> AbstractContextManager[object]:
        """What to enter around many calls: switching takes longer than a small layer."""
        return fk.enabled() if self.enabled else contextlib.nullcontext()

    def forward(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The module's call, on this side's backend."""
        if self.enabled:
            return fk.enabled()(module.__call__)
        if self.backend is None:
            return module
        name = self.backend

        def call(x: Tensor) -> Tensor:
            with fk.backend(name, hopper=self.hopper):
                return module(x)

        return call


def _memsave(module: nn.Module) -> nn.Module:
    from memsave_torch.nn import convert_to_memory_saving

    return convert_to_memory_saving(module, verbose=False)


def _compiled(module: nn.Module) -> nn.Module:
    torch._dynamo.reset()  # Beyond its limit of recompilations torch would run later cases eagerly.
    module.compile()
    return module


_NETWORKS = ("blocks", "models", "memory", "scaling")

SIDES = {
    side.name: side
    for side in (
        Side("stock", lambda module: module),
        Side("freezekit", fk.convert),
        Side("freezekit_enabled", lambda module: module, enabled=True),
        Side("freezekit_aten", fk.convert, backend="aten"),
        Side("freezekit_native", fk.convert, backend="native"),
        Side("stock_channels_last", lambda module: module, channels_last=True),
        Side("freezekit_channels_last", fk.convert, channels_last=True),
        Side("freezekit_native_channels_last", fk.convert, channels_last=True, backend="native"),
        Side("freezekit_hopper_channels_last", fk.convert, channels_last=True, backend="native", hopper=True),
        Side("stock_compiled", _compiled, slow=True),
        Side("freezekit_compiled", lambda module: _compiled(fk.convert(module)), slow=True),
        Side("memsave_torch", _memsave),
        Side("freezekit_fused", lambda module: fk.fuse(fk.convert(module)), sections=_NETWORKS),
        Side("checkpoint", Checkpointed, sections=_NETWORKS),
    )
}

# The sides that take part in a run of everything; the other sides are variants of these, for a closer look.
COMPETITORS = (
    *("freezekit", "freezekit_fused", "freezekit_native", "freezekit_aten"),
    *("stock_channels_last", "stock_compiled", "memsave_torch", "checkpoint"),
)


def default_sides(device: torch.device) -> tuple[str, ...]:
    """What stock is compared with: on a GPU also freezekit's kernels and cuDNN in channels_last, which suits both.

    >>> default_sides(torch.device("cpu"))
    ('freezekit',)
    """
    if device.type != "cuda":
        return ("freezekit",)
    hopper = ("freezekit_hopper_channels_last",) if torch.cuda.get_device_capability(device) == (9, 0) else ()
    return ("stock_channels_last", "freezekit", "freezekit_native_channels_last", *hopper)


def why_absent(name: str, device: torch.device) -> str:
    """Why a side cannot run here; "" if it can.

    >>> why_absent("stock", torch.device("cpu"))
    ''
    """
    if name == "memsave_torch" and importlib.util.find_spec("memsave_torch") is None:
        return "memsave_torch is not installed"
    if SIDES[name].backend == "native" and device.type != "cuda":
        return "freezekit's own kernels need a CUDA device"
    if SIDES[name].hopper and torch.cuda.get_device_capability(device) != (9, 0):
        return "these kernels need a GPU of sm_90"
    if name == "freezekit_aten" and device.type != "cuda":
        return "on a CPU freezekit computes by ATen anyway"
    return ""


@contextlib.contextmanager
def cudnn_benchmark():  # type: ignore[no-untyped-def]
    """Within the block cuDNN picks its algorithms by measuring, as a careful user of stock layers would have it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
