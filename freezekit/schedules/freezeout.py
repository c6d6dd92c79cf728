"""FreezeOut: freeze layers first to last, each at a time fixed beforehand.

After Brock, Lim, Ritchie and Weston, "FreezeOut: Accelerate Training by Progressively Freezing Layers"
(arXiv 1706.04983). With time t running from 0 to 1 over the training and L layers, layer i = 0 .. L-1 trains until

    t_i = t0 + (1 - t0) i / (L - 1)     (linear)
    t_i = (t0 + (1 - t0) i / (L - 1))^3     (cubic: t0 is the value before it is cubed)

and its learning rate, if the schedule sets it, falls to zero there: lr_i(t) = lr_i(0) (1 + cos(pi t / t_i)) / 2, with
lr_i(0) = lr, or lr / t_i when scaled.
"""

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import nn

from freezekit._arguments import check_choice, check_count, check_flag, check_module, check_real, shown
from freezekit.distributed.watching import unwrapped

from .base import Change, Schedule, compile_entries
from .layers import layers_of, tensors
from .timetable import Timetable

How = Literal["linear", "cubic"]


def freeze_times(layers: int, t0: float, how: How) -> list[float]:
    """The t_i above, each in (0, 1]; the last is 1.

    >>> freeze_times(3, 0.5, "linear"), freeze_times(3, 0.5, "cubic")
    ([0.5, 0.75, 1.0], [0.125, 0.421875, 1.0])
    """
    linear = [t0 + (1 - t0) * i / (layers - 1) for i in range(layers)]
    return [t**3 for t in linear] if how == "cubic" else linear


