"""What a trace writes down: the calls of a forward pass, and what autograd keeps of each."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Call:
    """One layer's computation, or one function's that a module with children calls in its own forward: see `Row`.

    Attributes:
        package: the Python module that its code is in.
        function: what its own forward, or that function, calls; "" for a layer, which is a module without children.
        moved: bytes of all tensors that the operators read and wrote.
        input_needs_grad, output_needs_grad: what autograd sees.
        channels_last: whether the first tensor in is.
        fallback: why torch's own code runs in place of a layer of freezekit's; "" where it does not.
        module: the copy of the module that ran; None where it is that function.
    """

    name: str
    layer: str
    package: str
    function: str
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    flops: int = 0
    moved: int = 0
    input_needs_grad: bool = False
    output_needs_grad: bool = False
    channels_last: bool = False
    fallback: str = ""
    module: nn.Module | None = field(default=None, repr=False)

    def learns(self, name: str) -> bool:
        """Whether the layer has a parameter of that name that trains."""
        parameter = None if self.function or self.module is None else getattr(self.module, name, None)
        return isinstance(parameter, Tensor) and parameter.requires_grad


@dataclass
class Kept:
    """One storage that autograd keeps for backward.

    nbytes: its bytes; holds: the calls that hold it, first one first, each as often as it does; chained: those whose
    operand is made again from it; lossy: whether it holds derivatives in few bits.
    """

    nbytes: int
    holds: list[int] = field(default_factory=list)
    chained: list[int] = field(default_factory=list)
    lossy: bool = False

    @property
    def holders(self) -> list[int]:
        """The calls that hold it, each once."""
        return list(dict.fromkeys(self.holds))


@dataclass
class Trace:
    """All calls of a forward pass in order, and all that is kept; parameters and buffers are not counted.

    modules: the copies that ran, by their names in the model.
    measured: whether they ran on data.
    has_device: whether the model is on a device, and not on meta alone.
    """

    calls: list[Call]
    kept: list[Kept]
    modules: dict[str, nn.Module]
    measured: bool
    has_device: bool

    @property
    def bytes_kept(self) -> int:
        return sum(kept.nbytes for kept in self.kept)
