"""What `freeze` and `unfreeze` refuse before they change anything."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from freezekit._arguments import check_choice, check_flag, shown
from freezekit.freezing.optim import strangers
from freezekit.freezing.wrapping import optimizers_of, several


def check_optimizers(optimizer: object, remove: bool, state: str, group: int | None = None) -> tuple[Optimizer, ...]:
    """One optimizer, several or none as a tuple; refuses arguments that contradict each other."""
    check_choice("state", state, "keep", "reset")
    check_flag("remove", remove)
    inner = [inner for one in several(optimizer) for inner in optimizers_of(one, to_change=True, whole=optimizer)]
    given = tuple({id(one): one for one in inner}.values())
    if not given:
        for name, used in (("remove=True", remove), ('state="reset"', state == "reset"), ("group", group is not None)):
            if used:
                raise ValueError(f"{name} changes an optimizer, but there is none; pass optimizer=")
    if group is not None:
        if len(given) > 1:
            raise ValueError(f"group: an index into one of {len(given)} optimizers is ambiguous; pass the one it is of")
        groups = len(given[0].param_groups)
        if not isinstance(group, int) or isinstance(group, bool) or not 0 <= group < groups:
            raise ValueError(f"group must be an index from 0 to {groups - 1}, got {shown(group)}")
    return given


def check_flags(params: Mapping[str, nn.Parameter], frozen: bool) -> None:
    """Refuse what ``requires_grad`` cannot be set of, before anything is changed."""
    for name, param in params.items():
        if not param.is_leaf:
            raise ValueError(
                f"model: {name!r} cannot be {'frozen' if frozen else 'unfrozen'}, since a computation put it in the "
                "place of a parameter; name what it is computed from"
            )
        if not frozen and not is_lazy(param) and param.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"model: {name!r} cannot train, since it was made under torch.inference_mode(); build the model outside"
            )


def check_lbfgs(optimizer: Optimizer, params: list[nn.Parameter], verb: str, ready: bool) -> None:
    """LBFGS keeps one history over all its parameters, as one flat vector, and adds to every one at each step: half of
    that history cannot be kept, and a parameter that stays in the group is written to."""
    if ready or not isinstance(optimizer, LBFGS) or len(strangers(optimizer, params)) == len(params):
        return
    extra = "remove=True, " if verb == "freeze" else ""
    raise ValueError(
        "optimizer: LBFGS keeps one history over all its parameters and writes to every one of them at each step; "
        f'to {verb} some of them pass {extra}state="reset", which clears its history'
    )


def check_norm(norm: object) -> None:
    check_choice("norm", norm, "freeze", "batch")
