"""What would still move, be computed or be kept although it is frozen, and how to mend it.

`audit` looks at a model, its optimizers and, when inputs are given, at one forward pass. From a shell::

    freezekit audit package.module:factory
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from freezekit._arguments import check_module
from freezekit._inputs import arguments
from freezekit._twin import looking_once, random_numbers_kept, switches_kept
from freezekit.freezing.arguments import optimizers_of, several

from . import forward, hooks, optim, tensors, wrappers
from .report import SEVERITIES, AuditError, Finding, Report
from .subject import Subject

__all__ = ["AuditError", "Finding", "Report", "audit"]

_Check = Callable[[Subject], Iterator[Finding]]
_ALWAYS: tuple[_Check, ...] = (
    tensors.check_parameters,
    tensors.check_modules,
    tensors.check_buffers,
    tensors.check_qconfig,
    tensors.check_tied,
    tensors.check_shared_storage,
    tensors.check_statistics,
    tensors.check_held,
    tensors.check_dropout,
    optim.check_stray_grads,
    wrappers.check_ddp,
    wrappers.check_fsdp1,
    wrappers.check_compile,
    wrappers.check_autocast,
)
_OPTIMIZER: tuple[_Check, ...] = (
    optim.check_moves,
    optim.check_orphan_state,
    optim.check_membership,
    optim.check_state,
    optim.check_duplicates,
    optim.check_scheduled,
    optim.check_idle,
)


_FORWARD = "moving tensors and lost gradients in a forward pass"


def audit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    inputs: Any = None,
    *,
    schedule: Any = None,
) -> Report:
    """Look for the pitfalls of freezing in a model and its optimizer. Nothing is changed: what runs are copies.

    Hooks on parameters and before the optimizer's step are called with gradients made for it, to see whether they mask
    part of them; what they write to is put back (what they print or send is not).

    Args:
        model: the model, wrapped (DDP, FSDP, torch.compile) or not.
        optimizer: the optimizer that steps it, or all of them when there are several, also in a mapping. Of one that
            wraps another (Lookahead, ZeroRedundancyOptimizer, accelerate's) the inner one is asked.
        inputs: arguments of one forward pass: a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments. Given, a copy of the model runs the pass once in the model's present mode (no backward
            pass), which shows tensors that move and layers that lose their gradient.
        schedule: a freezing schedule (`freezekit.schedules`), to count recompilations against torch.compile's limit.

    Returns:
        A `Report`: iterate it, ``print()`` it, ``to_dict()`` it, or ``raise_for_errors()``. Checks that could not run
        are in ``report.skipped``. Call `audit` inside ``torch.autocast`` to see what autocast casts.

    Raises:
        TypeError: ``model`` is not a module, ``optimizer`` not an optimizer, or ``inputs`` none of those.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> model[0].bias.requires_brad = False
        >>> [(f.severity, f.code, f.where) for f in audit(model)]
        [('error', 'unknown-attribute', '0.bias.requires_brad')]
    """
    check_module(model)
    if schedule is not None and not callable(getattr(schedule, "compile_entries", None)):
        raise TypeError(f"schedule must have a method compile_entries(), got {type(schedule).__name__}")
    given = None if inputs is None else arguments(inputs)
    inner = [found for one in several(optimizer) for found in optimizers_of(one, to_change=False, whole=optimizer)]
    subject = Subject(model, tuple(inner), given, schedule)
    with random_numbers_kept({p.device for p in model.parameters()}), switches_kept(), looking_once():
        return _report(subject)


def _report(subject: Subject) -> Report:
    checks = [*_ALWAYS]
    skipped: dict[str, str] = {}
    scripted = [name for name, module in subject.modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        skipped[f"dropout and flags in {len(scripted)} module(s) of TorchScript"] = (
            f"a ScriptModule ({scripted[0]!r}) does not show its layers' kinds; audit the model that it was made of"
        )
    if subject.optimizers:
        checks += _OPTIMIZER
        skipped.update(optim.not_stepped(subject))
        masks = hooks.Masks(subject)
        skipped.update(masks.skipped)
        checks.append(partial(hooks.check_masked, masks=masks))
    else:
        skipped["what the optimizer would move, keep or miss"] = "no optimizer given"
    findings = [f for check in checks for f in check(subject)]
    try:
        if subject.inputs is None:
            raise forward.CannotCopy("no inputs given")
        probe = forward.run(subject)
    except forward.CannotCopy as error:
        skipped[_FORWARD] = str(error)
    else:
        findings += forward.check_forward(subject, probe)
    findings.sort(key=lambda f: SEVERITIES.index(f.severity))
    return Report(type(subject.model).__name__, tuple(findings), skipped)
