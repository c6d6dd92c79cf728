"""Checks of freezing under DDP, run on two gloo processes."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from freezekit.auditing import audit
from freezekit.distributed import (
    StaleWrapperError,
    check,
    check_ranks,
    mismatch,
    reduced,
    rewrap,
    sync_buffers,
    watch,
)
from freezekit.distributed.watching import note_freeze
from freezekit.enabling import enabled
from freezekit.freezing import freeze, unfreeze
from freezekit.guarding import guard
from tests.distributed.harness import raises, run, same_on_all_ranks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))


def batch(step: int) -> torch.Tensor:
    """Data of this rank."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


def frozen_then_unfrozen(**settings: object) -> DDP:
    """A wrapper built while layer 0 was frozen; then layer 0 was unfrozen."""
    model = net()
    model[0].requires_grad_(False)
    ddp = DDP(model, **settings)
    model[0].requires_grad_(True)
    return ddp


def check_torch_diverges_without_a_word() -> None:
    """The pitfall itself, in stock torch: ranks part, and nothing is raised."""
    ddp = frozen_then_unfrozen()
    train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), range(2))
    with raises(AssertionError, "0.weight differs between ranks"):
        same_on_all_ranks(parameters(ddp.module))


def check_mismatch_names_what_changed() -> None:
    ddp = frozen_then_unfrozen()
    ddp.module[3].requires_grad_(False)
    found = mismatch(ddp)
    assert found.unfrozen == ("0.bias", "0.weight"), found
    assert found.frozen == ("3.bias", "3.weight"), found
    ddp.module[0].requires_grad_(False)
    ddp.module[3].requires_grad_(True)
    assert not mismatch(ddp)
    check(ddp)


def check_mismatch_leaves_no_trace() -> None:
    ddp = frozen_then_unfrozen()
    flags = [p.requires_grad for p in ddp.parameters()]
    mismatch(ddp)
    assert flags == [p.requires_grad for p in ddp.parameters()]
    assert all(p.grad is None for p in ddp.parameters())


def check_a_live_graph_does_not_hide_the_change() -> None:
    """A loss that is still referenced keeps accumulators alive; then only the numbers can tell, and they do."""
    ddp = frozen_then_unfrozen()
    loss = ddp.module(batch(0)).sum()
    assert reduced(ddp) is None
    with raises(StaleWrapperError, "built for 6 trainable parameters", "now has 8", "rewrap"):
        check(ddp)
    del loss
    with raises(StaleWrapperError, "0.bias, 0.weight"):
        check(ddp)


def check_unfreezing_is_an_error_before_the_forward_pass() -> None:
    ddp = frozen_then_unfrozen()
    note_freeze(ddp)
    before = copy.deepcopy(parameters(ddp.module))
    with raises(StaleWrapperError, "0.bias, 0.weight became trainable", "diverge", "rewrap(ddp)"):
        ddp(batch(0))
    assert all(torch.equal(before[n], p) for n, p in parameters(ddp.module).items())
    with torch.no_grad():
        ddp(batch(0))  # validation reduces nothing, so it may run


def adversarial(hold: str, settings: dict[str, bool]) -> dict[str, torch.Tensor]:
    """Three steps of a GAN whose discriminator is wrapped, and frozen for the generator's step."""
    discriminator = DDP(net(), **settings)
    generator = nn.Linear(4, 4)
    wrapped = DDP(generator)
    optimizers = [torch.optim.Adam(model.parameters()) for model in (discriminator, generator)]
    with guard(discriminator, optimizers, every=1) if hold != "stock" else nullcontext():
        for step in range(3):
            optimizers[0].zero_grad()
            discriminator(batch(step)).square().mean().backward()
            optimizers[0].step()
            optimizers[1].zero_grad()
            with freeze(discriminator, norm="batch") if hold == "block" else nullcontext():
                if hold == "stock":
                    discriminator.requires_grad_(False)
                elif hold == "calls":
                    freeze(discriminator, norm="batch")
                discriminator(wrapped(batch(step))).mean().backward()
                if hold == "stock":
                    discriminator.requires_grad_(True)
                elif hold == "calls":
                    unfreeze(discriminator)
            optimizers[1].step()
    return {**parameters(discriminator), **{f"generator.{name}": p for name, p in parameters(generator).items()}}


