"""Checks of what is wrapped around the model: DistributedDataParallel, FSDP1, torch.compile."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from freezekit import distributed
from freezekit.distributed.watching import waits_for_frozen

from .report import Finding, about
from .subject import Subject, all_frozen

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"
_DYNAMO = "torch._dynamo.eval_frame"


def _instances(subject: Subject, module: str, cls: str) -> Iterator[tuple[str, Any]]:
    """The model's modules of a class that is heavy to import: if nothing has imported it, there are none."""
    loaded = sys.modules.get(module)
    kind = getattr(loaded, cls, None)
    if kind is not None:
        yield from ((name, m) for name, m in subject.modules() if isinstance(m, kind))


def check_ddp(subject: Subject) -> Iterator[Finding]:
    """Parameters frozen or unfrozen after DDP had decided which gradients to reduce."""
    for name, ddp in distributed.wrappers(subject.model):
        found = distributed.mismatch(ddp)
        yield from about(
            found.unfrozen,
            "ddp-unfrozen",
            "error",
            f"{len(found.unfrozen)} parameter(s) became trainable after DDP wrapped {name or '(root)'}: their "
            "gradients are not reduced, and the ranks diverge without a word",
            "ddp = freezekit.distributed.rewrap(ddp)",
        )
        if found.frozen:
            fatal = waits_for_frozen(ddp)
            yield from about(
                found.frozen,
                "ddp-frozen",
                "error" if fatal else "info",
                f"{len(found.frozen)} parameter(s) were frozen after DDP wrapped {name or '(root)'}: "
                + ("DDP waits for their gradients, and the next iteration raises" if fatal
                   else "find_unused_parameters copes with it, at the cost of a graph walk per iteration"),
                "ddp = freezekit.distributed.rewrap(ddp)",
            )  # fmt: skip
        if found.unnamed:
            yield Finding(
                "ddp-stale", "error", name or "(root)", found.unnamed, "ddp = freezekit.distributed.rewrap(ddp)"
            )


def check_fsdp1(subject: Subject) -> Iterator[Finding]:
    """FSDP1 keeps one flat tensor per unit: part of it cannot be frozen."""
    for name, unit in _instances(subject, _FSDP1, "FullyShardedDataParallel"):
        handle = getattr(unit, "_handle", None)
        flat = getattr(handle, "flat_param", None)
        originals = getattr(flat, "_params", None)
        if flat is None or not originals:
            continue
        fqns = getattr(flat, "_fqns", ())
        frozen = tuple(n for n, p in zip(fqns, originals, strict=False) if not p.requires_grad)
        if frozen and flat.requires_grad:
            yield from about(
                frozen,
                "fsdp1-mixed",
                "warning",
                f"{len(frozen)} of {len(originals)} parameters in the FSDP1 unit {name} are frozen: the unit is one "
                "flat tensor, so gradients are computed, kept and reduced for all of it",
                "wrap frozen and trainable layers in units of their own before training, or use FSDP2 (fully_shard)",
            )


def _entries(module: nn.Module) -> int:
    """How many compiled versions torch.compile holds of the forward of the module's class.

    0 for torch's own containers such as Sequential: all of those share one frame of torch.compile's.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    return len(_debug_get_cache_entry_list(type(module).forward.__code__))


def check_compile(subject: Subject) -> Iterator[Finding]:
    """Compiled modules at their limit: each set of frozen parameters is a compiled version of its own."""
    compiled = [(n, m._orig_mod) for n, m in _instances(subject, _DYNAMO, "OptimizedModule")]
    compiled += [(n, m) for n, m in subject.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    if not compiled:
        return
    limit = torch._dynamo.config.recompile_limit
    for name, module in compiled:
        held = _entries(module)
        if held >= limit:
            yield Finding(
                "recompile-limit",
                "warning",
                name,
                f"torch.compile holds {held} versions of its forward, its limit ({limit}): the next change of what is "
                "frozen, of grad mode or of train mode runs uncompiled",
                "freeze in fewer stages, call torch._dynamo.reset() at a stage change, or raise "
                "torch._dynamo.config.recompile_limit",
                (name,),
            )
    if subject.schedule is not None:
        entries = subject.schedule.compile_entries()
        if entries > limit:
            yield from about(
                [name for name, _ in compiled],
                "recompile-limit",
                "warning",
                f"the schedule needs {entries} compiled versions (each stage once in training and once under no_grad), "
                f"and torch.compile stops at {limit}: later stages run uncompiled",
                "use fewer stages, call torch._dynamo.reset() at a stage change, or raise "
                "torch._dynamo.config.recompile_limit",
            )


# Stock layers whose weight autocast casts to the low-precision dtype.
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def check_autocast(subject: Subject) -> Iterator[Finding]:
    """Under autocast, frozen float32 weights of stock layers are cast again at every call."""
    found = []
    for name, module in subject.modules():
        if type(module) in _CAST and all_frozen(module):
            weight = module.weight
            device = weight.device.type
            if weight.dtype == torch.float32 and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
                found.append(name)
    yield from about(
        found,
        "autocast-cast",
        "info",
        f"autocast casts the frozen weights of {len(found)} layer(s) at every call: its cache holds only weights "
        "that require grad",
        "convert the model with freezekit, or store these weights in the low-precision dtype",
    )
