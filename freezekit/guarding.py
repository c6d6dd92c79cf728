"""Hold what is frozen to its value: hooks on an optimizer's step that see, name and stop what would move it.

Three watches, from cheap to sure:

* before a step: a frozen parameter with a ``.grad`` is the only one that torch's optimizers move, so those are looked
  at one by one, and a step that would move one is refused before anything moved; a step with a closure, which may clear
  the gradient or thaw the parameter, is judged after it;
* before and after a step: the address and version of every frozen tensor; a change of either is followed by a checksum;
* every ``every`` steps: a checksum of all, since writes through ``.data`` and fused steps change neither.

What is held is a tensor, under whatever name. One that is frozen no more was either made trainable itself, and is let
go, or it left the model, and that is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from freezekit._arguments import check_choice, check_module, shown
from freezekit.freezing.arguments import Optimizers, innermost, several
from freezekit.freezing.bits import checksums, local, same_bits
from freezekit.freezing.flags import watches
from freezekit.freezing.held import (
    AtRisk,
    Record,
    causes,
    copy_state,
    describe,
    describe_lbfgs,
    form,
    frozen_tensors,
    put_state,
    record_all,
)
from freezekit.freezing.index import Index
from freezekit.freezing.norm import is_held, statistics_of
from freezekit.freezing.optim import group_of
from freezekit.freezing.patterns import Patterns, flat, select, select_present


class FrozenMoved(RuntimeError):
    """A frozen tensor moved, or the next step would move it. ``names``: which."""

    def __init__(self, title: str, lines: list[tuple[str, str]]) -> None:
        shown = [f"  {name!r}: {line}" for name, line in lines[:5]]
        more = [f"  and {len(lines) - 5} more"] if len(lines) > 5 else []
        super().__init__("\n".join([f"guard: {title}", *shown, *more]))
        self.names = tuple(name for name, _ in lines)


class Allowance:
    """The handle that `Guard.allow` returns; as a context manager it ends in `end`."""

    def __init__(self, guard: Guard, patterns: tuple[Patterns, ...]) -> None:
        self._guard = guard
        self._patterns = list(flat(Index(guard.model), patterns))  # an iterator is read once
        select(guard.model, self._patterns)
        self._covered: dict[int, torch.Tensor] = {}  # not ids alone, which others get that come after them

    def follow(self) -> dict[int, torch.Tensor]:
        """By their ids, the tensors of the model that the patterns cover, or covered before under another name."""
        model = self._guard.model
        selection = select_present(model, self._patterns)
        statistics = (statistics_of(norm).values() for norm in selection.norms.values())
        self._covered |= {id(tensor): tensor for tensor in chain(selection.params.values(), *statistics)}
        present = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
        self._covered = {key: tensor for key, tensor in self._covered.items() if key in present}
        return self._covered

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
        self._records: dict[int, Record] = {}  # by the id of the tensor
        self._gone: dict[int, Record] = {}  # of tensors that left the model
        self._at_risk: dict[int, list[AtRisk]] = {}  # by the id of the optimizer that is in a step
        self._refresh()
        watches.add(self)
        self._removed = False
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
        self._removed = True
        for kept in (self._allowances, self._records, self._gone, self._at_risk):
            kept.clear()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def check(self) -> None:
        """Compare every frozen tensor by checksum now; raises `FrozenMoved` or undoes, as a step does."""
        self._check_on()
        self._refresh()
        self._settle(self._moved(self._records), "since the last check")

    def accept(self) -> None:
        """Hold the present values from now on: after a ``load_state_dict`` that was meant, say. See also `allow`."""
        self._check_on()
        self._records.clear()
        self._gone.clear()
        self._refresh()

    def allow(self, *patterns: Patterns) -> Allowance:
        """Allow intended changes of frozen tensors: EMA and teacher updates, merged adapters, a layer that is replaced.

        Args:
            patterns: which, as for `freeze`, with the statistics of the norms that they cover; none means all. They are
                read anew at each step, so a name covers what is put in its place, too.

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
        self._allowances.append(Allowance(self, patterns))
        self._refresh()
        return self._allowances[-1]

    def note_unfrozen(self, params: Iterable[nn.Parameter]) -> None:
        """For `announce`: neither these are held any more, nor what they took the place of."""
        self._follow()
        unfrozen = {id(param) for param in params}
        names = {name for name, param in self.model.named_parameters() if id(param) in unfrozen}
        self._gone = {key: record for key, record in self._gone.items() if record.name not in names}

    def _end(self, allowance: Allowance) -> None:
        if allowance in self._allowances:
            self._refresh()
            self._allowances.remove(allowance)
            self._refresh()

    def _check_on(self) -> None:
        if self._removed:
            raise RuntimeError("this guard was removed and holds nothing any more: make another with guard()")

    def _refresh(self) -> None:
        """Read what is frozen now, and record what newly is."""
        new = record_all(self._follow(), with_value=self.mode == "restore")
        self._records |= new
        if self._gone:  # module.to() puts the value of a buffer into another tensor
            held = {record.what() for record in self._records.values()}
            self._gone = {key: record for key, record in self._gone.items() if record.what() not in held}

    def _follow(self) -> dict[int, tuple[str, torch.Tensor, nn.Module | None]]:
        """Forget what was thawed or may be written to, and set apart what left; return what is not recorded yet."""
        allowed = {key for allowance in self._allowances for key in allowance.follow()}
        found = {id(entry[1]): entry for entry in frozen_tensors(self.model) if id(entry[1]) not in allowed}
        known = self._records | self._gone
        self._records = {key: record for key, record in known.items() if key in found}
        for key, record in self._records.items():
            record.name, _, record.norm = found[key]
        left = {key: record for key, record in known.items() if key not in found and key not in allowed}
        self._gone = {key: record for key, record in left.items() if not record.thawed()}
        return {key: entry for key, entry in found.items() if key not in known}

    def _touched(self) -> dict[int, Record]:
        """Of frozen tensors that may have changed. One touched statistic makes all of its norm suspect: batch norm in
        training writes its means and variances without counting a version, and only ``num_batches_tracked`` tells."""
        touched = {key: record for key, record in self._records.items() if record.touched()}
        norms = {id(record.norm) for record in touched.values() if record.norm is not None}
        return touched | {key: record for key, record in self._records.items() if id(record.norm) in norms}

    def _moved(self, records: dict[int, Record]) -> list[Record]:
        """Those of tensors that changed; the others follow their tensor to its address and version."""
        moved = []
        sums = checksums([record.tensor for record in records.values()])
        for record, checksum in zip(records.values(), sums, strict=True):
            if (form(record.tensor), checksum) == (record.form, record.checksum):
                record.settle()
            else:
                moved.append(record)
        return moved

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._refresh()
        self._settle(self._moved(self._touched()), "outside the optimizer's step")
        self._check_modes()
        closure = _has_closure(args, kwargs)
        risks = self._find_at_risk(optimizer, closure)
        judged = [] if closure or self.mode == "restore" else risks
        refused = [risk for risk in judged if causes(optimizer, risk.group, risk.record.tensor)]
        if refused:
            lines = [describe(optimizer, risk) for risk in refused]
            raise FrozenMoved("this step would move what is frozen; nothing has moved yet", lines)
        self._at_risk[id(optimizer)] = risks

    def _find_at_risk(self, optimizer: Optimizer, closure: bool) -> list[AtRisk]:
        """Frozen parameters in the groups that have a gradient, or may get one in the closure (restore mode)."""
        risks = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                record = self._records.get(id(param))
                if record is None or (param.grad is None and not (closure and self.mode == "restore")):
                    continue
                value = local(param).detach().clone() if record.value is None else record.value
                risks.append(AtRisk(record, group, value, copy_state(optimizer, param)))
        return risks

    def _check_modes(self) -> None:
        wrong = {name: m for name, m in self.model.named_modules() if is_held(m) and m.training}
        if wrong and self.mode == "raise":
            line = "its .training was set past train(). Cure: set it to False, or unfreeze() the layer"
            raise FrozenMoved("frozen statistics would move in the next forward", [(name, line) for name in wrong])
        for module in wrong.values():
            module.training = False

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.steps += 1
        if _has_closure(args, kwargs):  # which may thaw, allow or accept
            self._refresh()
        # What was accepted there has a new record, to whose value the last line puts it back.
        risks = [risk for risk in self._at_risk.pop(id(optimizer), []) if id(risk.record.tensor) in self._records]
        same = [risk for risk in risks if self._records[id(risk.record.tensor)] is risk.record]
        moved = [risk for risk in same if not same_bits(local(risk.record.tensor), risk.value)]
        for risk in risks if self.mode == "restore" else moved:
            put_state(optimizer, risk.record.tensor, risk.state)
        for risk in moved:
            risk.record.put_back(risk.value)
        if moved and self.mode == "raise":
            lines = [describe(optimizer, risk) for risk in moved]
            raise FrozenMoved("this step moved what is frozen; that was put back", lines)
        self._count(risk.record.name for risk in moved)
        # A gradient that a closure made is met only now, and a fused step would have counted no version.
        late = {key: record for key, record in self._records.items() if record.tensor.grad is not None}
        suspects = self._records if self.steps % self.every == 0 else {**self._touched(), **late}
        self._settle(self._moved(suspects), f"in or before step {self.steps} of {type(optimizer).__name__}")

    def _settle(self, moved: list[Record], when: str) -> None:
        """Undo, or raise, for tensors that moved; raise for those that left."""
        lines = []
        for record in moved:
            same_form = form(record.tensor) == record.form
            if record.value is not None and same_form and record.put_back(record.value):
                record.settle()
                self._count([record.name])
            else:
                record.is_known_to_have_moved = True
                lines.append((record.name, self._explain(record)))
        lines += [(record.name, self._explain_gone(record)) for record in self._gone.values()]
        if lines:
            raise FrozenMoved(f"frozen tensors {'moved or left' if self._gone else 'moved'} {when}", lines)

    def _explain(self, record: Record) -> str:
        accept = "or, if it was meant (an EMA update, a merged adapter), do it within guard.allow()"
        now = record.tensor
        if form(now) != record.form:
            shape, dtype = record.form
            then = f"{dtype} {tuple(shape)}"
            return f"it was {then} and is {now.dtype} {tuple(now.shape)}. Cure: convert before freezing, {accept}"
        holders = [one for one in self.optimizers if id(now) in group_of(one)]
        if any(isinstance(one, LBFGS) for one in holders):
            return describe_lbfgs(record.name)
        how = "load_state_dict, copy_, a write through .data, another optimizer, a frozen norm set to train mode"
        if holders:
            how += ", or this optimizer, if it steps what has no gradient: freeze(..., remove=True) takes it out"
        return f"something wrote to it ({how}). Cure: stop that; guard(mode='restore') undoes it; {accept}"

    def _explain_gone(self, record: Record) -> str:
        named = dict(chain(self.model.named_parameters(), self.model.named_buffers()))
        holders = [m for m in self.model.modules() if any(b is record.tensor for b in m._buffers.values())]
        if holders:
            what = f"it is in a {type(holders[0]).__name__} now, which is not frozen"
        elif record.name not in named:
            what = "it is no longer in the model"
        elif id(named[record.name]) in self._records:
            what = "another tensor, of another value, is in its place, as load_state_dict(assign=True) puts it there"
        else:
            what = "another tensor is in its place, which is not frozen"
        cure = "change the model before guard(), or unfreeze() it first; guard.accept() what was meant"
        return f"nobody unfroze it, but {what}. Cure: {cure}"

    def _count(self, names: Iterable[str]) -> None:
        for name in names:
            self.undone[name] = self.undone.get(name, 0) + 1


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether one of a step's arguments, the first of which is the optimizer, is a closure."""
    return any(callable(argument) for argument in (*args[1:], *kwargs.values()))


