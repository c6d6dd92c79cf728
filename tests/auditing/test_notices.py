"""What `audit` tells of a model that runs without an error and does not do what was meant."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from freezekit.auditing import audit, hooks
from freezekit.freezing import freeze, unfreeze
from tests.auditing.helpers import found, images, net, the


def test_a_norm_that_is_held_while_its_parameters_train_by_hand() -> None:
    model = net()
    freeze(model, norm="freeze")
    assert not found(audit(model), "held-statistics")
    model.requires_grad_(True)
    model.train()
    assert the(audit(model), "held-statistics").names == ("1",)
    unfreeze(model)
    assert model[1].training
    assert not found(audit(model), "held-statistics")
    freeze(model, norm="freeze")
    unfreeze(model, norm="freeze")  # said so: its parameters train by statistics that hold still
    assert not found(audit(model), "held-statistics")


def test_a_norm_that_is_held_while_one_of_its_parameters_trains() -> None:
    model = net()
    freeze(model, norm="freeze")
    model[1].bias.requires_grad_(True)
    assert the(audit(model), "held-statistics").names == ("1",)
    model[1].bias.requires_grad_(False)
    unfreeze(model, "*.bias")  # said so
    assert model[1].bias.requires_grad
    assert not model[1].training
    assert not found(audit(model), "held-statistics")


@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy])
def test_statistics_that_freeze_was_asked_to_let_move_are_a_note(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), spectral, nn.Linear(2, 1))
    freeze(model, "1", "2", norm="batch")
    notes = found(audit(duplicate(model), inputs=torch.randn(4, 3)), "moving-statistics")
    assert [(f.severity, f.names) for f in notes] == [("info", ("1",)), ("info", ("2.parametrizations.weight.0",))]
    with freeze(model, "1", norm="freeze"):
        assert [f.names for f in found(audit(model), "moving-statistics")] == [("2.parametrizations.weight.0",)]
    assert [f.severity for f in found(audit(model), "moving-statistics")] == ["info", "info"]
    unfreeze(model, "1", "2")
    model.requires_grad_(False)  # by hand: nobody asked
    assert [f.severity for f in found(audit(model), "moving-statistics")] == ["error", "error"]
    with freeze(model, "1", norm="batch"):
        assert [f.severity for f in found(audit(model), "moving-statistics")] == ["error", "info"]
    assert [f.severity for f in found(audit(model), "moving-statistics")] == ["error", "error"]


def test_dropout_that_stays_active_in_a_frozen_part() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Dropout(0.0)), nn.Linear(3, 1))
    assert not found(audit(model), "active-dropout")
    freeze(model, "0")
    assert the(audit(model), "active-dropout").names == ("0.1",)
    model[0].eval()
    assert not found(audit(model), "active-dropout")


class DropPath(nn.Module):
    """As timm's."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob


class SegformerDropPath(DropPath):
    """Named as in transformers."""


class DropBlock2d(nn.Module):
    """As torchvision's, with its name for the probability."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.inplace = p, True


@pytest.mark.parametrize(
    ("active", "still"),
    [
        (nn.LSTM(3, 3, 2, dropout=0.5), nn.LSTM(3, 3, 2)),
        (nn.MultiheadAttention(4, 2, dropout=0.5), nn.MultiheadAttention(4, 2)),
        (DropPath(0.1), DropPath(0.0)),
        (SegformerDropPath(0.1), SegformerDropPath(0.0)),
        (DropBlock2d(0.1), DropBlock2d(0.0)),
        (nn.FeatureAlphaDropout(0.1), nn.Identity()),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_dropout_inside_a_layer(active: nn.Module, still: nn.Module) -> None:
    for layer, names in ((active, ("0.0",)), (still, None)):
        model = nn.Sequential(nn.Sequential(layer.train(), nn.Linear(3, 3)), nn.Linear(3, 1))
        freeze(model, "0")
        findings = found(audit(model), "active-dropout")
        assert [finding.names for finding in findings] == ([names] if names else [])


class Calling(nn.Module):
    """Drops by a function, as torchvision's DenseNet does."""

    def __init__(self, drop: Callable[[torch.Tensor, bool], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.linear(x), self.training)


@pytest.mark.parametrize(
    "drop",
    [
        lambda x, training: F.dropout(x, 0.5, training),
        lambda x, training: F.dropout(x, training=training, inplace=True),
        lambda x, training: F.alpha_dropout(x, 0.5, training),
        lambda x, training: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if training else 0.0),
        lambda x, training: F.scaled_dot_product_attention(x, x, x, None, 0.1 * training),
    ],
)
def test_dropout_by_a_function_in_a_frozen_part(drop: Callable[[torch.Tensor, bool], torch.Tensor]) -> None:
    model, x = nn.Sequential(Calling(drop), nn.Linear(4, 1)), torch.randn(2, 3, 4)
    assert not found(audit(model, inputs=x), "active-dropout")
    freeze(model, "0")
    assert the(audit(model, inputs=x), "active-dropout").names == ("0",)
    model[0].eval()
    assert not found(audit(model, inputs=x), "active-dropout")
    model.train()
    model[0].drop = lambda x, training: F.dropout(x, 0.0, training)
    assert not found(audit(model, inputs=x), "active-dropout")


