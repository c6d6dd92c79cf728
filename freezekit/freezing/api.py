"""`freeze` and `unfreeze`: both steps of freezing, autograd's and the optimizer's, in one call."""

import warnings
from collections.abc import Iterable
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from freezekit._arguments import brief
from freezekit.distributed.watching import note_freeze
from freezekit.freezing import norm as statistics
from freezekit.freezing import optim, pending
from freezekit.freezing.arguments import Optimizers, check_flags, check_lbfgs, check_norm, check_optimizers
from freezekit.freezing.baked import check_can_hold
from freezekit.freezing.flags import announce
from freezekit.freezing.patterns import Patterns, Selection, select
from freezekit.freezing.result import Frozen

NormPolicy = Literal["freeze", "batch"]


def freeze(
    model: nn.Module,
    *patterns: Patterns,
    optimizer: Optimizers | None = None,
    remove: bool = False,
    state: optim.StatePolicy = "keep",
    norm: NormPolicy | None = None,
    until: str | None = None,
    inputs: Any = None,
) -> Frozen:
    """Hold parameters still: ``requires_grad`` off, ``.grad`` dropped, running statistics kept, the optimizer told.

    Args:
        model: any ``nn.Module``.
        patterns: what to freeze; their union. A module or parameter name (``"layer1"``), a glob over dotted names
            (``"layer*.bn?"``; ``*`` crosses dots), a subclass of ``nn.Module``, a module or parameter of the model, a
            predicate ``f(name, parameter) -> bool``, or a list of these (``layer.parameters()`` and
            ``layer.named_parameters()`` too). A module stands for all it contains; one of several may have nothing to
            freeze, as in ``list(model.children())[:3]``. The name of a weight that a parametrization, weight norm,
            spectral norm, pruning or a hook computes, or a glob that matches it, means all that it is made of. (A
            predicate meets that by its own names, such as ``"0.weight_g"``.) Names inside DDP, DataParallel and
            torch.compile need no prefix. None of them, and no ``until``, means the whole model.
        optimizer: the optimizer that trains ``model``, or several, in a list or by name; of what wraps one, as fastai's
            OptimWrapper does, the one inside is meant. It may be None when nothing of it needs to change: a frozen
            parameter is skipped anyway, since its ``.grad`` is None.
        remove: take the parameters out of the optimizer's groups and state as well; `unfreeze` with the same optimizer
            puts them back in their own group. The groups stay, empty ones too, so schedulers go on. The way back is
            an attribute of the optimizer, which its copies and pickles lack: `freeze_state` saves it, and
            `load_freeze_state` gives it to them.
        state: "keep" leaves the optimizer's state (momentum, Adam's moments) for the day the parameters are unfrozen;
            "reset" drops it.
        norm: "freeze": normalisation layers that are covered use and keep their running statistics, and ``.train()``
            does not undo it: what fine-tuning wants. "batch": they are left as ``requires_grad_(False)`` leaves them:
            in train mode they go on with batch statistics, and their running statistics move; what a GAN wants whose
            discriminator is frozen for the generator's step. None is "freeze", with a `NormWarning` where that changes
            what the model computes, because a covered layer was in train mode. A layer is covered when a pattern meets
            it or a module around it, or when all parameters it owns are selected. The singular vectors of spectral
            norm count as running statistics.
        until: also freeze all that comes before this module or parameter, which itself stays trainable: in the order
            of registration, or of the calls in one forward when ``inputs`` is given.
        inputs: arguments for that forward: a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments. A copy of the model runs it, in eval mode and without gradients.

    Returns:
        what changed; in a ``with`` statement it is undone at the end of the block.

    Raises:
        PatternError: (a ValueError) a pattern that selects nothing, with near names.
        ValueError: arguments that contradict each other; LBFGS without ``remove=True, state="reset"``; statistics that
            a model moves which was traced or exported in train mode.
        TypeError: an argument of the wrong type.

    A tied parameter is one parameter: freezing it under one name freezes it under all (see ``Frozen.shared``).

    Gradients that still wait for a step, as between micro-batches, are lost with ``.grad``: freeze after the step, or
    in a ``with`` statement, which gives them back, also after a ``zero_grad()`` within it. Where they were lost,
    `unfreeze` or the next step warns with a `GradientWarning`.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    >>> freeze(model, until="2", norm="freeze")
    freeze: 4 parameters (0.weight, 0.bias, 1.weight, 1.bias)
      statistics: 1
    >>> model.train()[1].training
    False
    """
    optimizers = check_optimizers(optimizer, remove, state)
    if norm is not None:
        check_norm(norm)
    selection = select(model, patterns, until, inputs)
    check_flags(selection.params, frozen=True)
    if norm != "batch":
        check_can_hold(model, selection.norms, selection.modules)
    params = list(selection.params.values())
    for one in optimizers:
        check_lbfgs(one, params, "freeze", ready=remove and state == "reset")
    if norm is None:
        norm = "freeze"
        _tell_of_norms([name for name, module in selection.norms.items() if module.training])
    result = Frozen("freeze", shared=selection.shared)
    result.on_restore(partial(announce, model, params))  # runs last, when the flags are what they were
    names = selection.names
    pending.note_dropped(result, selection)
    _set_requires_grad(result, selection, names, False)
    _drop_grads(result, selection, names)
    for name, module in selection.norms.items():
        set_statistics(result, model, name, module, held=norm == "freeze")
        set_note(result, module, batch=norm == "batch", learns=False)
    for one in optimizers:
        _keep_way_back(result, one, params, names, state)
        leaving = params if remove else optim.orphans(one, params)
        result.removed += names_of(optim.take_out(one, leaving), names)
    announce(model, params)
    note_freeze(model)
    return result


