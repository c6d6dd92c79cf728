"""Checks of `rewrap` and of schedules under DDP, run on two gloo processes."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.parallel.distributed import _MixedPrecision

from freezekit.distributed import mismatch, rewrap
from freezekit.schedules import FreezeOut, UpdateNorm
from tests.distributed.ddp_worker import batch, frozen_then_unfrozen, net, parameters, train
from tests.distributed.harness import raises, run, same_on_all_ranks

KNOWN = inspect.signature(DDP.__init__).parameters
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in KNOWN else "broadcast_buffers"


def logged(ddp: DDP) -> dict[str, Any]:
    keys = ("find_unused_parameters", "gradient_as_bucket_view", "bucket_cap_bytes", "broadcast_buffers",
            "num_parameter_tensors", "world_size", "comm_hook", "device_ids", "output_device")  # fmt: skip
    data = ddp._get_ddp_logging_data()
    return {k: data.get(k) for k in keys}


def check_the_ranks_stay_together_and_equal_a_fresh_wrapper() -> None:
    results = []
    for make in (rewrap, lambda ddp: DDP(ddp.module)):
        ddp = make(frozen_then_unfrozen())
        train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9), range(4))
        same_on_all_ranks(parameters(ddp.module))
        results.append(parameters(ddp.module))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def check_constructor_settings_are_carried() -> None:
    everything: list[dict[str, Any]] = [
        {},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"bucket_cap_mb": 0.0001},
        {"bucket_cap_mb": 25},
        {BUFFERS: False},
        {"process_group": dist.new_group([0, 1])},
        {"dim": 1},
        {"find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 3, BUFFERS: False},
    ]
    newer = ({"bucket_cap_mb_list": [0.0001, 0.5]}, {"batched_grad_copy": True},
             {"skip_all_reduce_unused_params": True, "find_unused_parameters": True})  # fmt: skip
    everything += [s for s in newer if set(s) <= set(KNOWN)]
    for settings in everything:
        old = frozen_then_unfrozen(**settings)
        reference = DDP(old.module, **settings)
        new = rewrap(old)
        assert logged(new) == logged(reference), (settings, logged(new), logged(reference))
        for name in ("static_graph", "dim", "process_group", "bucket_bytes_cap", "bucket_bytes_cap_default",
                     "find_unused_parameters", "batched_grad_copy", "bucket_bytes_cap_list"):  # fmt: skip
            assert getattr(new, name, None) == getattr(reference, name, None), (settings, name)
        assert not mismatch(new), settings
        reference._remove_autograd_hooks()
        train(new, torch.optim.SGD(new.parameters(), lr=0.1), range(3))
        same_on_all_ranks(parameters(new.module))


def check_mode_hooks_and_attributes_are_carried() -> None:
    old = frozen_then_unfrozen()
    seen: list[str] = []
    old.register_forward_hook(lambda m, a, o: seen.append("after"))
    old.register_forward_pre_hook(lambda m, a, k: seen.append("before"), with_kwargs=True)
    old.note = "mine"
    old.eval()
    new = rewrap(old)
    assert not new.training
    assert new.note == "mine"
    new.train()(batch(0)).sum().backward()
    assert seen == ["before", "after"]


def check_comm_hooks_are_carried() -> None:
    buckets: list[int] = []

    def counting(state, bucket):  # DDP compares annotations with its types, and these would be strings
        state.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)

    old = frozen_then_unfrozen()
    old.register_comm_hook(buckets, counting)
    new = rewrap(old)
    train(new, torch.optim.SGD(new.parameters(), lr=0.1), range(2))
    assert buckets == [0, 0]
    same_on_all_ranks(parameters(new.module))
    builtin = frozen_then_unfrozen()
    builtin._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    again = rewrap(builtin)
    assert again._get_ddp_logging_data()["comm_hook"] == "BuiltinCommHookType.FP16_COMPRESS"
    bare = rewrap(again, comm_hooks=[])
    assert "comm_hook" not in bare._get_ddp_logging_data()


def check_a_state_of_the_old_buckets_is_refused() -> None:
    old = frozen_then_unfrozen()
    old.register_comm_hook(PowerSGDState(None), powerSGD_hook)
    with raises(ValueError, "PowerSGDState", "comm_hooks=[(hook, new_state)]"):
        rewrap(old)
    new = rewrap(old, comm_hooks=[(powerSGD_hook, PowerSGDState(None))])
    train(new, torch.optim.SGD(new.parameters(), lr=0.1), range(2))
    same_on_all_ranks(parameters(new.module))


def check_gradients_in_place_are_kept() -> None:
    """Rewrapping between two micro-batches: gradients so far are added to, with views into buckets or without."""
    for view in (False, True):
        sums = []
        for again in (False, True):
            ddp = DDP(net(), gradient_as_bucket_view=view)
            ddp(batch(0)).square().mean().backward()
            if again:
                ddp = rewrap(ddp)
            ddp(batch(1)).square().mean().backward()
            sums.append([p.grad.clone() for p in ddp.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True)), view


def check_the_old_wrapper_is_retired() -> None:
    old = frozen_then_unfrozen()
    new = rewrap(old)
    with raises(RuntimeError, "replaced by rewrap"):
        old(batch(0))
    with raises(ValueError, "replaced already"):
        rewrap(old)
    new(batch(0)).sum().backward()


def check_what_cannot_be_rebuilt_is_refused() -> None:
    with raises(TypeError, "must be a DistributedDataParallel, got Sequential"):
        rewrap(net())
    with raises(TypeError, "_orig_mod"):
        rewrap(torch.compile(DDP(net())))
    ddp = DDP(net())
    with ddp.no_sync(), raises(ValueError, "no_sync"):
        rewrap(ddp)
    joined = DDP(net())
    with joined.join(), raises(ValueError, "join()"):
        rewrap(joined)
    ddp.module.requires_grad_(False)
    with raises(ValueError, "nothing in it is trainable", "ddp.module"):
        rewrap(ddp)
    ddp.module.requires_grad_(True)
    ddp(batch(0)).sum().backward()  # a refusal changes nothing
    with raises(ValueError, "mixed_precision"):
        # Set afterwards: a torch with CUDA makes a stream for it, and fails where there is no GPU.
        ddp.mixed_precision = _MixedPrecision(param_dtype=torch.float32, buffer_dtype=torch.float32)
        rewrap(ddp)


def check_nothing_is_broadcast_unless_asked() -> None:
    for sync in (False, True):
        ddp = DDP(net())
        with torch.no_grad():
            ddp.module[0].weight += dist.get_rank()
        new = rewrap(ddp, sync=sync)
        if sync:
            same_on_all_ranks(parameters(new.module))
        else:
            with raises(AssertionError, "0.weight differs"):
                same_on_all_ranks(parameters(new.module))


def check_freezeout() -> None:
    """A schedule rewraps at each stage change, and every rank ends with the same bits."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = FreezeOut(DDP(model), 0.4, 6, stages=2, optimizer=optimizer)
    changes = []
    held: dict[str, torch.Tensor] = {}
    for step in range(6):
        train(schedule.model, optimizer, range(step, step + 1))
        assert all(torch.equal(model.state_dict()[n], v) for n, v in held.items()), "a frozen tensor moved"
        change = schedule.step()
        if "0" in change.frozen:  # with its batch norm, statistics included
            held = {n: v.clone() for n, v in model.state_dict().items() if n[0] in "01"}
        assert change.rewrapped == bool(change)
        changes.append(change.frozen)
    assert [c for c in changes if c] == [("0",), ("3",)]
    same_on_all_ranks(parameters(model))
    fresh = DDP(net())
    resumed = FreezeOut(fresh, 0.4, 6, stages=2)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.model is not fresh
    assert not mismatch(resumed.model)


