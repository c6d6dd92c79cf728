"""The clients' networks: small, with random weights, frozen as users of each client freeze them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.regimes import NORMS

IMAGE = (2, 3, 64, 64)  # batch 2: torch 2.13's own batch norm backward is wrong at batch 1 with some strides


@dataclass(frozen=True)
class Case:
    """A network of a client, and a call of it as its users make it.

    Attributes:
        client: the package.
        name: for the table.
        make: stock's network; what learns in it has requires_grad=True.
        learns: "input", or in words what `make` leaves trainable.
        shape: of the input.
        call: gives tensors in any nesting; those that have a gradient are learnt from.
    """

    client: str
    name: str
    make: Callable[[], nn.Module]
    learns: str = "input"
    shape: tuple[int, ...] = IMAGE
    call: Callable[[nn.Module, Tensor], Any] = lambda model, x: model(x)

    def __str__(self) -> str:
        return f"{self.client}: {self.name}" + ("" if self.input_learns else f", {self.learns} learn")

    @property
    def input_learns(self) -> bool:
        return self.learns == "input"

    def build(self) -> nn.Module:
        """The network, and always the same; norms have statistics and parameters other than those of fresh layers."""
        torch.manual_seed(0)
        model = self.make()
        for module in model.modules():
            for name, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -0.2, 0.2),
                ("running_mean", -0.2, 0.2),
                ("running_var", 0.5, 1.5),
            ):
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor) and (isinstance(module, NORMS) or hasattr(module, "running_var")):
                    with torch.no_grad():
                        tensor.uniform_(low, high)
        return model


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


class Pair(nn.Module):
    """Two networks that are called together."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


# timm


def timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm import create_model

        return frozen(create_model(name, num_classes=10))

    return make


def timm_with_frozen_stages() -> nn.Module:
    """By timm's own function, which swaps frozen batch norms in; the first stage learns, below what is frozen."""
    from timm import create_model
    from timm.utils import freeze

    model = create_model("resnet18", num_classes=10)
    freeze(model, ["layer2", "layer3", "layer4"])
    model.fc.requires_grad_(False)
    return model.eval()


# torchvision


