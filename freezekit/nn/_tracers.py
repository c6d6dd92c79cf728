"""What torch's older tracers get of freezekit's layers: torch.fx a call of the layer, TorchScript a clear error."""

from typing import Any, NoReturn

from torch import fx, nn

from freezekit.functional._torch import tell_quantizer


def as_leaf(module: nn.Module, *arguments: Any) -> fx.Proxy | None:
    """The layer's call in the graph that torch.fx is tracing; None where the layer itself is what is traced.

    torch.fx makes leaves of torch.nn's layers alone. A layer whose mode or sizes decide what it does has to be one too:
    traced into, it would keep for ever the mode that it was traced in.
    """
    if not isinstance(module, nn.Dropout):  # which takes quantized tensors as they are
        tell_quantizer(arguments[0])
    tracer: Any = arguments[0].tracer
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, arguments, {}) if path else None


def refuse_script(module: nn.Module) -> NoReturn:
    """What torch.jit.script asks a module for first; its language has no way to choose a backend at run time."""
    raise RuntimeError(
        f"torch.jit.script cannot compile a {type(module).__name__}: use torch.jit.trace, torch.export or "
        "torch.compile, or script the model as it was before freezekit.convert (freezekit.revert undoes that)"
    )