def test_an_optimizer_left_with_nothing_to_step() -> None:
    model = net()
    body, head = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[4]))
    freeze(model, "0", "1", norm="freeze")
    assert the(audit(model, [body, head]), "nothing-to-step").names == ("0.weight", "0.bias")
    assert not found(audit(model, head), "nothing-to-step")
    freeze(model, "0", optimizer=body, remove=True)
    assert "SGD has no parameters left" in the(audit(model, [body, head]), "nothing-to-step").why


@pytest.mark.parametrize("once_accumulated", [False, True])
def test_part_of_a_tensor_is_not_frozen_by_a_hook_under_decay_or_momentum(once_accumulated: bool) -> None:
    for options, trap in (({}, False), ({"weight_decay": 0.1}, True), ({"momentum": 0.9}, True)):
        model = net().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
        model(images()).square().mean().backward()
        optimizer.step()
        mask = torch.ones_like(model[0].weight)
        mask[:2] = 0
        if once_accumulated:

            def hide(p: torch.Tensor, mask: torch.Tensor = mask) -> None:
                assert p.grad is not None
                p.grad.mul_(mask)

            model[0].weight.register_post_accumulate_grad_hook(hide)
            model(images()).square().mean().backward()
        else:
            model[0].weight.register_hook(mask.mul)
        assert [f.names for f in found(audit(model, optimizer), "masked-gradient")] == [("0.weight",)] * trap
        optimizer.zero_grad()
        before = model[0].weight.detach().clone()
        model(images()).square().mean().backward()
        optimizer.step()
        assert torch.equal(before[:2], model[0].weight[:2]) is not trap, "what audit said is so"


HALF = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1, 1)
VECTOR = HALF.flatten()
MASKS = {"0.weight": HALF}
SCALE, PAIR = torch.tensor(0.5), torch.tensor([0.0, 1.0])


class Mask:
    def __init__(self) -> None:
        self.mask = HALF

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.mask

    def method(self, gradient: torch.Tensor) -> torch.Tensor:
        return self(gradient) * self.mask


class MaskModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", HALF)

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.mask


