"""`plan`: bytes exact, budgets kept, nothing of the model changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from freezekit.explanation import explain
from freezekit.planning import Machine, Option, Plan, plan

MACHINE = Machine(flops=1e9, bandwidth=1e9)


def net() -> nn.Module:
    return fk.convert(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)
        )
    )


def test_bytes_are_exact() -> None:
    model = net()
    for option in plan(model, torch.randn(2, 3, 16, 16), machine=MACHINE, measure=True):
        assert option.measured_bytes == option.bytes_kept, option.name


def test_depths_grow_and_cost_shrinks() -> None:
    made = plan(net(), torch.empty(2, 3, 16, 16, device="meta"), machine=MACHINE)
    depths = [option for option in made if option.name.startswith("depth")]
    assert [len(option.frozen) for option in depths] == [0, 2, 4, 6, 8]
    for key in ("bytes_kept", "backward_flops", "backward_seconds", "trainable"):
        values = [getattr(option, key) for option in depths]
        assert values == sorted(values, reverse=True), key
    assert depths[-1].bytes_kept == depths[-1].backward_flops == depths[-1].trainable == 0


def test_parametrized_layers_stand_in_forward_order() -> None:
    spectral, weight = nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm
    model = nn.Sequential(spectral(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), weight(nn.Conv2d(4, 4, 3)), nn.PReLU(4))
    made = list(plan(model, torch.empty(2, 3, 8, 8), machine=MACHINE))
    assert [sorted({name[0] for name in option.frozen}) for option in made[:5]] == [
        [],
        ["0"],
        ["0", "1"],
        ["0", "1", "2"],
        ["0", "1", "2", "3"],
    ]
    alone = list(plan(spectral(nn.Linear(8, 8)), torch.empty(2, 8), machine=MACHINE))
    assert [len(option.frozen) for option in alone[:2]] == [0, 2]


def test_what_no_layer_holds_is_not_the_last_layer() -> None:
    class WithToken(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
            self.token = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.token)

    made = {option.name: option for option in plan(WithToken(), torch.empty(2, 4), machine=MACHINE)}
    assert set(made["last layer learns"].frozen) == {"token", "0.weight", "0.bias"}
    assert "token" in made["depth 3"].frozen
    assert "token" not in made["depth 2"].frozen


def test_regimes() -> None:
    made = {option.name: option for option in plan(net(), torch.empty(2, 3, 16, 16), machine=MACHINE)}
    assert made["norms learn"].trainable == 16
    assert made["biases learn"].trainable == 8 + 8 + 8 + 4
    assert made["last layer learns"].trainable == 8 * 4 * 9 + 4
    assert made["input learns"].trainable == 0
    assert made["input learns"].backward_flops > 0


def test_the_choice_is_the_shallowest_that_fits() -> None:
    model, x = net(), torch.empty(2, 3, 16, 16, device="meta")
    depths = [o for o in plan(model, x, machine=MACHINE) if o.name.startswith("depth")]
    for option in depths:
        choice = plan(model, x, memory=max(option.bytes_kept, 1), machine=MACHINE).choice
        assert choice is not None
        assert choice.bytes_kept <= max(option.bytes_kept, 1)
        assert len(choice.frozen) <= len(option.frozen)
    assert plan(model, x, machine=MACHINE).choice is None
    tight = plan(model, x, memory=depths[0].bytes_kept, time=depths[2].backward_seconds, machine=MACHINE)
    assert tight.choice == depths[2]


def test_the_model_is_left_as_it_was() -> None:
    model = net()
    model[0].requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan(model, torch.randn(2, 3, 16, 16), machine=MACHINE, measure=True)
    assert [p.requires_grad for p in model.parameters()] == [False, False, *[True] * 6]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_bad_budgets_and_models() -> None:
    with pytest.raises(ValueError, match="memory must be positive, got -1"):
        plan(net(), torch.empty(1, 3, 16, 16), memory=-1)
    with pytest.raises(ValueError, match="no parameters"):
        plan(nn.ReLU(), torch.empty(1))
    with pytest.raises(TypeError, match="model must be"):
        plan(None, torch.empty(1))
    lazy, x = nn.Sequential(nn.LazyConv2d(4, 3)), torch.empty(1, 3, 16, 16)
    for look in (explain, plan):
        with pytest.raises(ValueError, match="^model has lazy parameters, whose shapes are not known before a first"):
            look(lazy, x)


def test_machine_is_measured() -> None:
    machine = Machine.measure()
    assert machine.flops > 1e8
    assert machine.bandwidth > 1e8


def test_predictions_of_time_are_judged_by_their_order() -> None:
    def planned(measured: list[float | None]) -> Plan:
        options = [
            Option(f"depth {i}", (), 0, 0, float(predicted), 0, 0, seconds)
            for i, (predicted, seconds) in enumerate(zip([4, 3, 2, 0, 0], measured, strict=True))
        ]
        return Plan(options, MACHINE, None, None)

    assert planned([9.0, 8.0, 0.5, 0.0, 0.0]).rank_correlation == pytest.approx(1)
    assert planned([0.0, 1.0, 2.0, 3.0, 3.0]).rank_correlation == pytest.approx(-1)
    assert planned([9.0, 0.5, 8.0, 0.0, 0.0]).rank_correlation == pytest.approx(0.895, abs=1e-3)
    assert planned([None] * 5).rank_correlation is None


def test_json_print_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(net(), torch.randn(2, 3, 16, 16), memory=5e4, machine=MACHINE, measure=True)
    data = json.loads(made.to_json())
    assert data["choice"] == made.choice.name
    assert len(data["options"]) == len(made.options)
    made.print(Console(width=220))
    out = capsys.readouterr().out
    assert "<- fits first" in out
    assert "measured (ms)" in out
    assert "rank correlation" in out
    made.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("measure", [False, True])
def test_a_forward_that_refuses_inputs_which_learn_has_no_option_of_that(measure: bool) -> None:
    """As one that reads x by numpy, or has it as the target of a loss too."""
    model = nn.Linear(2, 2)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.soft_margin_loss(model(x), x)

    names = [option.name for option in plan(loss, torch.ones(3, 2), measure=measure)]
    assert names == ["depth 0", "depth 1", "biases learn", "norms learn", "last layer learns"]


@pytest.mark.parametrize("learns", [False, True])
def test_a_reentrant_checkpoint_is_planned_and_refused_to_be_measured_with_the_cure(learns: bool) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(x: torch.Tensor, reentrant: bool) -> torch.Tensor:
        return checkpoint(second, first(x), use_reentrant=reentrant)

    x = torch.ones(3, 2, requires_grad=learns)
    assert len(plan(forward, (x, True)).options) == 7
    with pytest.raises(RuntimeError, match=r"a reentrant checkpoint .* refuses: call checkpoint\(.*=False\), or plan"):
        plan(forward, (x, True), measure=True)
    assert plan(forward, (x, False), measure=True).options[0].measured_seconds


@pytest.mark.parametrize(
    ("flops", "bandwidth", "wrong"), [(0, 1, "flops"), (1e9, -1.0, "bandwidth"), (float("nan"), 1, "flops")]
)
def test_a_machine_of_no_speed_is_told(flops: float, bandwidth: float, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong} must be a number above 0, got"):
        Machine(flops, bandwidth)