class FreezeOut(Schedule):
    """Freeze the layers of a model first to last, in a few stages.

    Call `step` once after each ``optimizer.step()``. The layers but the last are cut into ``stages`` runs of nearly
    equal length; a run is frozen at the t_i of its last layer, so none is frozen earlier than the paper has it.

    Args:
        model: the model; under DDP use ``schedule.model`` after a change (see `Schedule`).
        t0: when the first layer is frozen, as a share of the training, above 0 and at most 1. With ``how="cubic"``
            the value before it is cubed, as in the paper.
        total_steps: length of the training, in steps.
        how: spacing of the times, ``"linear"`` or ``"cubic"``.
        stages: how many times something is frozen; None for once per layer. Each costs torch.compile a recompilation:
            three, with a validation pass under no_grad, just fit its limit of 8 versions.
        optimizer: needed for ``remove``, ``state`` and ``anneal``.
        layers: the modules to treat as layers, in forward order: names, globs, classes; by default see `layers_of`.
        anneal: set the learning rate of each layer as above. Every group of the optimizer must then hold parameters of
            one layer only (`FreezeOut.param_groups` makes such groups), and no other scheduler may set them.
        scale_lr: with ``anneal``, start layer i at lr / t_i.
        remove, state: as for `freezekit.freezing.freeze`.

    Raises:
        ValueError: an argument out of range, fewer than two layers, or groups that ``anneal`` cannot use.
        TypeError: an argument of the wrong type.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
        >>> schedule = FreezeOut(model, 0.5, 4)
        >>> [schedule.step().frozen for _ in range(4)]
        [(), ('0',), ('1',), ()]
    """

    def __init__(
        self,
        model: nn.Module,
        t0: float,
        total_steps: int,
        how: How = "linear",
        stages: int | None = 3,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        layers: Sequence[Any] | None = None,
        anneal: bool = False,
        scale_lr: bool = False,
        remove: bool = False,
        state: Literal["keep", "reset"] = "keep",
    ) -> None:
        super().__init__(model, optimizer, layers, remove, state)
        check_flag("anneal", anneal)
        check_flag("scale_lr", scale_lr)
        _check(t0, total_steps, how, stages, len(self.layers))
        if scale_lr and not anneal:
            raise ValueError("scale_lr=True needs anneal=True: it scales the rate that anneal sets")
        self.t0, self.total_steps, self.how, self.stages = t0, total_steps, how, stages
        self.scale_lr = scale_lr
        self.times = dict(zip((x.name for x in self.layers), freeze_times(len(self.layers), t0, how), strict=True))
        self._freeze_at = self._quantise()
        self._groups = self._group_layers() if anneal else []
        self._base = [float(group["lr"]) for _, group in self._annealed()]
        self._set_rates()

    @staticmethod
    def param_groups(model: nn.Module, lr: float, layers: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        """Optimizer groups of one layer each, for ``anneal=True``."""
        check_module(model)
        if not isinstance(lr, torch.Tensor):
            check_real("lr", lr)
        inner = unwrapped(model)
        return [{"params": tensors(inner, layer), "lr": lr} for layer in layers_of(inner, layers)]

    def _quantise(self) -> dict[str, int]:
        """Layer -> number of steps after which it is frozen; the last layer, and what falls on the end, is left out."""
        names = [layer.name for layer in self.layers[:-1]]
        stages = len(names) if self.stages is None else min(self.stages, len(names))
        at = {}
        for s in range(stages):
            run = names[s * len(names) // stages : (s + 1) * len(names) // stages]
            # Rounded first: (0.2 + 0.8 * 0.5) * 10 is 6.000000000000001.
            when = math.ceil(round(self.times[run[-1]] * self.total_steps, 6))
            if when < self.total_steps:
                at.update(dict.fromkeys(run, when))
        return at

    def step(self) -> Change:
        """Count one step; freeze what is due and set the learning rates of the next step."""
        self.steps += 1
        change = self._set(name for name, when in self._freeze_at.items() if self.steps >= when)
        self._set_rates()
        return change

    def compile_entries(self, *, validation: bool = True) -> int:
        """Versions that torch.compile makes over the whole training, validation under ``no_grad`` counted or not."""
        return compile_entries(len(set(self._freeze_at.values())), validation=validation)

    def lr_factor(self, layer: str, step: int) -> float:
        """Learning rate of a layer at a step, as a multiple of its group's initial one."""
        if not isinstance(layer, str) or layer not in self.times:
            raise ValueError(f"layer must be one of {', '.join(map(repr, self.times))}, got {shown(layer)}")
        check_real("step", step)
        end = self.times[layer] * self.total_steps
        if step >= end:
            return 0.0
        return (1 + math.cos(math.pi * step / end)) / 2 / (self.times[layer] if self.scale_lr else 1.0)

    def plan(self) -> Timetable:
        """The whole schedule beforehand: prints as a table, plots as a picture. Nothing is frozen."""
        inner = unwrapped(self.model)
        samples = [round(self.total_steps * i / 100) for i in range(101)]
        curves = {x.name: [(float(s), self.lr_factor(x.name, s)) for s in samples] for x in self.layers}
        return Timetable(
            title=f"FreezeOut, {self.how}, t0 = {self.t0:g}",
            total_steps=self.total_steps,
            sizes={x.name: sum(p.numel() for p in tensors(inner, x)) for x in self.layers},
            spans={name: ((when, self.total_steps),) for name, when in self._freeze_at.items()},
            curves=curves if self._groups else {},
            curves_label="learning rate / initial",
        )

    def _config(self) -> dict[str, Any]:
        more = {"t0": self.t0, "total_steps": self.total_steps, "how": self.how, "stages": self.stages}
        return {**super()._config(), **more, "anneal": bool(self._groups), "scale_lr": self.scale_lr}

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: plain data."""
        return {**super().state_dict(), "base_lrs": list(self._base)}

    def _misfits(self, state: dict[str, Any]) -> Iterator[tuple[str, str]]:
        yield from super()._misfits(state)
        rates = state["base_lrs"]
        real = isinstance(rates, list) and all(isinstance(rate, Real) for rate in rates)
        if not real or len(rates) != len(self._base):
            yield "base_lrs", f"a list of {len(self._base)} learning rates"

    def load_state_dict(self, state: dict[str, Any]) -> Change:
        change = super().load_state_dict(state)
        self._base = list(state["base_lrs"])
        self._set_rates()
        return change

    def _group_layers(self) -> list[str]:
        """The layer of each group of the optimizer."""
        if self.optimizer is None:
            raise ValueError("anneal=True sets learning rates and needs an optimizer, got None")
        inner = unwrapped(self.model)
        owner = {id(p): layer.name for layer in self.layers for p in tensors(inner, layer)}
        found = []
        for i, group in enumerate(self.optimizer.param_groups):
            names = {owner.get(id(p)) for p in group["params"]}
            if len(names) != 1 or None in names:
                held = sorted(n or "(no scheduled layer)" for n in names)
                raise ValueError(f"anneal=True: group {i} of the optimizer must hold one layer, has {held}; build the "
                                 "optimizer from FreezeOut.param_groups(model, lr)")  # fmt: skip
            found.append(str(names.pop()))
        return found

    def _annealed(self) -> list[tuple[str, dict[str, Any]]]:
        """The groups whose rate the schedule sets, each with its layer."""
        return list(zip(self._groups, self.optimizer.param_groups)) if self.optimizer else []

    def _set_rates(self) -> None:
        for base, (layer, group) in zip(self._base, self._annealed()):
            rate = base * self.lr_factor(layer, self.steps)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _check(t0: float, total_steps: int, how: str, stages: int | None, layers: int) -> None:
    check_real("t0", t0)
    if not 0 < t0 <= 1:
        raise ValueError(f"t0 must be above 0 and at most 1, got {t0}")
    check_count("total_steps", total_steps)
    check_choice("how", how, "linear", "cubic")
    if stages is not None:
        check_count("stages", stages)
    if layers < 2:
        raise ValueError(f"FreezeOut needs at least two layers, got {layers}")
