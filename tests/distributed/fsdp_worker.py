"""Checks of freezing under FSDP2 (and what audit says of FSDP1), run on two gloo processes."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard

from freezekit.auditing import audit
from freezekit.distributed import check_ranks
from freezekit.distributed.watching import note_freeze
from freezekit.freezing import freeze, unfreeze
from freezekit.schedules import FreezeOut, UpdateNorm
from tests.distributed.ddp_worker import batch, train
from tests.distributed.harness import raises, run, same_on_all_ranks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 2))


def sharded(units: bool = True) -> nn.Sequential:
    model = net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if units:
        for layer in model:
            if next(layer.parameters(), None) is not None:
                fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole of every parameter. Collective."""
    return {n: p.detach().full_tensor().clone() for n, p in model.named_parameters()}


def check_freeze_and_unfreeze_after_sharding() -> None:
    """Mixed units too: FSDP2 asks for requires_grad at every forward pass."""
    for units in (True, False):
        for remove in (False, True):
            model = sharded(units)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
            train(model, optimizer, range(2))
            freeze(model, "0", "3.bias", optimizer=optimizer, remove=remove)
            note_freeze(model)
            held = {n: v for n, v in full(model).items() if n[0] == "0" or n == "3.bias"}
            moved = full(model)["3.weight"]
            train(model, optimizer, range(2, 4))
            now = full(model)
            assert all(torch.equal(now[n], v) for n, v in held.items()), (units, remove)
            assert not torch.equal(now["3.weight"], moved)
            assert not audit(model, optimizer).errors
            unfreeze(model, "0", "3.bias", optimizer=optimizer)
            train(model, optimizer, range(4, 6))
            now = full(model)
            assert not any(torch.equal(now[n], v) for n, v in held.items())
            same_on_all_ranks(now)


def check_audit_asks_the_optimizer_about_shards() -> None:
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, range(2))
    model[0].requires_grad_(False)
    optimizer.zero_grad(set_to_none=False)
    before = full(model)
    found = {f.code: f for f in audit(model, optimizer)}
    assert found["would-move"].names == ("0.weight", "0.bias"), found
    assert all(torch.equal(v, before[n]) for n, v in full(model).items())
    optimizer.step()
    assert not torch.equal(full(model)["0.weight"], before["0.weight"])


def check_sharded_trains_as_the_whole_batch_does() -> None:
    """The reference: one process, both ranks' data, the same layers frozen; sums may round differently, no more."""
    model, reference = sharded(), net()
    freeze(model, "0")
    freeze(reference, "0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer2 = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        optimizer2.zero_grad()
        both = [torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + r)) for r in range(2)]
        reference(torch.cat(both)).square().mean().backward()
        optimizer2.step()
    for name, value in full(model).items():
        torch.testing.assert_close(value, reference.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)


def check_disagreement_is_an_error_not_a_hang() -> None:
    model = sharded()
    check_ranks(model)
    freeze(model, "0" if dist.get_rank() == 0 else "4")
    with raises(RuntimeError, "disagree", "4.weight (ranks [0])", "0.weight (ranks [1])"):
        check_ranks(model)


def check_freezeout() -> None:
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = FreezeOut(model, 0.4, 6, stages=2, optimizer=optimizer)
    held: dict[str, torch.Tensor] = {}
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        now = full(model)
        assert all(torch.equal(now[n], v) for n, v in held.items())
        for name in schedule.step().frozen:
            held.update({n: v for n, v in now.items() if n.startswith(name)})
    assert {n[0] for n in held} == {"0", "3"}
    same_on_all_ranks(full(model))


def check_update_norm_measures_the_whole_tensor() -> None:
    """The shards of a tensor differ between ranks; the decision must not."""
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = UpdateNorm(model, optimizer, 1e-9, every=2, dry_run=True)
    before = full(model)
    train(model, optimizer, range(2))
    after = full(model)
    schedule.step()
    schedule.step()
    (_, measured), = schedule.history  # fmt: skip
    for layer in schedule.layers:
        moved = sum(float((after[n] - before[n]).norm()) ** 2 for n in layer.parameters) ** 0.5
        weight = sum(float(before[n].norm()) ** 2 for n in layer.parameters) ** 0.5
        assert abs(measured[layer.name] - moved / weight / 2) <= 1e-6 * measured[layer.name]
    every: list[object] = [None, None]
    dist.all_gather_object(every, measured)
    assert every[0] == every[1]


def check_audit_explains_fsdp1() -> None:
    model = FSDP1(net(), use_orig_params=True, device_id=torch.device("cpu"))
    model(batch(0)).sum().backward()
    assert "fsdp1-mixed" not in {f.code for f in audit(model)}
    for name, p in model.named_parameters():
        p.grad = None
        if "module.0." in name:
            p.requires_grad_(False)
    found = {f.code: f for f in audit(model)}
    assert found["fsdp1-mixed"].names == ("0.weight", "0.bias"), found
    assert "fully_shard" in found["fsdp1-mixed"].mend


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(globals())
