"""Do the ranks agree on what is frozen?"""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist
from torch import nn

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
