"""torchvision's and timm's own models, where they import: converted and frozen, outputs and gradients are stock's.

    pytest tests/models/test_libraries.py -s

prints what each keeps. Small images in float64, so that whatever differs by more than rounding is a fault.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import nn

import freezekit as fk
from tests.models.regimes import REGIMES, all_learn
from tests.models.test_regimes import settle, step
from tests.observe import bytes_kept

ALL = {**REGIMES, "all-learn": all_learn}
TORCHVISION = (
    "alexnet",
    "vgg11_bn",
    "resnet50",
    "resnet101",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
    "densenet121",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "mnasnet0_5",
    "regnet_y_400mf",
)
TIMM = (
    "resnet18",
    "resnet26d",
    "resnetv2_50",
    "seresnet50",
    "regnetx_002",
    "regnety_002",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "convnext_atto",
    "densenet121",
    "cspresnet50",
    "ghostnet_100",
    "repvgg_a0",
    "dla34",
    "hrnet_w18_small",
    "nf_regnet_b0",
)
MODELS = [*(("torchvision", name) for name in TORCHVISION), *(("timm", name) for name in TIMM)]
each = pytest.mark.parametrize(("package", "name"), MODELS, ids=[f"{package}-{name}" for package, name in MODELS])


def build(package: str, name: str) -> nn.Module:
    """The model with weights drawn from a fixed seed; skips where its package is not there."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    if package == "timm":
        return importlib.import_module("timm").create_model(name, num_classes=10)
    make: Callable[..., nn.Module] = getattr(importlib.import_module("torchvision.models"), name)
    return make(weights=None, num_classes=10)


@pytest.mark.parametrize("regime", ALL)
@each
def test_outputs_and_gradients_are_torch_s(package: str, name: str, regime: str) -> None:
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        stock = ALL[regime](settle(build(package, name).double()), x).double().train(training)
        ours = fk.convert(copy.deepcopy(stock))
        expected, actual = step(stock, x), step(ours, x)
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            # A bias before a batch norm has a gradient of zero: what is left there is rounding, as large as its terms'.
            scale = max(value.abs().max().item(), 1e-3 * max(v.abs().max().item() for v in expected.values()))
            error = (actual[key] - value).abs().max().item()
            assert error <= 1e-9 * scale, f"{key}, training={training}: {error} of {scale}"
        for (key, a), b in zip(stock.named_buffers(), ours.buffers(), strict=True):
            torch.testing.assert_close(b, a, msg=key)


@each
def test_a_frozen_model_keeps_less(package: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(2, 3, 64, 64)
    stock = ALL["all-frozen"](build(package, name), x).eval()
    before = bytes_kept(stock, x)
    ours = fk.convert(stock)
    after = bytes_kept(ours, x)
    with capsys.disabled():
        print(f"\n{package} {name}: {before / 2**20:.2f} MiB -> {after / 2**20:.3f} MiB, {after / before:.4f}", end=" ")
    assert after < before


@pytest.mark.parametrize(
    ("name", "share"), [("densenet121", 0.03), ("tf_efficientnet_b0", 0.40), ("resnetv2_50x1_bit", 0.94)]
)
def test_what_timm_s_models_keep_while_enabled(name: str, share: float) -> None:
    """Two have classes of their own. The last makes its weights anew at each call, and dgrad reads what it made."""
    x = torch.randn(2, 3, 64, 64)
    model = build("timm", name).eval().requires_grad_(False)
    stock = bytes_kept(model, x)
    with fk.enabled():
        assert bytes_kept(model, x) <= share * stock


@each
def test_reverting_gives_torch_s_results_back(package: str, name: str) -> None:
    model = build(package, name).eval()
    classes, x = [type(m) for m in model.modules()], torch.randn(1, 3, 64, 64)
    before = model(x)
    fk.conversion.revert(fk.convert(model))
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), before)
