"""Build a new DistributedDataParallel wrapper with the settings of the old one."""

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from freezekit._arguments import check_module


def check_ranks(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank when the ranks do not agree on which parameters are trainable. Collective.

    Args:
        model: the same model on every rank (DDP, FSDP2 or plain).
        process_group: the ranks to ask; by default all.

    Raises:
        RuntimeError: names up to eight parameters that are trainable on some ranks only.
    """
    check_module(model)
    mine = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    digest = hashlib.sha256("\n".join(mine).encode()).hexdigest()
    size = dist.get_world_size(process_group)
    digests: list[Any] = [None] * size
    dist.all_gather_object(digests, digest, group=process_group)
    if len(set(digests)) == 1:
        return
    lists: list[Any] = [None] * size
    dist.all_gather_object(lists, mine, group=process_group)
    everywhere = set.intersection(*map(set, lists))
    differ = sorted(set.union(*map(set, lists)) - everywhere)
    shown = ", ".join(f"{n} (ranks {[r for r in range(size) if n in lists[r]]})" for n in differ[:8])
    raise RuntimeError(
        f"the ranks disagree on what is frozen: {len(differ)} parameter(s) are trainable on some ranks only: {shown}. "
        "Freeze and unfreeze the same parameters on every rank"
    )


# Attributes of a wrapper that are constructor arguments of the same name.
_SAME = (
    "device_ids",
    "output_device",
    "dim",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "skip_all_reduce_unused_params",
    "batched_grad_copy",
)
_RETIRED = "_freezekit_retired"
# Hooks whose state is laid out after the buckets of one reducer.
_BUCKET_STATES = ("PowerSGDState",)


def check_ddp(ddp: object) -> None:
    """Raises TypeError unless ``ddp`` is a DDP wrapper."""
    if not isinstance(ddp, DDP):
        cure = "pass its _orig_mod and compile the result again" if hasattr(ddp, "_orig_mod") else "pass the wrapper"
        raise TypeError(f"ddp must be a DistributedDataParallel, got {type(ddp).__name__}; {cure}")


def retired(ddp: DDP) -> bool:
    """Whether `rewrap` replaced this wrapper."""
    return getattr(ddp, _RETIRED, False)


def _refuse_retired(ddp: nn.Module, args: Any) -> None:
    raise RuntimeError("this DDP wrapper was replaced by rewrap and reduces nothing: use the new one")


def syncs_buffers(ddp: DDP) -> bool:
    """Whether DDP overwrites buffers with rank 0's at each forward pass (renamed in torch 2.13)."""
    return ddp.forward_sync_buffers if hasattr(ddp, "forward_sync_buffers") else ddp.broadcast_buffers


def sync_buffers(ddp: DDP) -> None:
    """Give every rank rank 0's buffers now, as DDP's next forward pass would. Collective.

    Each rank's running statistics are its own after a forward pass in train mode. Call this before freezing: a frozen
    statistic would else move once on every rank but the first. Does nothing when DDP does not synchronise buffers.
    """
    check_ddp(ddp)
    if not syncs_buffers(ddp):
        return
    source = dist.get_global_rank(ddp.process_group, 0)
    with torch.no_grad():
        for name, buffer in ddp.module.named_buffers():
            if name not in ddp.parameters_to_ignore:
                dist.broadcast(buffer, source, ddp.process_group)


def _settings(ddp: DDP) -> dict[str, Any]:
    """Constructor arguments that give the same wrapper, among those that this torch knows."""
    known = inspect.signature(DDP.__init__).parameters
    settings = {name: getattr(ddp, name) for name in _SAME if name in known and hasattr(ddp, name)}
    if hasattr(ddp, "device_mesh"):
        settings["device_mesh"] = ddp.device_mesh
    else:
        settings["process_group"] = ddp.process_group
    if "forward_sync_buffers" in known:
        settings["forward_sync_buffers"] = syncs_buffers(ddp)
    else:
        settings["broadcast_buffers"] = syncs_buffers(ddp)
    mib = 1024 * 1024
    caps = [cap / mib for cap in getattr(ddp, "bucket_bytes_cap_list", None) or []]
    if caps and "bucket_cap_mb_list" in known:
        settings["bucket_cap_mb_list"] = caps
    elif not ddp.bucket_bytes_cap_default:
        settings["bucket_cap_mb"] = ddp.bucket_bytes_cap / mib
    return settings


def _refuse(ddp: DDP) -> None:
    """Raise ValueError for a wrapper that cannot be rebuilt faithfully."""
    why = None
    check_ddp(ddp)
    if retired(ddp):
        why = "it was replaced already; rewrap the wrapper that replaced it"
    elif ddp.mixed_precision is not None:
        why = "DDP's mixed_precision leaves hooks and copies on the module that a second wrapper would double"
    elif ddp._delay_all_reduce_params:
        why = "delay_all_reduce_named_params is set: its hooks on parameters cannot be taken over"
    elif ddp._use_python_reducer:
        why = "the Python reducer (torch._dynamo.config.optimize_ddp) leaves hooks on the parameters"
    elif any(hasattr(p, "_in_backward_optimizers") for p in ddp.module.parameters()):
        why = "an optimizer runs in its backward: its hooks cannot be taken over"
    elif not ddp.require_backward_grad_sync:
        why = "it is inside no_sync(), and gradients not reduced yet would be lost"
    elif ddp._join_config.enable:
        why = "it is or was inside join(), which stays switched on in it: build the new wrapper yourself"
    elif not any(p.requires_grad for p in ddp.module.parameters()):
        why = "nothing in it is trainable, and DDP refuses that: use ddp.module without a wrapper"
    if why:
        raise ValueError(f"this wrapper cannot be rebuilt: {why}")


def _comm_hooks(ddp: DDP, given: Sequence[tuple[Any, Any]] | None) -> list[tuple[Any, Any]]:
    """The (hook, state) pairs to register on the new wrapper."""
    if given is not None:
        return list(given)
    for hook, state in ddp._comm_hooks:
        if type(state).__name__ in _BUCKET_STATES:
            raise ValueError(
                f"the state of comm hook {hook.__name__} is a {type(state).__name__}, laid out after the old buckets: "
                "pass comm_hooks=[(hook, new_state)], or comm_hooks=[] to drop it"
            )
    return list(ddp._comm_hooks)


def _carry(old: DDP, new: DDP, comm_hooks: Sequence[tuple[Any, Any]], builtin: str | None) -> None:
    """Hand over what is not a constructor argument: mode, hooks, and attributes that the user set."""
    for hook, state in comm_hooks:
        new.register_comm_hook(state, hook)
    if builtin is not None:
        new._register_builtin_comm_hook(getattr(dist.BuiltinCommHookType, builtin))
    if hasattr(old, "buffer_hook"):
        b = old.buffer_hook
        new._register_buffer_comm_hook(b.buffer_comm_hook_state, b.buffer_comm_hook, b.buffer_comm_hook_location)
    new.training = old.training
    new._ddp_sink_clone = old._ddp_sink_clone
    for name, value in vars(old).items():
        if name.endswith("_hooks") or "_hooks_" in name:
            if name != "_comm_hooks" and name in vars(new) and isinstance(value, dict):
                vars(new)[name].update(value)
        elif not name.startswith("_") and name not in vars(new) and name != "buffer_hook":
            setattr(new, name, value)


def _builtin_hook(ddp: DDP) -> str | None:
    """Name of the built-in communication hook, which only the logger knows."""
    if ddp._comm_hooks:
        return None
    name = str(ddp._get_ddp_logging_data().get("comm_hook")).removeprefix("BuiltinCommHookType.")
    return name if name in dist.BuiltinCommHookType.__members__ else None


def rewrap(ddp: DDP, *, comm_hooks: Sequence[tuple[Any, Any]] | None = None, sync: bool = False) -> DDP:
    """A new wrapper around ``ddp.module`` that reduces what is trainable now, with the settings of the old one.

    To be called on every rank after freezing or unfreezing, between two iterations. Carried over: device_ids,
    output_device, process group, find_unused_parameters, static_graph, bucket sizes, gradient_as_bucket_view, buffer
    broadcasting, communication hooks, module hooks, train mode, and attributes set on the wrapper. Parameters stay the
    same objects, so optimizers are not concerned. The old wrapper stops reducing, and refuses to run.

    Args:
        ddp: the wrapper to replace.
        comm_hooks: ``(hook, state)`` pairs to register instead of the old ones; needed when a state belongs to the old
            buckets (PowerSGD).
        sync: broadcast parameters from rank 0, as a new DDP does. Off by default, because equal ranks need no
            communication and unequal ones should not be covered up. Buffers are, if DDP synchronises them at all
            (see `sync_buffers`).

    Returns:
        The new wrapper.

    Raises:
        TypeError: ``ddp`` is not a DDP wrapper.
        ValueError: it cannot be rebuilt with all its settings (the message says which); nothing was changed.
        RuntimeError: the ranks disagree on what is trainable.
    """
    _refuse(ddp)
    hooks = _comm_hooks(ddp, comm_hooks)
    builtin = _builtin_hook(ddp) if comm_hooks is None else None
    settings = _settings(ddp)
    check_ranks(ddp.module, ddp.process_group)
    sync_buffers(ddp)
    ddp._remove_autograd_hooks()
    new = type(ddp)(ddp.module, init_sync=sync, **settings)
    _carry(ddp, new, hooks, builtin)
    setattr(ddp, _RETIRED, True)
    ddp.register_forward_pre_hook(_refuse_retired, prepend=True)
    return new
