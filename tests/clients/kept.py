"""What networks of other libraries keep between forward and backward, converted and enabled, against stock.

    PYTHONPATH=.:build/clients python -m tests.clients.kept [--client NAME ...]

Some 250 networks, frozen, while their input learns. They run without data, so that each takes seconds: bytes are
counted, and nothing is computed. `python -m tests.clients` measures fewer of them on data.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import freezekit as fk
from bench.packages import missing
from freezekit._inputs import arguments
from freezekit.explanation.trace import trace


@dataclass(frozen=True)
class Network:
    """A network of a client, and how it is called; `make` gives it with random weights."""

    client: str
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | Callable[[nn.Module], tuple[int, ...]] = (2, 3, 64, 64)
    call: Callable[[nn.Module, Tensor], Any] = lambda model, x: model(x)


def timm() -> Iterator[Network]:
    """Of each file of timm's, a small model by its name, at its own size."""
    import timm

    def smallness(name: str) -> tuple[int, int, str]:
        words = ("test", "atto", "pico", "nano", "tiny", "xxs", "xs", "small", "_s", "_0", "0")
        return next((i for i, word in enumerate(words) if word in name), len(words)), len(name), name

    for module in timm.list_modules():
        name = min(timm.list_models(module=module), key=smallness)
        shape = (2, *timm.get_pretrained_cfg(name).input_size)
        yield Network("timm", name, partial(timm.create_model, name), shape)


def torchvision() -> Iterator[Network]:
    from torchvision import models

    for module in (models, models.segmentation, models.video):
        for name in models.list_models(module=module):
            side = 299 if name == "inception_v3" else 256 if "swin_v2" in name or "swin3d" in name else 224
            shape = (2, 3, 16, side, side) if module is models.video else (2, 3, side, side)
            none = {"weights_backbone": None} if module is models.segmentation else {}
            none |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            yield Network("torchvision", name, partial(models.get_model, name, weights=None, **none), shape)


def segmentation_models_pytorch() -> Iterator[Network]:
    import segmentation_models_pytorch as smp

    for decoder in smp.MODEL_ARCHITECTURES_MAPPING:
        for encoder in ("tu-vit_tiny_patch16_224",) if decoder == "dpt" else ("resnet18", "efficientnet-b0"):
            make = partial(smp.create_model, decoder, encoder, encoder_weights=None)
            yield Network("segmentation_models_pytorch", f"{decoder}, {encoder}", make, (2, 3, 224, 224))


def lpips() -> Iterator[Network]:
    from lpips import LPIPS

    def compared(model: nn.Module, x: Tensor) -> Tensor:
        return model(x, x.detach().flip(-1))

    for net in ("alex", "vgg", "squeeze"):
        make = partial(LPIPS, net=net, pretrained=False, pnet_rand=True, verbose=False)
        yield Network("lpips", net, make, call=compared)


def torchmetrics() -> Iterator[Network]:
    from torchmetrics.functional.image import dists
    from torchvision.models import vgg16

    def make() -> nn.Module:
        dists.vgg16 = lambda weights: vgg16()  # the weights that it asks for are to be fetched
        return dists.DISTSNetwork(load_weights=False)

    yield Network("torchmetrics", "DISTS", make, call=lambda model, x: model(x, x.detach().flip(-1), require_grad=True))


def diffusers() -> Iterator[Network]:
    from diffusers import models

    def conditioned(width: int, model: nn.Module, x: Tensor) -> Any:
        return model(x, 10, x.new_zeros(len(x), 77, width), return_dict=False)

    yield Network(
        "diffusers", "UNet2DModel", models.UNet2DModel, (2, 3, 64, 64), lambda m, x: m(x, 10, return_dict=False)
    )
    make = partial(models.UNet2DConditionModel, cross_attention_dim=768)
    yield Network("diffusers", "UNet2DConditionModel", make, (2, 4, 64, 64), partial(conditioned, 768))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    make = partial(models.AutoencoderKL, block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks)
    yield Network(
        "diffusers", "AutoencoderKL.decode", make, (2, 4, 16, 16), lambda m, x: m.decode(x, return_dict=False)
    )
    yield Network("diffusers", "VQModel", models.VQModel, call=lambda m, x: m.encode(x, return_dict=False))
    yield Network(
        "diffusers",
        "AutoencoderTiny, decoder",
        lambda: models.AutoencoderTiny().decoder,
        (2, 4, 16, 16),
    )
    yield Network(
        "diffusers",
        "DiTTransformer2DModel",
        partial(models.DiTTransformer2DModel, num_layers=4),
        (2, 4, 32, 32),
        lambda m, x: m(
            x, x.new_zeros(len(x), dtype=torch.long), x.new_zeros(len(x), dtype=torch.long), return_dict=False
        ),
    )


VISION = """
    beit bit clip_vision_model convnext convnextv2 cvt data2vec-vision deit dinov2 efficientnet focalnet ijepa levit
    mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pvt pvt_v2 regnet resnet segformer siglip_vision_model
    swiftformer swin swinv2 vit vit_msn
"""
TEXT = """
    albert bert distilbert electra gpt2 gpt_neox llama mistral opt phi qwen2 roberta
"""


def transformers() -> Iterator[Network]:
    from transformers import CONFIG_MAPPING, AutoModel

    def size(model: Any) -> tuple[int, ...]:
        side = getattr(model.config, "image_size", 224)
        return (2, 3, side, side) if isinstance(side, int) else (2, 3, *side)

    for name in VISION.split():
        make = lambda name=name: AutoModel.from_config(CONFIG_MAPPING[name]())  # noqa: E731
        yield Network("transformers", name, make, size)
    for name in TEXT.split():
        make = lambda name=name: AutoModel.from_config(CONFIG_MAPPING[name]())  # noqa: E731
        width = lambda model: (2, 64, getattr(model.config, "embedding_size", None) or model.config.hidden_size)  # noqa: E731
        yield Network("transformers", name, make, width, lambda model, x: model(inputs_embeds=x))