def first_two_to_zero(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient[:2] = 0
    return gradient


def slice_to_zero(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient[:2].zero_()
    return gradient


def notes(model: nn.Module, seen: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], None]:
    def note(gradient: torch.Tensor) -> None:
        seen["norm"] = gradient.norm()

    return note


masking: dict[str, Callable[[torch.Tensor], Any]] = {
    "global": lambda gradient: gradient * HALF,
    "bool": lambda gradient, held=HALF == 0: gradient.masked_fill(held, 0),
    "dictionary": lambda gradient: gradient * MASKS["0.weight"],
    "vector": lambda gradient: gradient * VECTOR[:, None, None, None],
    "partial": partial(torch.mul, other=HALF),
    "builtin": HALF.mul,
    "object": Mask(),
    "method": Mask().method,
    "module": MaskModule(),
    "method of a module": MaskModule().forward,
    "part": first_two_to_zero,
    "slice": slice_to_zero,
    "filled": lambda gradient: gradient.index_fill(0, torch.arange(2), 0.0),
    "chosen": lambda gradient: torch.where(torch.arange(4).view(4, 1, 1, 1) < 2, 0.0, gradient),
}
masking |= {
    "einsum": lambda gradient: torch.einsum("k,kcrs->kcrs", (torch.arange(4) > 1).float(), gradient),
    "cat": lambda gradient: torch.cat([torch.zeros_like(gradient[:2]), gradient[2:]]),
    "index": lambda gradient: (
        gradient[torch.tensor([2, 3])].new_zeros(gradient.shape).index_add(0, torch.tensor([2, 3]), gradient[2:])
    ),
    "computed": lambda gradient: gradient * (torch.arange(4) > 1).view(4, 1, 1, 1),
    "one element": lambda gradient: gradient.scatter(0, torch.zeros(1, 1, 1, 1, dtype=torch.long), 0.0),
    "pad": lambda gradient: torch.nn.functional.pad(gradient[2:], (0, 0, 0, 0, 0, 0, 2, 0)),
    "numpy": lambda gradient: torch.from_numpy(np.where(np.arange(4).reshape(4, 1, 1, 1) < 2, 0, gradient.numpy())),
    "matmul": lambda gradient: (torch.diag(torch.tensor([0.0, 0, 1, 1])) @ gradient.flatten(1)).view_as(gradient),
    "whole": lambda gradient: gradient * 0,
    "compiled": torch.compile(lambda gradient: gradient * (torch.arange(4) > 1).view(4, 1, 1, 1), backend="eager"),
}
harmless: dict[str, Callable[[torch.Tensor], Any]] = {
    "threshold": lambda gradient: torch.where(gradient.abs() < 0.3, 0.0, gradient),
    "largest": lambda gradient: gradient * (gradient.abs() >= gradient.abs().flatten().topk(5).values[-1]),
    "smallest": lambda gradient: gradient * (gradient.abs() <= gradient.abs().median()),
    "positive": lambda gradient: gradient.relu(),
    "dropped": lambda gradient: torch.nn.functional.dropout(gradient, 0.5),
    "rounded": lambda gradient: gradient.round(),
    "held and not used": lambda gradient, mask=HALF: gradient + 0 * mask.sum(),
    "writes where it is not a number": lambda gradient: gradient.masked_fill_(gradient.isnan(), 0),
    "once": lambda gradient, calls=[]: gradient * 0 if not calls and not calls.append(1) else gradient,
    "clip": lambda gradient: gradient.clamp(-1, 1),
    "scale": lambda gradient: gradient * SCALE,
    "scale each filter": partial(torch.mul, other=torch.tensor([0.1, 0.2, 0.3, 1.0]).view(4, 1, 1, 1)),
    "log": lambda gradient, log=[]: log.append(gradient.norm()),
    "log by name": notes(net(), {}),
    "clean": lambda gradient: torch.where(gradient.isnan(), 0.0, gradient),
    "other shape": lambda gradient: gradient + PAIR.sum(),
}


@pytest.mark.parametrize("kind", [*masking, *harmless])
def test_a_hook_that_masks_is_told_from_one_that_clips_scales_or_logs(kind: str) -> None:
    model = net().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model[0].weight.register_hook({**masking, **harmless}[kind])
    model(images()).square().mean().backward()
    said = [f.names for f in found(audit(model, optimizer), "masked-gradient")]
    assert said == [("0.weight",)] * (kind in masking)


@pytest.mark.parametrize("width", [1, 2])
def test_chance_is_no_mask_in_a_tensor_of_few_elements(width: int) -> None:
    model = nn.Linear(3, width)
    model.bias.register_hook(torch.nn.functional.dropout)
    assert not found(audit(model, torch.optim.AdamW(model.parameters())), "masked-gradient")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("masks", [True, False])
def test_masks_of_any_dtype(dtype: torch.dtype, masks: bool) -> None:
    model = nn.Linear(3, 4, dtype=dtype)
    model.weight.register_hook(lambda gradient: gradient * (torch.arange(4) > 1 - 2 * (not masks))[:, None])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    assert len(found(audit(model, optimizer), "masked-gradient")) == masks


@pytest.mark.parametrize("dead", ["relu", "embedding", "padding"])
def test_natural_zeros_are_no_mask(dead: str) -> None:
    """A gradient that has zeros, on parameters whose hook only scales."""
    if dead == "relu":
        model: nn.Sequential = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        nn.init.constant_(model[0].bias, -100.0)
    elif dead == "embedding":
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 1))
    else:
        model = nn.Sequential(nn.Linear(4, 3))
    for p in model.parameters():
        p.register_hook(lambda gradient: gradient.mul_(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    x = torch.tensor([1]) if dead == "embedding" else torch.tensor([[1.0, 2, 3, 0][: model[0].in_features]])
    model(x).sum().backward()
    assert (model[0].weight.grad == 0).any()
    assert not found(audit(model, optimizer, x), "masked-gradient")


@pytest.mark.parametrize("place", ["own", "accumulated", "step"])
def test_hooks_that_are_called_leave_everything_as_it_was(place: str) -> None:
    model, seen, drawn = net().eval(), {"calls": 0, "norms": []}, random.Random(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(images()).square().mean().backward()
    grad, weight = model[0].weight.grad, model[0].weight
    assert grad is not None

    def hook(*_: object) -> None:
        seen["calls"] += 1
        seen["norms"].append(grad.norm())
        torch.rand(3), np.random.rand(3), random.random(), drawn.random()
        torch.set_default_dtype(torch.float64)
        optimizer.step()
        optimizer.zero_grad()
        weight.data.mul_(2)
        model[1].running_mean.add_(1)
        optimizer.param_groups[0]["lr"] = 5.0

    {
        "own": weight.register_hook,
        "accumulated": weight.register_post_accumulate_grad_hook,
        "step": optimizer.register_step_pre_hook,
    }[place](hook if place != "step" else lambda *_: hook() if not seen["calls"] else None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values, states = grad.clone(), (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    mine = drawn.getstate()
    audit(model, optimizer)
    assert seen == {"calls": 0, "norms": []}
    assert weight.grad is grad
    assert torch.equal(grad, values)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert drawn.getstate() == mine
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_hook_that_raises_is_named_and_leaves_gradients(error: type[BaseException]) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def fails(gradient: torch.Tensor) -> None:
        raise error("no")

    model[0].bias.register_hook(fails)
    model[0].weight.register_hook(HALF.mul)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            audit(model, optimizer)
    else:
        report = audit(model, optimizer)
        assert report.skipped["what hooks do to the gradient of 0.bias"] == "one raised ValueError: no"
        assert the(report, "masked-gradient").names == ("0.weight",)
    assert all(p.grad is None for p in model.parameters())


def test_hooks_that_take_themselves_away_stay() -> None:
    model = net()
    handles: list[Any] = []

    def once(gradient: torch.Tensor) -> torch.Tensor:
        handles.pop().remove()
        return gradient * 0

    handles.append(model[0].weight.register_hook(once))
    assert not found(audit(model, torch.optim.AdamW(model.parameters())), "masked-gradient")
    assert list(model[0].weight._backward_hooks.values()) == [once]
    assert len(handles) == 1


@pytest.mark.parametrize("mode", ["all", "any"])
def test_hooks_on_several_gradients_are_called_in_a_backward_pass(mode: Any) -> None:
    model, seen = net(), []
    torch.autograd.graph.register_multi_grad_hook(list(model.parameters()), seen.append, mode=mode)
    model[0].weight.register_hook(HALF.mul)
    report = audit(model, torch.optim.AdamW(model.parameters()))
    assert the(report, "masked-gradient").names == ("0.weight",)
    assert list(report.skipped) == ["moving tensors and lost gradients in a forward pass"]
    assert seen == []


@pytest.mark.parametrize("where", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_masks_are_seen_wherever_audit_is_called(where: Callable[[], Any]) -> None:
    model = net()
    model[0].weight.register_hook(HALF.mul)
    with where():
        assert the(audit(model, torch.optim.AdamW(model.parameters())), "masked-gradient").names == ("0.weight",)


def test_an_optimizer_in_the_backward_pass_is_not_stepped() -> None:
    model = net()
    optimizers = {p: torch.optim.AdamW([p]) for p in model.parameters()}

    def step(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = copy.deepcopy(model.state_dict())
    assert not found(audit(model, list(optimizers.values())), "masked-gradient")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(optimizer.state for optimizer in optimizers.values())


def test_an_optimizer_that_draws_leaves_random_numbers() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(torch.randn_like(p))

    model = nn.Linear(2, 2).requires_grad_(False)
    optimizer = Noisy(model.parameters(), lr=0.1)
    state = torch.get_rng_state()
    assert the(audit(model, optimizer), "would-move")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("place", ["accumulated", "step"])
def test_a_mask_in_a_hook_on_the_accumulated_gradient_or_before_the_step(place: str) -> None:
    model = net().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    weight = model[0].weight

    def hide(*_: object) -> None:
        assert weight.grad is not None
        weight.grad.mul_(HALF)

    if place == "accumulated":
        weight.register_post_accumulate_grad_hook(hide)
    else:
        optimizer.register_step_pre_hook(hide)
    assert the(audit(model, optimizer), "masked-gradient").names == ("0.weight",)


class Opaque:
    """Answers to every name."""

    def __getattr__(self, name: str) -> None:
        return None

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def test_hooks_of_any_kind_and_sparse_gradients_are_looked_at_without_harm() -> None:
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nested: list[Any] = [1]
    nested.append(nested)
    for hook in (Opaque(), torch.neg, partial(partial(torch.mul, other=2)), lambda gradient: nested and None):
        model[0].weight.register_hook(hook)
    model(torch.tensor([1])).sum().backward()
    model[0].weight.register_hook(first_two_to_zero)
    assert not found(audit(model, optimizer), "masked-gradient")


def test_a_mask_that_was_there_from_the_start_holds_under_momentum_without_decay() -> None:
    model = net().eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    weight = model[0].weight
    weight.register_hook(HALF.mul)
    before = weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    assert torch.equal(before[:2], weight[:2])
    assert not found(audit(model, optimizer), "masked-gradient")


class Renormed(nn.Embedding):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.long().clamp(0, 3))


def test_a_frozen_parameter_that_the_forward_writes_to() -> None:
    model = nn.Sequential(Renormed(4, 4, max_norm=0.1), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    assert the(audit(model, inputs=torch.rand(6)), "moving-parameter").names == ("0.weight",)
    assert torch.equal(before, model[0].weight)


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = net()
    model.stream = (number for number in range(3))
    report = audit(model, inputs=images())
    assert "cannot be copied" in report.skipped["moving tensors and lost gradients in a forward pass"]


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_what_torchscript_hides_is_said(within: bool, traced: bool) -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()).eval()
    made = torch.jit.trace(inner, torch.randn(3, 2)) if traced else torch.jit.script(inner)
    model = nn.Sequential(made, nn.Linear(2, 1)) if within else made
    freeze(model, "0", norm="freeze")
    report = audit(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(3, 2))
    where = "0" if within else "(root)"
    assert f"a ScriptModule ('{where}')" in report.skipped["dropout and flags in 4 module(s) of TorchScript"]
    assert "ScriptModule" in report.skipped["moving tensors and lost gradients in a forward pass"]


def test_hooks_are_called_a_few_times_with_gradients_of_either_sign_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times, and numbers drawn anew for each, made `audit` of 100 masked parameters take seconds."""
    seen: list[torch.Tensor] = []
    given = hooks._gradients
    monkeypatch.setattr(hooks, "_gradients", lambda p: (seen.append(gradient) or gradient for gradient in given(p)))
    model = nn.Linear(300, 300, bias=False)
    model.weight.register_hook(lambda gradient: gradient * (torch.arange(300) > 1))
    assert the(audit(model, torch.optim.AdamW(model.parameters())), "masked-gradient").names == ("weight",)
    assert len(seen) == 4
    every = torch.stack(seen)
    assert torch.equal(every.sign().sum(0), torch.zeros(300, 300))
    assert torch.allclose(every.abs().sum(0), torch.full((300, 300), 2.4))
    assert bool((every != 0).all())
    rows = every[0].abs().sum(1)
    assert len(rows.unique()) > 290, "rows alike would hide a hook that drops some of them"