def unfreeze(
    model: nn.Module,
    *patterns: Patterns,
    optimizer: Optimizers | None = None,
    state: optim.StatePolicy = "keep",
    norm: NormPolicy = "batch",
    until: str | None = None,
    inputs: Any = None,
    group: int | None = None,
) -> Frozen:
    """Let parameters train again. Frozen is ``requires_grad=False``, whoever set it.

    Args:
        model, patterns, until, inputs: as for `freeze`.
        optimizer: the optimizer that is to train them, or several. Parameters that `freeze` took out of it return to
            their own group, at their place, with the group's options as they are now; without it they would stay out,
            have gradients, and not move.
        state: "keep": the optimizer goes on with what it remembers; with momentum the first step then moves even at
            zero gradient. "reset": it starts as if it had never met the parameters.
        norm: "batch": normalisation layers that are covered follow the model's mode again. "freeze": only their
            parameters train, their running statistics stay frozen.
        group: index of the group for parameters that ``optimizer`` has never held (it was built from the trainable
            ones alone); without it they are an error, for they would never move.

    Returns:
        what changed; in a ``with`` statement it is undone at the end of the block.

    Raises:
        as `freeze`; ValueError also for parameters that ``optimizer`` does not know.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> _ = freeze(model, optimizer=opt, remove=True)
    >>> unfreeze(model, "1", optimizer=opt)
    unfreeze: 2 parameters (1.weight, 1.bias)
      back in the optimizer: 1.weight, 1.bias
    """
    optimizers = check_optimizers(optimizer, False, state, group)
    check_norm(norm)
    selection = select(model, patterns, until, inputs)
    check_flags(selection.params, frozen=False)
    if norm == "freeze":
        check_can_hold(model, selection.norms, selection.modules)
    params = list(selection.params.values())
    names = selection.names
    if optimizers and group is None:
        _check_known(optimizers, params, names)
    for one in optimizers:
        check_lbfgs(one, params, "unfreeze", ready=state == "reset")
    result = Frozen("unfreeze", shared=selection.shared)
    result.on_restore(partial(announce, model, params))
    released = _set_requires_grad(result, selection, names, True)
    pending.note_released(selection, released)
    result.on_restore(partial(pending.tell_of_end, selection, released))
    for name, module in selection.norms.items():
        set_statistics(result, model, name, module, held=norm == "freeze")
        set_note(result, module, batch=False, learns=False)
    selected = set(params)
    for module in selection.modules:  # of one that stays held, whatever of it was selected is meant to train
        if (
            "train" in vars(module)
            and statistics.is_held(module)
            and not selected.isdisjoint(module.parameters(recurse=False))
        ):
            set_note(result, module, batch=False, learns=True)
    for one in optimizers:
        _keep_way_back(result, one, params, names, state)
        optim.learn_names(one, selection.params)
        result.returned += names_of(optim.put_back(one, params, group), names)
        optim.complete_fused_momentum(one)
    announce(model, params)
    note_freeze(model)
    return result


def _tell_of_norms(names: list[str]) -> None:
    """Warn the caller of `freeze` that these layers were in train mode until now."""
    if names:
        layers = brief([repr(name or "the model") for name in names])
        warnings.warn(
            f"freeze: {layers} went from train mode to running statistics that hold still, which changes what the "
            'model computes. Say norm="freeze" if that is meant (fine-tuning), norm="batch" to leave norms as '
            "requires_grad_(False) does (a discriminator that is frozen for the generator's step)",
            statistics.NormWarning,
            stacklevel=3,
        )