def monai() -> Iterator[Network]:
    from monai.networks import nets

    image, volume = (2, 1, 64, 64), (2, 1, 64, 64, 64)
    flat, deep = ({"spatial_dims": n, "in_channels": 1, "out_channels": 2} for n in (2, 3))
    steps = {"channels": (16, 32, 64), "strides": (2, 2)}
    kernels = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    unet = {"channels": (32, 64), "attention_levels": (False, True), "num_res_blocks": 1, "num_head_channels": 32}
    for name, settings, shape in (
        ("UNet", {**deep, **steps}, volume),
        ("UNet", {**flat, **steps, "act": "PRELU", "norm": "BATCH"}, image),
        ("DynUNet", {**deep, **kernels}, volume),
        ("SegResNet", deep, volume),
        ("SegResNet", flat, image),
        ("SegResNetVAE", {"input_image_size": (64, 64), **flat}, image),
        ("VNet", {**deep, "dropout_dim": 3}, volume),
        ("AttentionUnet", {**deep, **steps}, volume),
        ("BasicUNet", deep, volume),
        ("BasicUNetPlusPlus", flat, image),
        ("DenseNet121", flat, image),
        ("EfficientNetBN", {"model_name": "efficientnet-b0", "pretrained": False, "in_channels": 1}, image),
        ("FlexibleUNet", {"in_channels": 1, "out_channels": 2, "backbone": "efficientnet-b0"}, image),
        ("HighResNet", deep, volume),
        ("MedNeXt", {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "init_filters": 16}, volume),
        ("AutoEncoder", {**flat, **steps, "strides": (2, 2, 2)}, image),
        ("AutoencoderKL", {**flat, "channels": (32, 64), "attention_levels": (False, True), "latent_channels": 3,
                           "num_res_blocks": (1, 1)}, image),
    ):  # fmt: skip
        yield Network("monai", f"{name}, {len(shape) - 2}d", partial(getattr(nets, name), **settings), shape)
    make = partial(nets.DiffusionModelUNet, **flat, **unet)
    yield Network("monai", "DiffusionModelUNet, 2d", make, image, lambda m, x: m(x, x.new_zeros(len(x))))


CLIENTS = (lpips, torchmetrics, diffusers, monai, segmentation_models_pytorch, transformers, torchvision, timm)


@dataclass(frozen=True)
class Counted:
    """Bytes that a network keeps; of those while enabled, what each kind of call keeps first."""

    stock: int
    converted: int
    enabled: int
    kinds: Counter[str]


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """Without data where that is possible, which takes a fraction of the time."""
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):  # it computes something of its own values
        return make()


def count(network: Network) -> Counted:
    """Raises whatever the network does, where it cannot run without data."""
    model = made(network.make).eval().requires_grad_(False)
    shape = network.shape(model) if callable(network.shape) else network.shape
    x = torch.empty(shape, device="meta", requires_grad=True)

    def bytes_of(model: nn.Module) -> tuple[int, Counter[str]]:
        traced = trace(lambda x: network.call(model, x), arguments(x), measure=False)
        kinds: Counter[str] = Counter()
        for kept in traced.kept:
            call = traced.calls[kept.holders[0]]
            kinds[call.function or call.layer] += kept.nbytes
        return traced.bytes_kept, kinds

    stock, _ = bytes_of(model)
    with fk.enabled():
        enabled, kinds = bytes_of(model)
    converted, _ = bytes_of(fk.convert(copy.deepcopy(model)))
    return Counted(stock, converted, enabled, kinds)


def summary(name: str, counted: list[Counted]) -> str:
    """A line: how many networks, and the mean and median of their ratios to stock."""
    ratios = [[getattr(one, side) / one.stock for one in counted] for side in ("converted", "enabled")]
    cells = [f"{function(side):.3f}" for side in ratios for function in (statistics.mean, statistics.median)]
    return f"| {name} | {len(counted)} | {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What clients' networks keep, against stock.")
    names = [client.__name__ for client in CLIENTS]
    parser.add_argument("--client", action="append", choices=names, help="these alone")
    chosen = parser.parse_args(argv).client or names
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, list[Counted]] = {}
    for client in CLIENTS:
        if client.__name__ not in chosen:
            continue
        if why := missing(client.__name__):
            print(why, file=sys.stderr)
            return 1
        for network in client():
            try:
                one = count(network)
            except Exception as error:  # a client's own, or data that it asks for
                print(f"{network.client}: {network.name}: {type(error).__name__}: {error}"[:160], file=sys.stderr)
                continue
            found.setdefault(network.client, []).append(one)
            most = ", ".join(f"{kind} {n / one.stock:.2f}" for kind, n in one.kinds.most_common(3) if n)
            ratios = f"{one.converted / one.stock:.3f} | {one.enabled / one.stock:.3f}"
            print(f"| {network.client}: {network.name} | {one.stock / 2**20:.1f} MiB | {ratios} | {most} |", flush=True)
    everything = [one for counted in found.values() for one in counted]
    print("\n| client | networks | converted: mean | median | enabled: mean | median |\n|" + " --- |" * 6)
    for name, counted in {**found, "all": everything}.items():
        print(summary(name, counted))
    kinds: Counter[str] = Counter()
    for one in everything:
        for kind, nbytes in one.kinds.items():
            kinds[kind] += nbytes / one.stock / len(everything)
    print("\nWhat is kept while enabled, as shares of stock's bytes:")
    print(*(f"{kind} {share:.3f}" for kind, share in kinds.most_common(24)), sep=", ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
