"""Hold what is frozen to its value: hooks on an optimizer's step that see, name and stop what would move it.

Three watches, from cheap to sure:

* before a step: a frozen parameter with a ``.grad`` is the only one that torch's optimizers move, so those are looked
  at one by one, and a step that would move one is refused before anything moved;
* before and after a step: the address and version of every frozen tensor; a change of either is followed by a checksum;
* every ``every`` steps: a checksum of all, since writes through ``.data`` and fused steps change neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from freezekit._arguments import check_choice, check_module, shown
from freezekit.freezing.arguments import Optimizers, innermost, several
from freezekit.freezing.bits import checksums, local, same_bits
from freezekit.freezing.held import (
    AtRisk,
    Record,
    causes,
    copy_state,
    describe,
    follow,
    frozen_tensors,
    layers_with,
    put_state,
    record_all,
    replaced,
    watches,
    write,
)
from freezekit.freezing.norm import is_held, statistics_of
from freezekit.freezing.optim import group_of
from freezekit.freezing.patterns import Patterns, select


class FrozenMoved(RuntimeError):
    """A frozen tensor moved, or the next step would move it. ``names``: which."""

    def __init__(self, title: str, lines: dict[str, str]) -> None:
        shown = [f"  {name!r}: {line}" for name, line in list(lines.items())[:5]]
        more = [f"  and {len(lines) - 5} more"] if len(lines) > 5 else []
        super().__init__("\n".join([f"guard: {title}", *shown, *more]))
        self.names = tuple(lines)


class Allowance:
    """The handle that `Guard.allow` returns; as a context manager it ends in `end`."""

    def __init__(self, guard: Guard, tensors: frozenset[int]) -> None:
        self._guard = guard
        self.tensors = tensors

    def end(self) -> None:
        """Hold the tensors again, at their present values; a second time does nothing."""
        self._guard._end(self)

    def __enter__(self) -> Allowance:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


class Guard:
    """The handle that `guard` returns; as a context manager it ends in `remove`.

    Attributes:
        steps: steps seen.
        undone: name -> how often its value was put back (mode "restore").
    """

    def __init__(self, model: nn.Module, optimizer: Optimizers, every: int, mode: str) -> None:
        check_module(model)
        found = [innermost(one, optimizer) for one in several(optimizer) or [optimizer]]
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a number of steps from 1 on, got {shown(every)}")
        check_choice("mode", mode, "raise", "restore")
        self.model = model
        self.optimizers = tuple({id(one): one for one in found}.values())
        self.every = every
        self.mode = mode
        self.steps = 0
        self.undone: dict[str, int] = {}
        self._allowances: list[Allowance] = []
        self._records: dict[str, Record] = {}
        self._frozen: dict[str, torch.Tensor] = {}
        self._replaced: set[str] = set()  # of which a step was refused
        self._unfrozen: dict[int, nn.Parameter] = {}  # by `unfreeze`, since it was last read what is frozen
        self._at_risk: dict[int, list[AtRisk]] = {}  # by the id of the optimizer that is in a step
        self._refresh()
        watches.add(self)
        self._hooks = [
            hook
            for one in self.optimizers
            for hook in (one.register_step_pre_hook(self._before_step), one.register_step_post_hook(self._after_step))
        ]

    def remove(self) -> None:
        """Take the hooks off and forget the values; a second time does nothing."""
        for hook in self._hooks:
            hook.remove()
        watches.discard(self)
        self._records.clear()
        self._frozen.clear()
        self._unfrozen.clear()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def check(self) -> None:
        """Compare every frozen tensor by checksum now; raises `FrozenMoved` or undoes, as a step does."""
        self._refresh()
        self._settle(self._moved(self._frozen), "since the last check")

    def accept(self) -> None:
        """Hold the present values from now on: after a ``load_state_dict`` that was meant, say. See also `allow`."""
        self._records.clear()
        self._refresh()

    def allow(self, *patterns: Patterns) -> Allowance:
        """Allow intended writes to frozen tensors: EMA and teacher updates, merged adapters.

        Args:
            patterns: which, as for `freeze`, with the statistics of the norms that they cover; none means all.

        Returns:
            an `Allowance`. As a context manager it ends with the block; without ``with`` it lasts until its ``end()``.
            What was written then counts as the value to hold. Other frozen tensors are held all along.

        Raises:
            FrozenMoved: one of them has moved before.
            PatternError, TypeError: as `freeze`.

        >>> model = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2).requires_grad_(False)})
        >>> held = guard(model, torch.optim.SGD(model["student"].parameters(), lr=0.1))
        >>> with held.allow("teacher"):
        ...     _ = model["teacher"].weight.data.mul_(0.9)
        >>> held.check()
        """
        self.check()
        selection = select(self.model, patterns)
        tensors = {id(param) for param in selection.params.values()}
        tensors |= {id(t) for norm in selection.norms.values() for t in statistics_of(norm).values()}
        self._allowances.append(Allowance(self, frozenset(tensors)))
        self._refresh()
        return self._allowances[-1]

    def note_unfrozen(self, params: Iterable[nn.Parameter]) -> None:
        """For `unfreeze`: these may take the place of what was frozen."""
        own = {id(param) for param in self.model.parameters()}  # not those of a copy, as a plan has them
        self._unfrozen.update((id(param), param) for param in params if id(param) in own)

    def _end(self, allowance: Allowance) -> None:
        if allowance in self._allowances:
            self._allowances.remove(allowance)
            self._refresh()

    def _refresh(self) -> None:
        """Read what is frozen now; forget what is no longer or may be written to, record what newly is."""
        allowed = {tensor for allowance in self._allowances for tensor in allowance.tensors}
        self._frozen = {name: t for name, t in frozen_tensors(self.model).items() if id(t) not in allowed}
        for name in self._replaced & self._frozen.keys():  # which was frozen again
            self._records.pop(name, None)
        self._replaced.clear()
        self._records = follow(self.model, self._records, self._frozen)
        gone = {name: record for name, record in self._records.items() if name not in self._frozen}
        if lines := replaced(self.model, gone, self._unfrozen.keys()) if gone else {}:
            cure = "Cure: change layers before freeze(), freeze() again, or unfreeze() or guard.accept() what was meant"
            lines = {name: f"{line}. {cure}" for name, line in lines.items()}
            self._replaced = set(gone)
            raise FrozenMoved(
                "something took the place of what is frozen, and freezekit was not told to unfreeze it", lines
            )
        self._unfrozen.clear()
        for name in gone:
            del self._records[name]
        new = {name: tensor for name, tensor in self._frozen.items() if name not in self._records}
        before = {id(record.tensor): record for record in gone.values()}
        for name, record in record_all(self.model, new, with_value=self.mode == "restore").items():
            # What has another name now, as within an adapter, is held to the same value.
            known = before.get(id(record.tensor))
            self._records[name] = record if known is None else replace(known, layer=record.layer, beside=record.beside)

    def _touched(self) -> dict[str, torch.Tensor]:
        """Frozen tensors that may have changed. One touched tensor makes all of its layer suspect: batch norm in
        training writes its means and variances without counting a version, and only ``num_batches_tracked`` tells."""
        layers = {
            name.rpartition(".")[0] for name, tensor in self._frozen.items() if self._records[name].touched(tensor)
        }
        return {name: tensor for name, tensor in self._frozen.items() if name.rpartition(".")[0] in layers}

    def _moved(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        """Names of those that changed; the records of the others follow them to their address and version."""
        moved = []
        for (name, tensor), checksum in zip(tensors.items(), checksums(list(tensors.values())), strict=True):
            record = self._records[name]
            if record.same_form(tensor) and checksum == record.checksum:
                record.accept(tensor)
            else:
                moved.append(name)
        return moved

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._refresh()
        self._settle(self._moved(self._touched()), "outside the optimizer's step")
        self._check_modes()
        closure = any(callable(argument) for argument in (*args[1:], *kwargs.values()))
        risks = self._find_at_risk(optimizer, closure)
        refused = [risk for risk in risks if risk.reasons] if self.mode == "raise" else []
        if refused:
            lines = {risk.name: describe(optimizer, risk.group, risk.name, risk.reasons) for risk in refused}
            raise FrozenMoved("this step would move what is frozen; nothing has moved yet", lines)
        self._at_risk[id(optimizer)] = risks

    def _find_at_risk(self, optimizer: Optimizer, closure: bool) -> list[AtRisk]:
        """Frozen parameters in the groups that have a gradient, or may get one in the closure (restore mode)."""
        names = {id(tensor): name for name, tensor in self._frozen.items()}
        risks = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                name = names.get(id(param))
                if name is None or (param.grad is None and not (closure and self.mode == "restore")):
                    continue
                copied = self._records[name].value
                value = local(param).detach().clone() if copied is None else copied
                reasons = causes(optimizer, group, param)
                risks.append(AtRisk(name, param, group, value, copy_state(optimizer, param), reasons))
        return risks

    def _check_modes(self) -> None:
        wrong = {name: m for name, m in self.model.named_modules() if is_held(m) and m.training}
        if wrong and self.mode == "raise":
            line = "its .training was set past train(). Cure: set it to False, or unfreeze() the layer"
            raise FrozenMoved("frozen statistics would move in the next forward", dict.fromkeys(wrong, line))
        for module in wrong.values():
            module.training = False

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.steps += 1
        risks = self._at_risk.pop(id(optimizer), [])
        moved = [risk for risk in risks if not same_bits(local(risk.param), risk.value)]
        for risk in risks if self.mode == "restore" else moved:
            put_state(optimizer, risk.param, risk.state)
        for risk in moved:
            write(risk.param, risk.value)
        if moved and self.mode == "raise":
            lines = {risk.name: describe(optimizer, risk.group, risk.name, risk.reasons) for risk in moved}
            raise FrozenMoved("this step moved what is frozen; that was put back", lines)
        self._count(risk.name for risk in moved)
        # A gradient that a closure made is met only now, and a fused step would have counted no version.
        late = {name: tensor for name, tensor in self._frozen.items() if tensor.grad is not None}
        suspects = self._frozen if self.steps % self.every == 0 else {**self._touched(), **late}
        self._settle(self._moved(suspects), f"in or before step {self.steps} of {type(optimizer).__name__}")

    def _settle(self, moved: list[str], when: str) -> None:
        """Undo, or raise, for tensors that moved."""
        past_help = []
        for name in moved:
            record, tensor = self._records[name], self._frozen[name]
            # What was put in its place may be somebody else's: a checkpoint's, after load_state_dict(assign=True).
            if record.value is None or record.tensor is not tensor or not record.same_form(tensor):
                past_help.append(name)
                continue
            write(tensor, record.value)
            record.accept(tensor)
            self._count([name])
        if past_help:
            raise FrozenMoved(f"frozen tensors moved {when}", {name: self._explain(name) for name in past_help})

    def _is_of_another_layer(self, name: str) -> bool:
        """Whether the name is that of another layer's tensor now, whose own values nothing wrote to."""
        record, now = self._records[name], self._frozen[name]
        if record.layer is None or record.tensor is now:
            return False
        return layers_with(self.model).get(id(now)) is not record.layer

    def _explain(self, name: str) -> str:
        now, record = self._frozen[name], self._records[name]
        if self._is_of_another_layer(name):
            return "it is another layer's now. Cure: replace layers before guard(), or guard.accept() what was meant"
        accept = "or, if it was meant (an EMA update, a merged adapter), do it within guard.allow()"
        if not record.same_form(now):
            then = f"{record.dtype} {tuple(record.shape)}"
            return f"it was {then} and is {now.dtype} {tuple(now.shape)}. Cure: convert before freezing, {accept}"
        if record.tensor is not now:
            how = "as load_state_dict(assign=True) does"
            return f"another tensor, of another value, was put in its place, {how}. Cure: guard.accept() what was meant"
        holders = [one for one in self.optimizers if id(now) in group_of(one)]
        if any(isinstance(one, LBFGS) for one in holders):
            cure = f"freeze(model, {name!r}, optimizer=optimizer, remove=True, state='reset')"
            return f"LBFGS writes to every parameter it holds, along one history over all. Cure: {cure}"
        how = "load_state_dict, copy_, a write through .data, another optimizer, a frozen norm set to train mode"
        if holders:
            how += ", or this optimizer, if it steps what has no gradient: freeze(..., remove=True) takes it out"
        return f"something wrote to it ({how}). Cure: stop that; guard(mode='restore') undoes it; {accept}"

    def _count(self, names: Iterable[str]) -> None:
        for name in names:
            self.undone[name] = self.undone.get(name, 0) + 1


