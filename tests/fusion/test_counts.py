"""How many convolutions of well-known networks are fused: never fewer than were by the tracing that came before."""

from __future__ import annotations

import pytest
from torch import nn

import freezekit as fk

TORCHVISION = {
    "alexnet": 5,
    "convnext_tiny": 22,
    "densenet121": 120,
    "efficientnet_b0": 81,
    "fcn_resnet50": 54,
    "deeplabv3_mobilenet_v3_large": 70,
    "googlenet": 59,
    "inception_v3": 96,
    "mnasnet1_0": 52,
    "mobilenet_v2": 52,
    "mobilenet_v3_small": 52,
    "resnet18": 20,
    "resnet50": 53,
    "resnext50_32x4d": 53,
    "shufflenet_v2_x1_0": 56,
    "squeezenet1_1": 26,
    "vgg11_bn": 8,
}
TIMM = {"ecaresnet26t": 31, "mobilenetv3_small_100": 53, "resnet18": 20, "resnet26d": 31, "seresnet33ts": 58}


@pytest.mark.parametrize("name", TORCHVISION)
def test_convolutions_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    more = {"weights_backbone": None} if name.startswith(("fcn", "deeplab")) else {}
    assert fused_in(models.get_model(name, weights=None, **more)) >= TORCHVISION[name]


@pytest.mark.parametrize("name", TIMM)
def test_convolutions_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    assert fused_in(timm.create_model(name)) >= TIMM[name]


def fused_in(model: nn.Module) -> int:
    """Convolutions that are the start of a fused block."""
    report = fk.fusion.fusion_report(fk.fuse(model.eval().requires_grad_(False)))
    assert all(block.fused or block.reason for block in report)
    return sum(block.fused for block in report)
