"""What converting, freezing or fusing a layer would take away."""

from __future__ import annotations

from torch import nn

from freezekit import conversion
from freezekit.explanation.fused import block_layers
from freezekit.explanation.record import Call
from freezekit.explanation.units import bytes_text, flops_text
from freezekit.fusion.classes import original_class, plan_of
from freezekit.fusion.layers import why_unfused
from freezekit.fusion.plan import make_plan

OURS = frozenset(conversion.SWAPS.values())
# Functions that keep less by the same name in freezekit.functional, whatever learns.
FUNCTIONS = ("relu", "relu6", "leaky_relu", "hardtanh", "dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")


class Advisor:
    """Knows which blocks of a model could be fused as it stands."""

    def __init__(self, model: nn.Module) -> None:
        self._fusible = _fusible(model)

    def advise(self, call: Call, weight_learns: bool, held: int, alone: int) -> str:
        """A sentence on one call; "" where nothing would change. What is shared is freed when the last holder lets go.

        Args:
            weight_learns: whether the layer has a weight that trains.
            held: bytes that it keeps, with others or alone.
            alone: bytes that nobody else keeps: what is certain to be freed.
        """
        if call.function:
            name = call.function.rstrip("_")
            return f"call fk.functional.{name}: {_saved(held, alone)}" if name in FUNCTIONS and held else ""
        kind = type(call.module)
        swap = conversion.SWAPS.get(kind) if call.module is not None else None  # type: ignore[arg-type]
        if weight_learns and call.output_needs_grad:
            # A norm that learns, converted or not, keeps its input.
            frees = kind in OURS or (swap is None and isinstance(call.module, nn.Linear))
            parts = [f"-{flops_text(call.flops)}"] if call.flops else []
            parts += [_saved(held, alone)] if held and frees else []
            text = f"freeze: {', '.join(parts)}" if parts else ""
            return f"convert and {text or 'freeze'}, {_saved(held, alone)}" if swap is not None and held else text
        if swap is not None and held:
            return f"convert to {swap.__name__}: {_saved(held, alone)}"
        return self._fusible.get(id(call.module), "")


def _saved(held: int, alone: int) -> str:
    return f"-{bytes_text(held)}" if alone == held else f"up to -{bytes_text(held)} (shared)"


def _fusible(model: nn.Module) -> dict[int, str]:
    """By convolution: what `fuse` would make of it and the layers behind it, in blocks that are frozen now."""
    found: dict[int, str] = {}
    for module in model.modules():
        if plan_of(module) is not None or "forward" in module.__dict__ or next(module.children(), None) is None:
            continue
        if not any(isinstance(child, nn.Conv2d) for child in module.children()):
            continue
        for names in make_plan(module, original_class(module)).blocks:
            layers = block_layers(module, names)
            rest = [part for part in (names.norm, "add" if names.adds else "", names.activation) if part]
            if rest and not why_unfused(*layers):
                found[id(layers[0])] = f"fuse with {', '.join(rest)}: one kernel each way instead of {len(rest) + 1}"
    return found