def guard(
    model: nn.Module, optimizer: Optimizers, every: int = 100, mode: Literal["raise", "restore"] = "raise"
) -> Guard:
    """Hold every frozen parameter, and the statistics of every frozen norm, to its value.

    What is frozen is read at each step, so `freeze` and `unfreeze` may follow; a value is held from the moment guard
    first meets the tensor frozen, now or at the next step, until the tensor itself is made trainable or its norm
    released. A tensor that leaves the model without that (``remove_weight_norm``, another layer or parameter in its
    place, ``load_state_dict(assign=True)``) is told, unless what has its name now holds the same value, frozen too, or
    was given to `unfreeze`, until ``accept()``.

    Args:
        model: the model; frozen are its parameters with ``requires_grad=False`` and the statistics of held norms.
        optimizer: the optimizer whose steps are watched, or several, as a GAN has; of one that wraps another, as
            Lookahead and accelerate's do, the one inside. Its copies and pickles do not carry the hooks.
        every: steps between checksums of all frozen tensors. Those find writes that leave address and version alone.
        mode: "raise": a step that would move a frozen parameter raises before anything moved, with name, cause and
            cure; what is found afterwards raises too, as in a step with a closure, which may clear the gradient.
            "restore": values and optimizer state are put back instead, and counted in ``.undone``; what left the model
            still raises. It keeps a copy of every frozen tensor.

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
