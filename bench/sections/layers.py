"""Single convolutions of well-known networks, trainable and frozen."""

from dataclasses import replace
from functools import partial

import torch

from bench import verify
from bench.layer_lists import LayerShape, layers_of
from bench.measure import Case, MakeCase
from bench.settings import Settings
from bench.work import Work

SECTION = "layers"
PARTS = ("step", "fprop", "dgrad", "wgrad", "backward")
REGIMES = ("trainable", "frozen")

# The regimes that each part is timed in. dgrad and wgrad are backward passes that are asked for one gradient only.
_REGIMES_OF_PART = {"step": REGIMES, "fprop": REGIMES, "backward": ("trainable",), "dgrad": ("frozen",)}


def cases(settings: Settings) -> list[MakeCase]:
    """Every layer of the lists asked for, in every part and regime."""
    return [
        partial(layer_case, network, layer, part, regime, settings)
        for network in settings.layer_lists
        for layer in layers_of(network)
        for part in settings.parts
        for regime in _REGIMES_OF_PART.get(part, ("input without gradient",))
    ]


def batch_of(settings: Settings) -> int:
    """Images per batch: as asked for, or what suits the device."""
    if settings.batch is not None:
        return settings.batch
    return 32 if settings.device.type == "cuda" else 2


def layer_case(network: str, layer: LayerShape, part: str, regime: str, settings: Settings) -> Case:
    """One layer in one regime: "trainable", "frozen", "bias only", or "input without gradient" (and trainable).

    "bias only" gives the layer a bias if it has none.
    """
    torch.manual_seed(settings.seed)
    if regime == "bias only":
        layer = replace(layer, bias=True)
    batch = batch_of(settings)
    module = layer.module(settings.device, settings.dtype)
    module.weight.requires_grad_(regime not in ("frozen", "bias only"))
    if module.bias is not None:
        module.bias.requires_grad_(regime != "frozen")
    x = torch.randn(
        batch, layer.in_channels, layer.size, layer.size, device=settings.device, dtype=settings.dtype
    ).requires_grad_(regime != "input without gradient")
    return Case(
        SECTION,
        network,
        layer.name,
        layer.shape,
        regime,
        module,
        x,
        partial(tolerance, layer, batch, settings),
        part,
        layer.count,
        work(layer, batch, part, regime, settings.dtype.itemsize),
    )


def tolerance(layer: LayerShape, batch: int, settings: Settings, name: str) -> float:
    """The largest error allowed of a layer's output or gradient, by the number of products in each element."""
    window = layer.kernel**2
    lengths = {
        "y": layer.in_channels // layer.groups * window,
        "dx": layer.out_channels // layer.groups * window,
        "weight": batch * layer.output_size**2,
        "bias": batch * layer.output_size**2,
    }
    return verify.tolerance(settings.dtype, lengths[name], settings.tf32)


def work(layer: LayerShape, batch: int, part: str, regime: str, itemsize: int) -> Work:
    """fprop, dgrad and wgrad each cost two operations per multiply-add, read two tensors and write a third."""
    phases = {
        "step": 3 if regime == "trainable" else 2,
        "fprop": 1,
        "dgrad": 1,
        "wgrad": 1,
        "backward": 1 if regime == "bias only" else 2,
    }[part]
    x = batch * layer.in_channels * layer.size**2
    y = batch * layer.out_channels * layer.output_size**2
    return Work(phases * 2.0 * batch * layer.macs, phases * float(itemsize) * (x + y + layer.weights))
