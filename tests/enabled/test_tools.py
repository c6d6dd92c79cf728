"""freezekit's own tools while it is enabled: what they measure is what is kept then, and what they find is the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from freezekit.conversion import conversion_report
from freezekit.planning import Machine, plan
from tests.observe import bytes_saved


class Net(nn.Module):
    """Of stock classes and functions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval(), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))))


X = torch.randn(2, 3, 10, 10, requires_grad=True)


def frozen() -> Net:
    return Net().requires_grad_(False)


def test_explain_counts_what_is_kept() -> None:
    net = frozen()
    stock = fk.explain(net, X).bytes_kept
    with fk.enabled():
        explained = fk.explain(net, X).bytes_kept
        measured = bytes_saved(lambda: net(X * 1), [*net.parameters(), *net.buffers()])
    assert explained == measured < stock / 10


def test_plan_predicts_what_is_kept() -> None:
    machine = Machine(1e9, 1e9)
    depths = [plan(Net(), X, machine=machine)]
    with fk.enabled():
        depths.append(plan(Net(), X, machine=machine))
    stock, ours = ({option.name: option.bytes_kept for option in each} for each in depths)
    assert stock.keys() == ours.keys()
    assert min(ours.values()) < min(stock.values())


def test_the_conversion_report_names_the_calls_that_still_keep_memory() -> None:
    def calls() -> list[str]:
        return [row.layer for row in conversion_report(frozen(), inputs=X) if row.status == "call"]

    assert [name.split(".")[-1] for name in calls()] == ["relu"]
    with fk.enabled():
        assert calls() == []


def test_audit_finds_the_same() -> None:
    def findings() -> list[tuple[str, str]]:
        net = frozen()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        net.conv.weight.grad = torch.ones_like(net.conv.weight)
        net.norm.train()
        return [(found.code, found.where) for found in fk.audit(net, optimizer, inputs=X.detach())]

    stock = findings()
    with fk.enabled():
        assert findings() == stock
    assert stock


def test_profile_counts_no_wgrad() -> None:
    net = frozen()
    with fk.enabled(), fk.profile() as profile:
        net(X).sum().backward()
    counts = profile.counts()
    assert counts["dgrad"] == 2
    assert counts["wgrad"] == 0


@pytest.mark.parametrize("command", ["explain", "plan"])
def test_the_shell_knows_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from freezekit.cli import main

    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--enabled" in capsys.readouterr().out
