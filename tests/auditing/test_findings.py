"""Each pitfall of freezing is seen by `audit`, named, and gone once it is mended."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from freezekit.auditing import AuditError, audit
from freezekit.freezing import freeze, unfreeze
from tests.auditing.helpers import found, images, net, the


def trained(optimizer: str, **options: float) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """A net after two steps, its conv and norm then frozen in eval mode."""
    model = net()
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        opt.zero_grad()
        model(images()).square().mean().backward()
        opt.step()
    opt.zero_grad()
    for part in (model[0], model[1]):
        part.requires_grad_(False).eval()
    return model, opt


@pytest.mark.parametrize(
    ("optimizer", "options", "moves"),
    [
        ("SGD", {}, False),
        ("SGD", {"momentum": 0.9}, True),
        ("SGD", {"weight_decay": 0.1}, True),
        ("Adam", {}, True),
        ("AdamW", {}, True),
        ("RMSprop", {}, False),
        ("RMSprop", {"momentum": 0.9}, True),
        ("Adagrad", {}, False),
        ("Adagrad", {"weight_decay": 0.1}, True),
    ],
)
def test_zero_gradients_are_judged_by_what_the_optimizer_would_do(
    optimizer: str, options: dict[str, float], moves: bool
) -> None:
    """The audit's verdict is the truth: the same step, really made, moves the parameter or does not."""
    model, opt = trained(optimizer, **options)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    before, state = model[0].weight.clone(), json.dumps(str(opt.state_dict()))
    report = audit(model, opt)
    assert torch.equal(before, model[0].weight), "audit moved the parameter"
    assert state == json.dumps(str(opt.state_dict())), "audit changed the optimizer's state"
    assert [f.names for f in found(report, "would-move")] == ([("0.weight",)] if moves else [])
    assert [f.names for f in found(report, "stale-grad")] == ([] if moves else [("0.weight",)])
    opt.step()
    assert torch.equal(before, model[0].weight) is not moves


def test_a_frozen_nan_does_not_move() -> None:
    model, opt = trained("SGD")
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    assert the(audit(model, opt), "stale-grad").names == ("0.weight",)


def test_the_cause_of_a_move_is_named() -> None:
    model, opt = trained("SGD", momentum=0.9, weight_decay=0.1)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    why = the(audit(model, opt), "would-move").why
    assert "weight_decay=0.1" in why
    assert "momentum_buffer" in why
    assert "stale" in why
    model[0].weight.grad = None
    assert not audit(model, opt).errors


def test_an_optimizer_that_cannot_be_asked_is_judged_by_its_gradient() -> None:
    model = net().eval()
    opt = torch.optim.LBFGS(model.parameters())
    model[0].weight.requires_grad_(False).grad = torch.ones_like(model[0].weight)
    assert "probably" in the(audit(model, opt), "would-move").why
    model[0].weight.grad.zero_()
    assert the(audit(model, opt), "stale-grad").names == ("0.weight",)


class Shrinking(torch.optim.SGD):
    """Writes to its parameters through another entry of the group."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0]["shrunk"] = params

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["shrunk"]:
            p.mul_(0.5)


def test_an_optimizer_that_moves_through_another_entry_of_its_group() -> None:
    model = net()
    optimizer = Shrinking(list(model.parameters()))
    model(images()).sum().backward()
    model[0].requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    assert the(audit(model, optimizer), "would-move").names == ("0.weight", "0.bias")
    assert all(map(torch.equal, before, model.parameters()))


class WithoutGradients(torch.optim.SGD):
    """Steps what has no gradient by zeros, as some public optimizers do: decay moves it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.add_(p.grad + group["weight_decay"] * p, alpha=-group["lr"])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_optimizer_that_steps_what_has_no_gradient(decay: float) -> None:
    model = net().eval()
    optimizer = WithoutGradients(model.parameters(), lr=0.1, weight_decay=decay)
    freeze(model, "0", optimizer=optimizer)
    before = model[0].weight.clone()
    report = audit(model, optimizer)
    moving = [f.names for f in found(report, "would-move")]
    assert moving == ([("0.weight", "0.bias")] if decay else [])
    assert [f.names for f in found(report, "frozen-in-optimizer")] == ([] if decay else [("0.weight", "0.bias")])
    assert model[0].weight.grad is None
    optimizer.step()
    assert torch.equal(before, model[0].weight) is not bool(moving)
    unfreeze(model, "0", optimizer=optimizer)
    freeze(model, "0", optimizer=optimizer, remove=True)  # the cure
    assert not audit(model, optimizer).errors


def test_scheduler_and_step_hooks_do_not_run() -> None:
    model, opt = trained("Adam")
    torch.optim.lr_scheduler.StepLR(opt, 1)
    calls = []
    opt.register_step_pre_hook(lambda *a: calls.append(1))
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    assert the(audit(model, opt), "would-move")
    assert not calls


def test_typo_on_a_parameter() -> None:
    model = net()
    model[4].bias.requires_brad = False
    f = the(audit(model), "unknown-attribute")
    assert (f.severity, f.where, f.names) == ("error", "4.bias.requires_brad", ("4.bias",))
    model[4].bias.requires_grad = False
    assert not found(audit(model), "unknown-attribute")


@pytest.mark.parametrize("attribute", ["requires_grad", "require_grad", "requires_grads", "trainable"])
def test_an_attribute_of_a_module_freezes_nothing(attribute: str) -> None:
    model = net()
    setattr(model[0], attribute, False)
    f = the(audit(model), "unknown-attribute")
    assert f.severity == "error"
    assert f.where == f"0.{attribute}"