def check_update_norm_freezes_and_thaws() -> None:
    model = net()
    rates = {0: 1e-9, 1: 1e-9, 3: 0.1, 4: 0.1}
    optimizer = torch.optim.SGD([{"params": model[i].parameters(), "lr": lr} for i, lr in rates.items()])
    schedule = UpdateNorm(DDP(model), optimizer, 1e-6, every=1, thaw_after=1, max_changes=None)
    seen: list[Any] = []
    for step in range(4):
        train(schedule.model, optimizer, range(step, step + 1))
        change = schedule.step()
        seen.append((change.frozen, change.thawed))
    assert seen == [(("0",), ()), ((), ("0",)), (("0",), ()), ((), ("0",))], seen
    same_on_all_ranks(parameters(model))
    every: list[Any] = [None, None]
    dist.all_gather_object(every, schedule.history)
    assert every[0] == every[1]


def check_a_compiled_wrapper_is_refused_by_schedules() -> None:
    with raises(ValueError, "compile inside DDP"):
        FreezeOut(torch.compile(DDP(net())), 0.5, 10)
    inside = DDP(torch.compile(net(), backend="eager"))
    schedule = FreezeOut(inside, 0.5, 4, stages=1)
    optimizer = torch.optim.SGD(inside.parameters(), lr=0.1)
    for step in range(4):
        train(schedule.model, optimizer, range(step, step + 1))
        schedule.step()
    same_on_all_ranks(parameters(schedule.model.module))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(globals())