def guard(
    model: nn.Module, optimizer: Optimizers, every: int = 100, mode: Literal["raise", "restore"] = "raise"
) -> Guard:
    """Hold every frozen parameter, and the statistics of every frozen norm, to its value.

    What is frozen is read at each step, so `freeze` and `unfreeze` may follow; a value is held from the moment guard
    first meets the tensor frozen: now, or the next step.

    Args:
        model: the model; frozen are its parameters with ``requires_grad=False`` and the statistics of held norms.
        optimizer: the optimizer whose steps are watched, or several, as a GAN has; of one that wraps another, as
            Lookahead and accelerate's do, the one inside. Its copies and pickles do not carry the hooks.
        every: steps between checksums of all frozen tensors. Those find writes that leave address and version alone.
        mode: "raise": a step that would move a frozen parameter raises before anything moved, with name, cause and
            cure; what is found afterwards raises too. "restore": values and optimizer state are put back instead, and
            counted in ``.undone``; what another tensor took the place of still raises. It keeps a copy of every frozen
            tensor.

    Returns:
        a `Guard`: ``remove()``, ``check()`` (all checksums, now), ``accept()``, and ``allow("teacher")`` for updates
        that are meant; usable in a ``with`` statement.

    Raises:
        FrozenMoved: (a RuntimeError) from ``optimizer.step()`` and ``check()``.
        TypeError, ValueError: an argument of the wrong type, or out of range; a wrapper whose optimizer cannot be seen,
            or that has several.

    >>> layer = nn.Linear(2, 2)
    >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> _ = layer.weight.requires_grad_(False)  # only half of freezing: .grad is still there
    >>> with guard(layer, opt):
    ...     try:
    ...         opt.step()
    ...     except FrozenMoved as error:
    ...         print(str(error).split("; weight decay")[0])
    guard: this step would move what is frozen; nothing has moved yet
      'weight': its .grad is stale: it was left from before the freeze, or written since
    """
    return Guard(model, optimizer, every, mode)
