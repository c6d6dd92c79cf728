"""FreezeOut: the times of the paper, what is frozen when, resuming, learning rates, and torch.compile's count."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from freezekit.auditing import audit
from freezekit.freezing import freeze, is_held
from freezekit.guarding import guard
from freezekit.schedules import FreezeOut, freeze_times, layers_of


def net(depth: int = 3) -> nn.Sequential:
    """``depth`` blocks of linear and batch norm, and a linear head."""
    torch.manual_seed(0)
    blocks = [m for _ in range(depth) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())]
    return nn.Sequential(*blocks, nn.Linear(4, 2))


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model(batch(step)).square().mean().backward()
    optimizer.step()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_layers_go_with_their_norms() -> None:
    layers = layers_of(net())
    assert [x.name for x in layers] == ["0", "3", "6", "9"]
    assert layers[0].parameters == ("0.weight", "0.bias", "1.weight", "1.bias")
    bare = layers_of(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, affine=False), nn.Linear(1, 1)))
    assert bare[0].patterns == ("0.weight", "0.bias", "1")


def test_layers_by_name_and_what_is_wrong_with_names() -> None:
    model = nn.ModuleDict({"stem": net(1), "head": nn.Linear(2, 1)})
    assert [x.name for x in layers_of(model, ["stem", "head"])] == ["stem", "head"]
    with pytest.raises(ValueError, match=r"layers: 'stam' matches no module .*; near names: 'stem'"):
        layers_of(model, ["stam"])
    for names in (["stem", "stem.0"], ["stem.0", "stem"]):
        with pytest.raises(ValueError, match=r"layers: 'stem.0' is inside 'stem', which is a layer too"):
            layers_of(model, names)
    with pytest.raises(ValueError, match="has no parameters"):
        layers_of(model, ["stem.2"])
    with pytest.raises(ValueError, match="no trainable layer"):
        layers_of(model.requires_grad_(False))


def test_layers_by_the_patterns_of_freeze() -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(1, 1, 1), "b": nn.BatchNorm2d(1), "c": nn.Conv2d(1, 1, 1)})
    assert [x.name for x in layers_of(model, [nn.Conv2d])] == ["a", "c"]
    assert [x.name for x in layers_of(model, ["[ab]", model["c"]])] == ["a", "b", "c"]
    assert [x.name for x in layers_of(model, ["a", "a"])] == ["a"]


def test_a_tied_weight_is_frozen_with_its_last_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert [x.parameters for x in layers_of(model)] == [("0.bias",), ("1.weight", "1.bias"), ("2.weight", "2.bias")]


@given(st.integers(2, 40), st.floats(0.01, 1), st.sampled_from(["linear", "cubic"]))
def test_times_are_the_papers(layers: int, t0: float, how: str) -> None:
    times = freeze_times(layers, t0, how)
    power = 3 if how == "cubic" else 1
    assert times[0] == pytest.approx(t0**power)
    assert times[-1] == pytest.approx(1)
    roots = [t ** (1 / power) for t in times]
    gaps = [b - a for a, b in itertools.pairwise(roots)]
    assert gaps == pytest.approx([(1 - t0) / (layers - 1)] * (layers - 1), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(1, 7),
    t0=st.floats(0.05, 1),
    total=st.integers(1, 60),
    how=st.sampled_from(["linear", "cubic"]),
    stages=st.one_of(st.none(), st.integers(1, 9)),
)
def test_stages_never_freeze_earlier_than_the_paper(
    depth: int, t0: float, total: int, how: str, stages: int | None
) -> None:
    schedule = FreezeOut(net(depth), t0, total, how, stages)
    planned = schedule.plan().stages
    frozen_at: dict[str, int] = {}
    changes = 0
    for _ in range(total):
        change = schedule.step()
        changes += bool(change)
        frozen_at.update(dict.fromkeys(change.frozen, change.step))
        assert not change.thawed
    names = [layer.name for layer in schedule.layers]
    assert [n for n in names if n in frozen_at] == names[: len(frozen_at)], "layers freeze first to last"
    assert names[-1] not in frozen_at, "the last layer trains to the end"
    for name, step in frozen_at.items():
        assert step >= schedule.times[name] * total - 1e-6
    assert changes <= (depth if stages is None else min(stages, depth))
    assert schedule.compile_entries(validation=False) == changes + 1
    assert [(s, set(held)) for s, held in planned[1:]] == [
        (s, {n for n, at in frozen_at.items() if at <= s}) for s in sorted(set(frozen_at.values()))
    ]


def test_what_is_frozen_stands_still_and_the_rest_trains() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = FreezeOut(model, 0.4, 10, optimizer=optimizer)
    guard(model, optimizer)
    frozen: dict[str, torch.Tensor] = {}
    for step in range(10):
        before = bits(model)
        train_step(model, optimizer, step)
        now = model.state_dict()
        for name, value in before.items():
            if name in frozen:
                assert torch.equal(now[name], value), f"{name} moved at step {step}"
            elif name.endswith("weight"):
                assert not torch.equal(now[name], value), f"{name} stood still at step {step}"
        for layer in schedule.step().frozen:
            index = int(layer)
            frozen.update({k: v for k, v in bits(model).items() if int(k.split(".")[0]) in (index, index + 1)})
            assert is_held(model[index + 1])
        model.train()
    assert schedule.frozen == ("0", "3", "6")
    assert {int(k.split(".")[0]) for k in frozen} == {0, 1, 3, 4, 6, 7}
    assert not audit(model, optimizer, batch(0)).errors


def make(anneal: bool = False, **options: object) -> tuple[nn.Sequential, torch.optim.Optimizer, FreezeOut]:
    model = net()
    groups = FreezeOut.param_groups(model, 0.1) if anneal else model.parameters()
    optimizer = torch.optim.Adam(groups, lr=0.1)
    return model, optimizer, FreezeOut(model, 0.4, 10, optimizer=optimizer, anneal=anneal, **options)


@pytest.mark.parametrize("stop", [0, 3, 5, 9])
@pytest.mark.parametrize("options", [{}, {"anneal": True}, {"anneal": True, "scale_lr": True, "how": "cubic"}])
def test_resuming_gives_the_same_bits(stop: int, options: dict[str, object]) -> None:
    model, optimizer, schedule = make(**options)
    for step in range(10):
        if step == stop:
            checkpoint = copy.deepcopy([x.state_dict() for x in (model, optimizer, schedule)])
        train_step(model, optimizer, step)
        schedule.step()
    again, optimizer2, schedule2 = make(**options)
    again.load_state_dict(checkpoint[0])
    optimizer2.load_state_dict(checkpoint[1])
    schedule2.load_state_dict(checkpoint[2])
    for step in range(stop, 10):
        train_step(again, optimizer2, step)
        schedule2.step()
    assert same(bits(model), bits(again))
    assert schedule2.state_dict() == schedule.state_dict()


def test_a_state_of_another_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t0 is 0.5 here and 0.4 there"):
        FreezeOut(net(), 0.5, 10).load_state_dict(make()[2].state_dict())


def test_annealing_follows_the_formula() -> None:
    model, optimizer, schedule = make(anneal=True, scale_lr=True)
    for step in range(10):
        for group, t in zip(optimizer.param_groups, schedule.times.values(), strict=True):
            share = step / (t * 10)
            expected = 0.1 / t * (1 + math.cos(math.pi * share)) / 2 if share < 1 else 0.0
            assert group["lr"] == pytest.approx(expected)
        train_step(model, optimizer, step)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_wrong_arguments() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrong: list[tuple[str, dict[str, object]]] = [
        ("t0 must be above 0", {"t0": 0.0}),
        ("total_steps must be", {"total_steps": 0}),
        ("how must be", {"how": "square"}),
        ("stages must be", {"stages": 0}),
        ("needs an optimizer", {"anneal": True}),
        ("needs anneal", {"scale_lr": True}),
        ("must hold one layer", {"anneal": True, "optimizer": optimizer}),
        ("remove=True changes an optimizer, but there is none", {"remove": True}),
        ("at least two layers", {"layers": ["0"]}),
    ]
    for message, options in wrong:
        with pytest.raises(ValueError, match=message):
            FreezeOut(model, **{"t0": 0.5, "total_steps": 10, **options})
    with pytest.raises(TypeError, match=r"model must be.*got int"):
        FreezeOut(3, 0.5, 10)


@pytest.mark.parametrize(("stages", "validation"), [(1, True), (2, False), (3, True)])
def test_the_number_of_compiled_versions_is_predicted(stages: int, validation: bool) -> None:
    """Counted by a backend that counts; at three stages with validation torch.compile is at its limit, not beyond."""
    torch._dynamo.reset()
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    model = net()
    fast = torch.compile(model, backend=count)
    schedule = FreezeOut(fast, 0.4, 8, stages=stages)
    for step in range(8):
        fast(batch(step)).sum().backward()
        schedule.step()
        if validation:
            with torch.no_grad():
                fast(batch(step))
    # The validation pass comes after the stage change, so every stage is validated.
    assert len(compiled) == schedule.compile_entries(validation=validation)
    torch._dynamo.reset()


def test_audit_counts_the_recompilations() -> None:
    model = torch.compile(net(6), backend="eager")
    assert not len(audit(model, schedule=FreezeOut(model, 0.4, 100)))
    many = audit(model, schedule=FreezeOut(model, 0.4, 100, stages=None))
    assert [f.code for f in many] == ["recompile-limit"]
    assert "needs 14 compiled versions" in many.findings[0].why


def test_audit_sees_a_module_at_its_limit() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    torch._dynamo.reset()
    model = Net()
    fast = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        fast(batch(0))
        assert not len(audit(fast))
        freeze(model, "body.0")
        fast(batch(0))
        found = audit(fast)
    assert [(f.code, f.severity) for f in found] == [("recompile-limit", "warning")]
    assert "holds 2 versions" in found.findings[0].why
    torch._dynamo.reset()


def test_plan_as_table_data_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make(anneal=True)[2].plan()
    plan.print()
    assert "within its limit" in capsys.readouterr().out
    FreezeOut(net(6), 0.4, 100, stages=None).plan().print()
    assert "BEYOND its limit" in capsys.readouterr().out
    data = json.loads(plan.to_json())
    assert data == plan.to_dict()
    assert [s["step"] for s in data["stages"]] == [0, 4, 6, 8]
    assert data["compile_entries"] == {"training": 4, "with_validation": 8}
    plan.plot(tmp_path / "plan.png")
    from matplotlib.image import imread

    picture = imread(tmp_path / "plan.png")
    colours = {tuple((c[:3] * 255).round().astype(int)) for c in picture.reshape(-1, picture.shape[-1])}
    assert (0x4C, 0x78, 0xA8) in colours, "no bar of a layer that trains"
    assert (0xD9, 0xD9, 0xD9) in colours, "no bar of a frozen layer"
