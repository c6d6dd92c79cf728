"""UpdateNorm: freeze any layer that has stopped moving, and let it try again later."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from freezekit._arguments import check_count, check_flag, check_real
from freezekit.distributed.watching import unwrapped

from .base import Change, Schedule, compile_entries, is_count
from .layers import Layer, as_float, tensors
from .timetable import Timetable


class UpdateNorm(Schedule):
    """Freeze layers, wherever they are, whose relative update is small.

    Every ``every`` steps the relative update of each layer that trains is measured,

        ||w_now - w_then|| / (every ||w_then||),

    the mean change per step as a share of the weights. A layer below ``threshold`` for ``patience`` measurements in a
    row is frozen. Call `step` once after each ``optimizer.step()``. It keeps one copy of the parameters that train.

    The ranks of a DDP or FSDP2 training measure the same numbers, so they decide alike.

    Args:
        model: the model; under DDP use ``schedule.model`` after a change (see `Schedule`).
        optimizer: the optimizer that steps it.
        threshold: relative update per step below which a layer counts as still; above 0.
        every: steps between two measurements.
        patience: how many measurements in a row must be below.
        thaw_after: a frozen layer is unfrozen after so many measurements, and must show again that it is still; None
            never thaws.
        max_changes: how many times the set of frozen layers may change; None for any. Each change costs torch.compile a
            recompilation: three, with a validation pass under no_grad, just fit its limit of 8 versions.
        layers: the modules to treat as layers: names, globs, classes; by default see `layers_of`.
        dry_run: measure and decide, and freeze nothing; `plan` then shows what would have been done.
        remove, state: as for `freezekit.freezing.freeze`.

    Raises:
        ValueError: an argument out of range, or no layer that trains.
        TypeError: an argument of the wrong type.

    The last layer that still trains is never frozen: of all that could be, the one that moves most stays.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> opt = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0}, {"params": model[1].parameters()}], 0.1)
        >>> schedule = UpdateNorm(model, opt, threshold=1e-4, every=1)
        >>> model(torch.ones(1, 2)).sum().backward(); opt.step(); schedule.step().frozen
        ('0',)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        threshold: float,
        *,
        every: int = 100,
        patience: int = 1,
        thaw_after: int | None = None,
        max_changes: int | None = 3,
        layers: Sequence[Any] | None = None,
        dry_run: bool = False,
        remove: bool = False,
        state: Literal["keep", "reset"] = "keep",
    ) -> None:
        super().__init__(model, optimizer, layers, remove, state)
        if self.optimizer is None:
            raise TypeError("optimizer must be a torch.optim.Optimizer, got None")
        check_flag("dry_run", dry_run)
        check_real("threshold", threshold)
        if not threshold > 0:
            raise ValueError(f"threshold must be above 0, got {threshold}")
        counts = {"every": every, "patience": patience}
        counts |= {name: n for name, n in (("thaw_after", thaw_after), ("max_changes", max_changes)) if n is not None}
        for name, count in counts.items():
            check_count(name, count)
        self.threshold, self.every, self.patience = threshold, every, patience
        self.thaw_after, self.max_changes, self.dry_run = thaw_after, max_changes, dry_run
        self.changes: list[Change] = []
        self.history: list[tuple[int, dict[str, float]]] = []
        self._held: set[str] = set()  # frozen by decision; in a dry run nothing is frozen in fact
        self._below: dict[str, int] = {}
        self._age: dict[str, int] = {}
        self._then: dict[str, torch.Tensor] = {}
        self._remember()

    def step(self) -> Change:
        """Count one step; at every ``every``-th, measure, and freeze or thaw what the rule says."""
        self.steps += 1
        if self.steps % self.every:
            return Change(self.steps)
        measured = {x.name: self._relative_update(x) for x in self.layers if x.parameters[0] in self._then}
        self.history.append((self.steps, measured))
        wanted = self._decide(measured)
        change = Change(self.steps)
        if wanted != self._held:
            change = self._change(wanted)
        self._remember()
        return change

    def _change(self, wanted: set[str]) -> Change:
        names = [x.name for x in self.layers]
        frozen = tuple(n for n in names if n in wanted - self._held)
        thawed = tuple(n for n in names if n in self._held - wanted)
        self._held = wanted
        decided = Change(self.steps, frozen, thawed)
        self.changes.append(decided)
        for name in (*frozen, *thawed):
            self._below[name] = self._age[name] = 0
        # In a dry run the caller is told of no change, since there is none.
        return Change(self.steps) if self.dry_run else self._set(wanted)

    def _decide(self, measured: dict[str, float]) -> set[str]:
        """The layers that should be frozen after this measurement."""
        for name in self._held:
            self._age[name] = self._age.get(name, 0) + 1
        live = {n: u for n, u in measured.items() if n not in self._held}
        for name, update in live.items():
            self._below[name] = self._below.get(name, 0) + 1 if update < self.threshold else 0
        if self.max_changes is not None and len(self.changes) >= self.max_changes:
            return set(self._held)
        thaw = {n for n in self._held if self.thaw_after is not None and self._age[n] >= self.thaw_after}
        still = {n for n in live if self._below[n] >= self.patience}
        wanted = (self._held - thaw) | still
        if len(wanted) == len(self.layers):
            wanted.discard(max(still, key=lambda n: live[n]))
        return wanted

    def _relative_update(self, layer: Layer) -> float:
        inner = unwrapped(self.model)
        moved = weight = 0.0
        for name in layer.parameters:
            now, then = inner.get_parameter(name).detach(), self._then[name]
            moved += as_float((now - then).float().norm()) ** 2
            weight += as_float(then.float().norm()) ** 2
        if moved == 0.0:
            return 0.0
        return math.sqrt(moved / weight) / self.every if weight else math.inf

    def _remember(self) -> None:
        """Copy the parameters that train, to measure the next update against."""
        inner = unwrapped(self.model)
        live = [x for x in self.layers if self.dry_run or x.name not in self._held]
        self._then = {
            name: p.detach().clone() for x in live for name, p in zip(x.parameters, tensors(inner, x), strict=True)
        }

    def compile_entries(self, *, validation: bool = True) -> int:
        """Versions that torch.compile makes if all changes are used; so far, when ``max_changes`` is None."""
        changes = len(self.changes) if self.max_changes is None else self.max_changes
        return compile_entries(changes, validation=validation)

    def plan(self) -> Timetable:
        """What was decided so far, and the relative updates it rests on: prints as a table, plots as a picture."""
        inner = unwrapped(self.model)
        spans: dict[str, list[tuple[int, int]]] = {}
        since: dict[str, int] = {}
        for change in self.changes:
            since.update(dict.fromkeys(change.frozen, change.step))
            for name in change.thawed:
                spans.setdefault(name, []).append((since.pop(name), change.step))
        for name, start in since.items():
            spans.setdefault(name, []).append((start, self.steps + 1))
        curves: dict[str, list[tuple[float, float]]] = {x.name: [] for x in self.layers}
        for step, measured in self.history:
            for name, update in measured.items():
                curves[name].append((float(step), update))
        return Timetable(
            title=f"UpdateNorm, threshold {self.threshold:g}" + (", dry run" if self.dry_run else ""),
            total_steps=self.steps + 1,
            sizes={x.name: sum(p.numel() for p in tensors(inner, x)) for x in self.layers},
            spans={name: tuple(found) for name, found in spans.items()},
            curves=curves,
            curves_label="relative update per step",
            threshold=self.threshold,
        )

    def _config(self) -> dict[str, Any]:
        names = ("threshold", "every", "patience", "thaw_after", "max_changes", "dry_run")
        return {**super()._config(), **{name: getattr(self, name) for name in names}}

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, with the copy of the parameters that the next measurement needs."""
        mine = {
            "held": sorted(self._held),
            "below": dict(self._below),
            "age": dict(self._age),
            "then": {name: value.clone() for name, value in self._then.items()},
            "changes": [(c.step, list(c.frozen), list(c.thawed)) for c in self.changes],
            "history": [(step, dict(measured)) for step, measured in self.history],
        }
        return {**super().state_dict(), **mine}

    def _misfits(self, state: dict[str, Any]) -> Iterator[tuple[str, str]]:
        yield from super()._misfits(state)
        if not self._are_layers(state["held"], list):
            yield "held", "a list of layers"
        for key in ("below", "age"):
            if not self._are_layers(state[key], dict) or not all(map(is_count, state[key].values())):
                yield key, "a count for each layer"
        shapes = {name: value.shape for name, value in unwrapped(self.model).named_parameters()}
        then = state["then"]
        if not isinstance(then, dict) or not all(
            isinstance(value, torch.Tensor) and shapes.get(name) == value.shape for name, value in then.items()
        ):
            yield "then", "the model's parameters as they were"
        for key, wanted, kinds in (
            ("changes", "a list of (step, frozen, thawed)", (int, list, list)),
            ("history", "a list of (step, relative updates)", (int, dict)),
        ):
            entries = state[key]
            if not isinstance(entries, list) or not all(
                isinstance(entry, list | tuple) and list(map(type, entry)) == list(kinds) for entry in entries
            ):
                yield key, wanted

    def load_state_dict(self, state: dict[str, Any]) -> Change:
        change = super().load_state_dict(state)
        inner = unwrapped(self.model)
        self._held = set(state["held"])
        self._below, self._age = dict(state["below"]), dict(state["age"])
        self._then = {n: value.to(inner.get_parameter(n).device, copy=True) for n, value in state["then"].items()}
        self.changes = [Change(step, tuple(f), tuple(t)) for step, f, t in state["changes"]]
        self.history = [(step, dict(measured)) for step, measured in state["history"]]
        return change
