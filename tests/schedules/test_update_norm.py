"""UpdateNorm: any layer that stands still is frozen, and may try again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from freezekit.schedules import UpdateNorm


class Steered:
    """A net of three layers whose updates are dictated: ``move(a, b, c)`` changes each by that share of its norm."""

    def __init__(self, **options: object) -> None:
        self.model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(3)])
        for layer in self.model:
            nn.init.ones_(layer.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.schedule = UpdateNorm(self.model, self.optimizer, **{"threshold": 0.01, "every": 1, **options})

    def move(self, *shares: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        for layer, share in zip(self.model, shares, strict=True):
            layer.weight.grad = -layer.weight.detach() * share if layer.weight.requires_grad else None
        self.optimizer.step()
        change = self.schedule.step()
        return change.frozen, change.thawed


def test_any_layer_may_be_frozen() -> None:
    s = Steered()
    assert s.move(0.1, 0.005, 0.1) == (("1",), ())
    assert [p.requires_grad for p in s.model.parameters()] == [True, False, True]
    assert s.schedule.history[-1][1] == pytest.approx({"0": 0.1, "1": 0.005, "2": 0.1}, rel=1e-5)


def test_the_update_is_a_mean_over_the_steps_between() -> None:
    s = Steered(every=4)
    for _ in range(3):
        assert s.move(0.02, 0.02, 0.02) == ((), ())
    s.move(0.0, 0.02, 0.02)
    measured = s.schedule.history[-1][1]
    assert measured["0"] == pytest.approx((1.02**3 - 1) / 4, rel=1e-4)
    assert measured["1"] == pytest.approx((1.02**4 - 1) / 4, rel=1e-4)


def test_patience() -> None:
    s = Steered(patience=2)
    assert s.move(0.005, 0.1, 0.1) == ((), ())
    assert s.move(0.1, 0.005, 0.1) == ((), ())
    assert s.move(0.005, 0.005, 0.1) == (("1",), ())
    assert s.move(0.005, 0.1, 0.1) == (("0",), ())


def test_thawing_and_freezing_again() -> None:
    s = Steered(thaw_after=2, max_changes=None)
    assert s.move(0.005, 0.1, 0.1) == (("0",), ())
    assert s.move(0.005, 0.1, 0.1) == ((), ())
    assert s.move(0.005, 0.1, 0.1) == ((), ("0",))
    assert s.model[0].weight.requires_grad
    assert s.move(0.1, 0.1, 0.1) == ((), ())
    assert s.move(0.005, 0.1, 0.1) == (("0",), ())


def test_changes_are_limited() -> None:
    s = Steered(max_changes=1)
    assert s.move(0.005, 0.1, 0.1) == (("0",), ())
    assert s.move(0.0, 0.0, 0.1) == ((), ())
    assert s.schedule.compile_entries() == 4


def test_the_layer_that_moves_most_stays() -> None:
    s = Steered()
    assert s.move(0.001, 0.003, 0.002) == (("0", "2"), ())
    assert s.move(0.0, 0.0, 0.0) == ((), ())
    assert s.model[1].weight.requires_grad


def test_weights_of_zero() -> None:
    s = Steered()
    nn.init.zeros_(s.model[0].weight)
    s.schedule._remember()
    assert s.move(0.0, 0.1, 0.1) == (("0",), ())
    t = Steered()
    nn.init.zeros_(t.model[0].weight)
    t.schedule._remember()
    nn.init.ones_(t.model[0].weight)
    assert t.move(0.0, 0.1, 0.1) == ((), ()), "from zero, any move is large"


def test_a_dry_run_freezes_nothing_and_plans_all(capsys: pytest.CaptureFixture[str]) -> None:
    s = Steered(dry_run=True, thaw_after=1)
    for _ in range(3):
        assert s.move(0.005, 0.1, 0.1) == ((), ())
    assert all(p.requires_grad for p in s.model.parameters())
    plan = s.schedule.plan()
    assert plan.stages == [(0, ()), (1, ("0",)), (2, ()), (3, ("0",))]
    assert plan.compile_entries(validation=False) == 2, "a frozen set that comes again finds its compiled version"
    assert len(plan.curves["0"]) == 3
    plan.print()
    assert "dry run" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resuming_decides_alike(stop: int) -> None:
    shares = [(0.1, 0.1, 0.1), (0.0, 0.1, 0.1), (0.0, 0.1, 0.0), (0.1, 0.1, 0.0), (0.1, 0.1, 0.0), (0.0, 0.0, 0.1)]
    options = {"every": 2, "thaw_after": 1, "max_changes": None, "state": "keep"}
    s = Steered(**options)
    for i, share in enumerate(shares):
        if i == stop:
            saved = copy.deepcopy((s.model.state_dict(), s.optimizer.state_dict(), s.schedule.state_dict()))
        s.move(*share)
    t = Steered(**options)
    t.model.load_state_dict(saved[0])
    t.optimizer.load_state_dict(saved[1])
    t.schedule.load_state_dict(saved[2])
    for share in shares[stop:]:
        t.move(*share)
    assert t.schedule.changes == s.schedule.changes
    assert len(s.schedule.changes) >= 2
    assert all(torch.equal(a, b) for a, b in zip(s.model.parameters(), t.model.parameters(), strict=True))


def test_wrong_arguments() -> None:
    for name in ("every", "patience", "thaw_after", "max_changes"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Steered(**{name: 0})
    with pytest.raises(ValueError, match="threshold must be above 0"):
        Steered(threshold=0.0)
    with pytest.raises(TypeError, match="optimizer must be"):
        UpdateNorm(nn.Linear(1, 1), None, 0.1)
