"""Whole networks, converted and frozen in five ways: outputs and gradients are torch's, and less is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import freezekit as fk
from freezekit.conversion import SWAPS
from tests.models.regimes import REGIMES, all_learn
from tests.models.zoo import ZOO
from tests.observe import bytes_kept

ALL = {**REGIMES, "all-learn": all_learn}


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and gradients by name, of one backward pass; dropout draws from a fixed seed."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_(x.requires_grad)
    y = model(x)
    if y.requires_grad:
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.device)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **found, **({"input": x.grad} if x.grad is not None else {})}


def settle(model: nn.Module) -> nn.Module:
    """Running statistics and affine parameters that are not those of a fresh layer."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("regime", ALL)
@pytest.mark.parametrize("name", ZOO)
def test_outputs_and_gradients_are_torch_s(name: str, regime: str, training: bool, device: str) -> None:
    # In float64: a bias before batch norm has a gradient of zero, and in float32 what is left there is all rounding.
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64).to(device)
    stock = ALL[regime](settle(ZOO[name]().double()).to(device), x).to(device).double().train(training)
    for dropout in (m for m in stock.modules() if isinstance(m, nn.Dropout) and device == "cuda"):
        dropout.p = 0.0  # there torch's own kernel and freezekit's bits draw in another order
    ours = fk.convert(copy.deepcopy(stock))
    expected, actual = step(stock, x), step(ours, x)
    assert expected.keys() == actual.keys()
    assert len(expected) > 1 or (name, regime) == ("alexnet", "norms-learn")  # which has no norm
    scale = max(1.0, *(value.abs().max().item() for value in expected.values()))
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-8, atol=1e-10 * scale, msg=lambda m, k=key: f"{k}: {m}")
    for (key, a), b in zip(stock.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=key)


@pytest.mark.parametrize("regime", ALL)
@pytest.mark.parametrize("name", ZOO)
def test_never_more_is_kept_than_torch_keeps(name: str, regime: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    stock = ALL[regime](ZOO[name](), x)
    stock.eval()
    bits = sum(m.numel() // 8 for m in activations(stock, x)) if regime in ("all-learn", "norms-learn") else 0
    kept = bytes_kept(stock, x)
    assert bytes_kept(fk.convert(stock), x) <= kept + bits
    if regime == "all-frozen":
        assert bytes_kept(stock, x) < kept


def activations(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of the layers that keep bits: where another layer keeps the activation as well, the bits come on top."""
    seen: list[Tensor] = []
    kinds = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU)
    handles = [m.register_forward_hook(lambda m, a, y: seen.append(y)) for m in model.modules() if isinstance(m, kinds)]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ZOO)
def test_reverting_gives_torch_s_classes_and_results_back(name: str) -> None:
    model = ZOO[name]().eval()
    classes = [type(m) for m in model.modules()]
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    fk.convert(model)
    assert any(type(m) in SWAPS.values() for m in model.modules())
    fk.conversion.revert(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), before)