def detector(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision.models import detection

        make = getattr(detection, name)
        return make(weights=None, weights_backbone=None, num_classes=5, **settings).train().requires_grad_(False)

    return make


def losses(model: nn.Module, x: Tensor) -> Any:
    box = x.new_tensor([[4.0, 6.0, 40.0, 50.0]]) * (x.shape[-1] / 64)
    return model(list(x), [{"boxes": box, "labels": torch.tensor([1])} for _ in x])


def segmentation(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision.models import segmentation

        return frozen(getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5))

    return make


# lpips


def lpips(net: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from lpips import LPIPS

        return frozen(LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False))

    return make


def compared(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, x.detach().flip(3))


# segmentation-models-pytorch


def smp(name: str, encoder: str, freeze: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import segmentation_models_pytorch

        model = segmentation_models_pytorch.create_model(name, encoder, encoder_weights=None, classes=5)
        if not freeze:
            return frozen(model)
        model.encoder.requires_grad_(False)
        return model

    return make


# peft


class Classifier(nn.Module):
    """Convolutions with batch norm and ReLU, named as in many networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)
        self.conv4, self.bn4 = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        x = self.relu(self.bn4(self.conv4(self.relu(self.bn3(self.conv3(x))))))
        return self.head(x.mean((2, 3)))


def adapted(*targets: str, adapter: str = "LoraConfig", **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import peft

        config = getattr(peft, adapter)(target_modules=list(targets), **options)
        model = peft.get_peft_model(Classifier(), config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:  # adapters begin with zeros, and zeros hide mistakes
                nn.init.normal_(parameter, std=0.1)
        return model

    return make


# diffusers


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return frozen(
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    )


def prompt(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 2 * 5 * 16, dtype=x.dtype, device=x.device).view(2, 5, 16)


def denoise(model: nn.Module, x: Tensor) -> Any:
    return model(x, 10, prompt(x), return_dict=False)


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return frozen(AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=8, **blocks))


def tiny_decoder() -> nn.Module:
    """Previews of latents; the whole of it rounds them to bytes, and has no gradient."""
    from diffusers import AutoencoderTiny

    widths = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    return frozen(AutoencoderTiny(**widths, num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1)).decoder)


def control() -> nn.Module:
    from diffusers import ControlNetModel

    base = unet()
    model = ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(8, 16)).requires_grad_(True)
    for module in (*model.controlnet_down_blocks, model.controlnet_mid_block, model.controlnet_cond_embedding.conv_out):
        nn.init.normal_(module.weight, std=0.1)  # zeros in a fresh one, and zeros hide mistakes
    return Pair(base, model.eval())


def controlled(model: nn.Module, x: Tensor) -> Any:
    condition = torch.nn.functional.interpolate(x[:, :3], scale_factor=2)
    down, middle = model.second(x, 10, prompt(x), condition, return_dict=False)
    return model.first(
        x, 10, prompt(x), down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False
    )


# captum, torchattacks


def classifier() -> nn.Module:
    return frozen(Classifier())


def attributed(model: nn.Module, x: Tensor) -> Tensor:
    from captum._utils.common import _run_forward

    return _run_forward(model, x, target=3)


def attacked(model: nn.Module, x: Tensor) -> Tensor:
    from torchattacks import PGD

    attack = PGD(model)
    attack.set_normalization_used([0.5, 0.4, 0.5], [0.2, 0.3, 0.2])
    return attack.get_logits(x)


# Lightning, fastai


def finetuned_by_lightning() -> nn.Module:
    """All of the backbone but its norms is frozen until an epoch of BackboneFinetuning's comes."""
    from lightning.pytorch.callbacks import BackboneFinetuning

    model = Classifier()
    BackboneFinetuning.freeze([child for name, child in model.named_children() if name != "head"])
    return model


def finetuned_by_fastai() -> nn.Module:
    """What `Learner.freeze` leaves: all of the body but its norms is frozen."""
    from fastai.vision.all import create_vision_model, xresnet18

    model = create_vision_model(xresnet18, 10, pretrained=False)
    model[0].requires_grad_(False)
    for module in model[0].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(True)
    return model


def fastai_unet() -> nn.Module:
    from fastai.vision.all import create_unet_model
    from torchvision.models import resnet18

    return frozen(create_unet_model(resnet18, 5, (64, 64), pretrained=False))


def segmented(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    for hook in model.sfs:  # they hold the encoder's last activations, whoever computed them
        hook.stored = None
    return y


# monai


def monai(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from monai.networks import nets

        return frozen(getattr(nets, name)(**settings))

    return make


# ultralytics


def yolo(config: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from ultralytics.nn.tasks import DetectionModel

        return DetectionModel(config, nc=5, verbose=False).train().requires_grad_(False).apply(_norms_in_eval)

    return make


def _norms_in_eval(module: nn.Module) -> None:
    if isinstance(module, NORMS):
        module.eval()


SMALL = {"min_size": 48, "max_size": 48}

CASES = [
    *(Case("timm", name, timm(name)) for name in ("resnet18", "densenet121", "tf_efficientnet_b0", "convnext_atto")),
    Case("timm", "resnet18, `utils.freeze`", timm_with_frozen_stages, "layer1, below the frozen stages"),
    *(
        Case("torchvision", name, detector(name, **settings), call=losses)
        for name, settings in (
            ("fasterrcnn_mobilenet_v3_large_fpn", {**SMALL, "box_batch_size_per_image": 16}),
            ("retinanet_resnet50_fpn", SMALL),
            ("ssdlite320_mobilenet_v3_large", {}),
        )
    ),
    Case("torchvision", "deeplabv3_resnet50", segmentation("deeplabv3_resnet50")),
    Case("torchvision", "lraspp_mobilenet_v3_large", segmentation("lraspp_mobilenet_v3_large")),
    *(Case("lpips", net, lpips(net), call=compared) for net in ("alex", "vgg", "squeeze")),
    Case("segmentation_models_pytorch", "Unet, resnet18", smp("unet", "resnet18")),
    Case("segmentation_models_pytorch", "FPN, mobilenet_v2", smp("fpn", "mobilenet_v2")),
    Case("segmentation_models_pytorch", "Unet, resnet18", smp("unet", "resnet18", freeze=True), "decoder and head"),
    Case("peft", "LoRA", adapted("conv1", "conv2", "conv3", "conv4", r=4), "adapters of all convolutions"),
    Case("peft", "LoRA, one layer", adapted("conv1", r=4), "adapter of the first convolution"),
    Case("peft", "DoRA", adapted("conv2", "conv3", r=4, use_dora=True), "adapters"),
    Case("peft", "LoHa", adapted("conv2", "conv3", adapter="LoHaConfig", r=4), "adapters"),
    Case("diffusers", "UNet2DConditionModel", unet, shape=(2, 4, 16, 16), call=denoise),
    Case("diffusers", "AutoencoderKL", autoencoder, call=lambda model, x: model(x, return_dict=False)),
    Case("diffusers", "AutoencoderTiny, decoder", tiny_decoder, shape=(2, 4, 16, 16)),
    Case("diffusers", "ControlNetModel", control, "the ControlNet beside a frozen UNet", (2, 4, 16, 16), controlled),
    Case("captum", "what attributions differentiate", classifier, call=attributed),
    Case("torchattacks", "PGD's logits", classifier, call=attacked),
    Case("lightning", "BackboneFinetuning", finetuned_by_lightning, "norms and head"),
    Case("fastai", "xresnet18 after freeze()", finetuned_by_fastai, "norms and head"),
    Case("fastai", "DynamicUnet", fastai_unet, call=segmented),
    Case(
        "monai",
        "UNet",
        monai("UNet", spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2)),
        shape=(2, 1, 16, 16, 16),
    ),
    Case(
        "monai",
        "DynUNet",
        monai(
            "DynUNet",
            spatial_dims=2,
            in_channels=3,
            out_channels=2,
            kernel_size=[3, 3, 3],
            strides=[1, 2, 2],
            upsample_kernel_size=[2, 2],
            filters=[8, 16, 32],
        ),
    ),
    Case(
        "monai",
        "SegResNet",
        monai("SegResNet", spatial_dims=3, init_filters=8, in_channels=1, out_channels=2),
        shape=(2, 1, 16, 16, 16),
    ),
    Case("monai", "DenseNet121", monai("DenseNet121", spatial_dims=2, in_channels=3, out_channels=2)),
    *(Case("ultralytics", name, yolo(f"{name}.yaml")) for name in ("yolov8n", "yolo11n")),
]