def all_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """id of each parameter of ``model`` -> all its names, in registration order."""
    found: dict[int, tuple[str, ...]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        found[id(param)] = (*found.get(id(param), ()), name)
    return found


def _keep_way_back(
    result: Frozen, optimizer: Optimizer, params: list[nn.Parameter], names: dict[int, tuple[str, ...]], state: str
) -> None:
    """Note where ``params`` stand in ``optimizer`` for `Frozen.restore`, and drop their state if that is the policy."""
    was = optim.Membership.of(optimizer, params)
    if state == "reset":
        was.forgotten = optim.reset(optimizer, params)
        result.reset += names_of(was.forgotten, names)
    result.on_restore(was.restore)


def _check_known(
    optimizers: tuple[Optimizer, ...], params: list[nn.Parameter], names: dict[int, tuple[str, ...]]
) -> None:
    for one in optimizers:
        params = optim.strangers(one, params)
    unknown = names_of(params, names)
    if unknown:
        raise ValueError(
            f"optimizer: it holds none of {', '.join(unknown[:6])}{' ...' if len(unknown) > 6 else ''} and freeze() "
            "did not take them out of it, so they would never move; pass group=<index of the group to put them in>, or "
            "call optimizer.add_param_group first.\nIf it is a copy or a pickle, which does not know what was taken "
            "out of the original: load_freeze_state(model, state, optimizer), with the original's freeze_state()"
        )


def names_of(params: Iterable[torch.Tensor], names: dict[int, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(name for p in params for name in names.get(id(p), ())[:1])


def _set_requires_grad(
    result: Frozen, selection: Selection, names: dict[int, tuple[str, ...]], value: bool
) -> list[nn.Parameter]:
    """Set the flag, and return what it was set of; what is restored later are flag and ``.grad``, as they are now."""
    changed = [p for p in selection.params.values() if p.requires_grad != value]
    same = [p for p in selection.params.values() if p.requires_grad == value]
    places = list(pending.owners(selection, changed))
    result.on_restore(partial(_restore_in_place_of, places, not value))
    for param in changed:
        keep_param(result, param, not value)
        param.requires_grad = value
    result.params = tuple(name for p in changed for name in names[id(p)])
    result.already = tuple(name for p in same for name in names[id(p)])
    return changed


def keep_param(result: Frozen, param: nn.Parameter, requires_grad: bool) -> None:
    """Have `restore` set the flag, and ``.grad`` to what it is now."""
    result.on_restore(partial(setattr, param, "requires_grad", requires_grad))
    keep_grad(result, param)


def keep_grad(result: Frozen, param: nn.Parameter) -> None:
    """Have `restore` give back the gradient that ``param`` has now, converted as ``module.to()`` did meanwhile."""
    grad, form = param.grad, (param.device, param.dtype)

    def give_back() -> None:
        there = (param.device, param.dtype)
        param.grad = grad if grad is None or there == form else grad.to(*there)

    result.on_restore(give_back)


def _restore_in_place_of(places: list[tuple[nn.Module, str, nn.Parameter]], requires_grad: bool) -> None:
    """Set the flag of what took a parameter's place, as ``load_state_dict(assign=True)`` puts it there."""
    for module, name, was in places:
        now = dict(module._parameters.items()).get(name)
        if now is not None and now is not was and (now.is_floating_point() or now.is_complex()):
            now.requires_grad = requires_grad


def _drop_grads(result: Frozen, selection: Selection, names: dict[int, tuple[str, ...]]) -> None:
    with_grad = [p for p in selection.params.values() if p.grad is not None]
    for param in with_grad:
        keep_grad(result, param)
        param.grad = None
    result.grads = names_of(with_grad, names)


def set_note(result: Frozen, module: nn.Module, *, batch: bool, learns: bool) -> None:
    """Note what is asked of one layer with running statistics."""
    result.on_restore(partial(statistics.note, module, **statistics.notes(module)))
    statistics.note(module, batch=batch, learns=learns)


def set_statistics(result: Frozen, model: nn.Module, name: str, module: nn.Module, held: bool) -> None:
    """Hold or release one layer of ``model`` that is not so yet, and note it in ``result``."""
    if statistics.is_held(module) == held:
        if held:
            statistics.keep_statistics(module)  # which may have been without data
        return
    parent = reduce(getattr, name.split(".")[:-1], model) if name else None  # a ScriptModule has no get_submodule
    do, undo = (statistics.hold, statistics.release) if held else (statistics.release, statistics.hold)
    do(module, parent)
    result.on_restore(partial(undo, module, parent))
    result.norms = (*result.norms, name)