def test_a_method_assigned_to() -> None:
    model = net()
    model[0].requires_grad_ = False
    assert the(audit(model), "overwritten-method").where == "0.requires_grad_"


def test_statistics_that_move() -> None:
    model = net()
    model[1].requires_grad_(False)
    assert the(audit(model), "moving-statistics").names == ("1",)
    model[1].eval()
    assert not audit(model).errors


def test_a_norm_without_parameters_goes_with_its_block() -> None:
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    model = nn.Sequential(block, nn.Conv2d(4, 1, 3))
    assert not len(audit(model))
    block.requires_grad_(False)
    assert the(audit(model), "moving-statistics").names == ("0.1",)


def test_spectral_norm_of_a_frozen_weight_moves() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 1))
    assert not len(audit(model))
    model[0].requires_grad_(False)
    assert the(audit(model), "moving-statistics").names == ("0.parametrizations.weight.0",)
    model[0].eval()
    assert not len(audit(model, inputs=torch.ones(2, 3)))


def test_gradients_and_state_left_behind() -> None:
    model, opt = trained("Adam")
    parameter = opt.param_groups[0]["params"].pop(0)
    parameter.grad = torch.ones_like(parameter)
    report = audit(model, opt)
    assert the(report, "stray-grad").names == ("0.weight",)
    assert the(report, "orphan-state").names == ("0.weight",)
    with pytest.raises(KeyError):
        opt.state_dict()
    opt.state.pop(parameter)
    opt.state_dict()
    assert not found(audit(model, opt), "orphan-state")


def test_membership() -> None:
    model = net()
    half = torch.optim.SGD(model[4].parameters(), lr=0.1)
    assert the(audit(model, half), "not-optimized").names == ("0.weight", "0.bias", "1.weight", "1.bias")
    rest = torch.optim.SGD([*model[0].parameters(), *model[1].parameters()], lr=0.1)
    assert not len(audit(model, [half, rest]))
    assert the(audit(net(), half), "stale-parameters").severity == "error"
    model[0].requires_grad_(False)
    assert the(audit(model, [half, rest]), "frozen-in-optimizer").severity == "info"
    model.requires_grad_(False).eval()
    assert the(audit(model, half), "nothing-trainable")


def test_a_parameter_in_two_optimizers() -> None:
    model = net()
    both = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(model[0].parameters(), lr=0.1)]
    assert the(audit(model, both), "duplicate-parameter").names == ("0.weight", "0.bias")


def test_a_group_that_a_scheduler_does_not_know() -> None:
    model = net()
    opt = torch.optim.SGD(model[4].parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    assert not found(audit(model, opt), "unscheduled-group")
    opt.add_param_group({"params": list(model[0].parameters())})
    assert the(audit(model, opt), "unscheduled-group").names == ("0.weight", "0.bias")
    opt.step()
    with pytest.raises(ValueError, match="zip"):
        scheduler.step()


def test_kept_momentum_is_told() -> None:
    model, opt = trained("Adam")
    assert "0.weight" in the(audit(model, opt), "kept-state").names


def test_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    model[1].weight = model[0].weight
    assert not len(audit(model))
    model[0].requires_grad_(False)
    assert the(audit(model), "tied").names == ("0.weight", "1.weight")


def test_shared_memory() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    model[0].requires_grad_(False)
    assert the(audit(model), "shared-storage").names == ("0.weight", "1.weight")
    model[1].weight.data = model[0].weight.data.clone()
    assert not len(audit(model))


def test_report_as_table_and_as_data() -> None:
    model = net()
    model[4].bias.requires_brad = False
    report = audit(model)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print(console)
    text = console.export_text()
    assert "requires_brad" in text
    assert "no optimizer given" in text
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["version"] == 1
    assert data["summary"] == {"error": 1, "warning": 0, "info": 0}
    assert set(data["findings"][0]) == {"code", "severity", "where", "why", "mend", "names"}
    with pytest.raises(AuditError, match=r"4\.bias.*requires_brad") as e:
        report.raise_for_errors()
    assert e.value.report is report
    audit(net()).raise_for_errors()


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be.*got int"):
        audit(3)
    with pytest.raises(TypeError, match="optimizer must be"):
        audit(net(), 3)
    with pytest.raises(TypeError, match="schedule must have"):
        audit(net(), schedule=3)
    with pytest.raises(ValueError, match="severity"):
        audit(net()).of("fatal")


class Table:
    """An entry of an optimizer's state that is its own copy."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def __deepcopy__(self, memo: dict[int, Any]) -> Table:
        return self


class Counting(torch.optim.SGD):
    """Counts its steps, in its class and in a table that all parameters share."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        Counting.steps += 1
        for state in self.state.values():
            if "table" in state:
                state["table"].total += 1
        return super().step(closure)


def test_a_step_of_a_copy_is_no_step_to_what_counts_steps() -> None:
    model, table, steps = net(), Table(), []
    optimizer = Counting(model.parameters(), lr=0.1, weight_decay=0.1)
    for p in model.parameters():
        optimizer.state[p]["table"] = table
    model(images()).sum().backward()
    model[0].requires_grad_(False)
    before = register_optimizer_step_pre_hook(lambda *args: steps.append("before"))
    after = register_optimizer_step_post_hook(lambda *args: steps.append("after"))
    try:
        assert found(audit(model, optimizer), "would-move")
        assert (steps, Counting.steps, table.total.item()) == ([], 0, 0)
        optimizer.step()
        assert (set(steps), Counting.steps, table.total.item()) == ({"before", "after"}, 1, len(optimizer.state))
    finally:
        before.remove()
        after.remove()