def check_a_discriminator_frozen_for_the_generators_step_is_no_error() -> None:
    for settings in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
        stock = adversarial("stock", settings)
        same_on_all_ranks(stock)
        for hold in ("calls", "block"):
            ours = adversarial(hold, settings)
            assert all(torch.equal(stock[name], value) for name, value in ours.items()), (hold, settings)
    with raises(StaleWrapperError, "0.bias, 0.weight"):
        adversarial("calls", {"static_graph": True})


def check_freezing_is_an_error_before_the_forward_pass() -> None:
    ddp = DDP(net())
    watch(ddp)
    ddp(batch(0)).sum().backward()
    ddp.module[3].requires_grad_(False)
    with raises(StaleWrapperError, "3.bias, 3.weight were frozen", "wait for their gradients"):
        ddp(batch(1))
    ddp.module[3].requires_grad_(True)
    ddp(batch(1)).sum().backward()


def check_find_unused_parameters_copes_with_freezing() -> None:
    ddp = DDP(net(), find_unused_parameters=True)
    watch(ddp)
    ddp.module[3].requires_grad_(False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    train(ddp, optimizer, range(3))
    same_on_all_ranks(parameters(ddp.module))
    codes = {f.code: f.severity for f in audit(ddp, optimizer)}
    assert codes["ddp-frozen"] == "info", codes


def check_static_graph_does_not_cope() -> None:
    ddp = DDP(net(), static_graph=True)
    watch(ddp)
    ddp(batch(0)).sum().backward()
    ddp.module[3].requires_grad_(False)
    with raises(StaleWrapperError, "3.weight"):
        ddp(batch(1))


def check_freezing_the_module_inside_is_seen() -> None:
    """freeze() is given the inner module, or a part of it, and knows no wrapper."""
    for part in ("inner", "layer"):
        ddp = DDP(net())
        target = ddp.module if part == "inner" else ddp.module[3]
        target.requires_grad_(False)
        if part == "inner":
            ddp.module[4].requires_grad_(True)
        note_freeze(target)
        note_freeze(target)
        assert len(target._forward_pre_hooks) == 1
        with raises(StaleWrapperError, "3.weight"):
            ddp(batch(0))


def check_freeze_and_unfreeze_watch_by_themselves() -> None:
    """Nobody called watch: freeze and unfreeze see that a process group is there."""
    for inner in (False, True):
        ddp = DDP(net())
        freeze(ddp.module if inner else ddp, "0" if inner else "module.0")
        with raises(StaleWrapperError, "0.weight were frozen", "rewrap"):
            ddp(batch(0))
        ddp = rewrap(ddp)
        ddp(batch(0)).sum().backward()
        unfreeze(ddp.module if inner else ddp, "0" if inner else "module.0")
        with raises(StaleWrapperError, "0.weight became trainable", "rewrap"):
            ddp(batch(1))


def check_a_whole_graph_stays_whole() -> None:
    """The hook that freeze leaves on a model must not break a compiled graph."""
    model = net()
    freeze(model, "0")
    assert model._forward_pre_hooks
    torch.compile(model, backend="eager", fullgraph=True)(batch(0)).sum().backward()


def check_freeze_before_wrapping_needs_nothing() -> None:
    model = net()
    freeze(model, "0", "1")
    note_freeze(model)
    ddp = DDP(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(ddp, optimizer, range(3))
    same_on_all_ranks(parameters(model))
    assert not audit(ddp, optimizer, batch(0)).errors


def check_a_watched_model_can_be_copied() -> None:
    ddp = DDP(net())
    watch(ddp)
    ddp(batch(0)).sum().backward()
    inner = ddp.module
    watch(inner)
    copy.deepcopy(inner)(batch(0))
    twin = copy.deepcopy(ddp)
    twin(batch(0)).sum().backward()
    twin.module[0].requires_grad_(False)
    with raises(StaleWrapperError, "0.weight"):
        twin(batch(0))
    ddp(batch(0)).sum().backward()


def check_under_torch_compile() -> None:
    ddp = DDP(net())
    watch(ddp)
    fast = torch.compile(ddp, backend="eager")
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    train(fast, optimizer, range(2))
    ddp.module[3].requires_grad_(False)
    with raises(StaleWrapperError, "3.weight"):
        train(fast, optimizer, range(1))
    again = rewrap(ddp)
    train(torch.compile(again, backend="eager"), optimizer, range(2))
    same_on_all_ranks(parameters(again.module))


def check_audit_finds_both() -> None:
    ddp = frozen_then_unfrozen()
    ddp.module[3].requires_grad_(False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    found = {f.code: f for f in audit(ddp, optimizer, batch(0))}
    assert found["ddp-unfrozen"].severity == "error"
    assert found["ddp-unfrozen"].names == ("0.bias", "0.weight")
    assert found["ddp-frozen"].severity == "error"
    assert found["ddp-frozen"].names == ("3.bias", "3.weight")
    assert "rewrap" in found["ddp-frozen"].mend
    again = rewrap(ddp)
    assert not [f for f in audit(again, optimizer, batch(0)) if f.severity != "info"]


def check_rank_disagreement() -> None:
    model = net()
    check_ranks(model)
    ddp = DDP(model)
    model[3 * dist.get_rank()].requires_grad_(False)
    with raises(RuntimeError, "disagree", "0.weight (ranks [1])", "3.weight (ranks [0])"):
        check_ranks(model)
    with raises(RuntimeError, "disagree"):
        rewrap(ddp)


def check_statistics_frozen_without_agreement_move_once() -> None:
    """Why `sync_buffers`: each rank's statistics are its own, until DDP overwrites them by rank 0's."""
    for agree in (False, True):
        ddp = DDP(net())
        ddp(batch(0)).sum().backward()
        if agree:
            sync_buffers(ddp)
        freeze(ddp.module, "1")
        held = ddp.module[1].running_mean.clone()
        rewrap(ddp)(batch(1)).sum().backward()
        moved = not torch.equal(held, ddp.module[1].running_mean)
        assert moved is (not agree and dist.get_rank() != 0), (agree, moved)


def check_both_ways_through_freeze_and_unfreeze() -> None:
    """freeze, train, unfreeze, train, with a wrapper for each: ranks agree, what is frozen stands still."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ddp = DDP(model)
    train(ddp, optimizer, range(2))
    sync_buffers(ddp)
    freeze(model, "0", "1", optimizer=optimizer)
    held = {k: v.clone() for k, v in model.state_dict().items() if k[0] in "01"}
    ddp = rewrap(ddp)
    train(ddp, optimizer, range(2, 4))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in held.items())
    unfreeze(model, "0", "1", optimizer=optimizer)
    ddp = rewrap(ddp)
    train(ddp, optimizer, range(4, 6))
    assert not torch.equal(model[0].weight, held["0.weight"])
    same_on_all_ranks(parameters(model))


def check_formulas_that_are_computed_again() -> None:
    """Buckets are filled from hooks within a backward pass that computes operands again: gradients are stock's."""

    def gradients(enable: bool, **settings: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        ddp = DDP(Formulas(), **settings)
        with enabled() if enable else nullcontext():
            for step in range(2):  # a static graph is known after the first
                ddp.zero_grad()
                ddp(batch(step)).square().mean().backward()
        found = {n: p.grad for n, p in ddp.module.named_parameters() if p.grad is not None}
        same_on_all_ranks(found)
        return found

    for settings in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        expected, found = (gradients(enable, **settings) for enable in (False, True))
        assert expected.keys() == found.keys() == {"first.weight", "first.bias", "scale"}
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), (settings, name)


class Formulas(nn.Module):
    """GELU, swish and a norm with its activation, written out, between layers of which the first ones learn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 64), nn.Linear(64, 2).requires_grad_(False)
        self.norm = nn.GroupNorm(2, 64).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h = 0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.044715 * torch.pow(h, 3.0))))
        h = h * self.scale
        h = h * 0.5 * (1.0 + torch.erf(h / 1.41))
        h = h * torch.sigmoid(1.702 * h)
        h = h[..., None].expand(-1, -1, 32) * 1
        return self.last(nn.functional.silu(self.norm(h)).mean(2))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(globals())
