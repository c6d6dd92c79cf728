"""Checks of the model against its optimizers: what would move, what is kept for nothing, what no optimizer steps."""

from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch.nn.parameter import is_lazy

from freezekit._arguments import brief
from freezekit.freezing.held import causes, momenta
from freezekit.freezing.optim import group_of

from .report import Finding, about
from .steps import foreign_hooks, steps_what_has_no_gradient, why_not_stepped, would_move
from .subject import Subject

_WITHOUT_GRADIENT = ".grad is None, and this optimizer does not skip it"
_TAKE_OUT = "take it out of the optimizer, as freeze(..., optimizer=optimizer, remove=True) does"


def not_stepped(subject: Subject) -> Iterator[tuple[str, str]]:
    """What the optimizers would do was read from their options, and not asked of them: which, and why."""
    for optimizer in subject.optimizers:
        kind = type(optimizer).__name__
        if count := len(foreign_hooks(optimizer)):
            yield f"{count} hook(s) around the step of {kind}", "a step on copies runs without them"
        if why := why_not_stepped(optimizer):
            yield f"a step of {kind} on copies", f"{why}; momentum, decay and gradients were looked at instead"


def check_moves(subject: Subject) -> Iterator[Finding]:
    """Frozen parameters in an optimizer: the next step may move those that have a gradient left on them.

    Without one, torch's optimizers skip them; others, as some of Muon, put zeros in its place and step, decay and all.
    One finding for each optimizer, group and reason, with every parameter that it concerns.
    """
    moving: dict[tuple[str, int, str], list[tuple[str, float | None]]] = defaultdict(list)
    still: dict[tuple[str, int], list[str]] = defaultdict(list)
    skipped: list[str] = []
    for optimizer, i, name, p in subject.members():
        if p.requires_grad:
            continue
        kind, group = type(optimizer).__name__, optimizer.param_groups[i]
        if p.grad is None:
            moved = would_move(optimizer, group, p) if steps_what_has_no_gradient(optimizer) else 0.0
            if moved:
                moving[kind, i, _WITHOUT_GRADIENT].append((name, moved))
            else:
                skipped.append(name)
            continue
        moved = would_move(optimizer, group, p)
        why = causes(optimizer, group, p)
        if moved == 0.0 or (moved is None and not why):
            still[kind, i].append(name)
        else:
            moving[kind, i, "; ".join(why) or ".grad is not None"].append((name, moved))
    mend = "set .grad = None when freezing, as freezekit's freeze does; zeros are not enough"
    for (kind, i, reason), found in moving.items():
        names = tuple(n for n, _ in found)
        sizes = [m for _, m in found if m is not None]
        size = f"would move by up to {max(sizes):.3g}" if sizes else "would probably move"
        why_text = f"frozen, but {size} at the next {kind}.step() (group {i}): {reason}"
        yield from about(names, "would-move", "error", why_text, _TAKE_OUT if reason is _WITHOUT_GRADIENT else mend)
    for (kind, i), held in still.items():
        yield from about(
            held,
            "stale-grad",
            "warning",
            f"{len(held)} frozen parameter(s) of group {i} hold a .grad: {kind} does not move them now, yet momentum "
            "or decay would, it takes memory, and gradient clipping counts it",
            mend,
        )
    yield from about(
        skipped,
        "frozen-in-optimizer",
        "info",
        f"{len(skipped)} frozen parameter(s) are in the optimizer; steps skip them as long as .grad is None",
        "nothing to do; freeze(..., remove=True) takes them out",
    )


def check_stray_grads(subject: Subject) -> Iterator[Finding]:
    """Frozen parameters outside every optimizer, with a gradient left."""
    names = [n for n, p in subject.frozen.items() if p.grad is not None and id(p) not in subject.optimized]
    yield from about(
        names,
        "stray-grad",
        "warning",
        f"{len(names)} frozen parameter(s) hold a .grad that no optimizer clears: clip_grad_norm_ over "
        "model.parameters() counts it in the norm, and it takes memory",
        "set .grad = None on them",
    )


def check_orphan_state(subject: Subject) -> Iterator[Finding]:
    """State of tensors that are in no group any more: ``state_dict()`` raises KeyError."""
    for optimizer in subject.optimizers:
        inside = group_of(optimizer)
        orphans = [p for p in optimizer.state if isinstance(p, torch.Tensor) and id(p) not in inside]
        if orphans:
            names = tuple(subject.names.get(id(p), "(not of this model)") for p in orphans)
            yield from about(
                names,
                "orphan-state",
                "error",
                f"{type(optimizer).__name__} keeps state of {len(orphans)} tensor(s) that were taken out of its "
                "groups: optimizer.state_dict() raises KeyError, and the state takes memory",
                "pop optimizer.state[p] too when a parameter is taken out (freeze(..., remove=True) does both)",
            )


def check_membership(subject: Subject) -> Iterator[Finding]:
    """Trainable parameters that no optimizer steps, and optimizers of another model."""
    idle = [n for n, p in subject.trainable.items() if id(p) not in subject.optimized]
    everything = (p for o in subject.optimizers for group in o.param_groups for p in group["params"])
    foreign = [p for p in everything if id(p) not in subject.names]
    shapes = {subject.trainable[n].shape for n in idle if not is_lazy(subject.trainable[n])}
    stale = [p for p in foreign if not is_lazy(p) and p.shape in shapes]
    if idle and stale:
        yield from about(
            idle,
            "stale-parameters",
            "error",
            f"{len(idle)} trainable parameter(s) are in no optimizer, while it holds {len(stale)} of the same "
            "shapes that are not the model's: the parameters were replaced after the optimizer was made",
            "make the optimizer after the model was moved, converted or loaded",
        )
    elif idle:
        yield from about(
            idle,
            "not-optimized",
            "warning",
            f"{len(idle)} trainable parameter(s) are in no optimizer: backward computes their gradients and "
            "accumulates them into .grad, nothing uses them, and optimizer.zero_grad() does not clear them",
            "freeze them (requires_grad_(False)), or pass them to the optimizer",
        )
    if not subject.trainable:
        yield Finding(
            "nothing-trainable",
            "warning",
            "(root)",
            "an optimizer was given, and the model has no trainable parameter: backward() raises, or does nothing",
            "unfreeze what is to be trained",
        )


def check_state(subject: Subject) -> Iterator[Finding]:
    """Momentum kept from before the freeze: it moves the parameter at its first step after unfreezing."""
    kept = [
        name
        for optimizer, _, name, p in subject.members()
        if not p.requires_grad and p.grad is None and momenta(optimizer, p)
    ]
    yield from about(
        kept,
        "kept-state",
        "info",
        f"{len(kept)} frozen parameter(s) keep momentum from before the freeze: it takes memory, and moves them "
        "after unfreezing even at zero gradient",
        'unfreeze with state="reset", unless the old momentum is wanted',
    )


def check_scheduled(subject: Subject) -> Iterator[Finding]:
    """Groups that were added after a learning-rate scheduler was made: it does not know them."""
    for optimizer in subject.optimizers:
        late = [i for i, group in enumerate(optimizer.param_groups) if "initial_lr" not in group]
        if late and len(late) < len(optimizer.param_groups):
            names = tuple(subject.names[id(p)] for i in late for p in optimizer.param_groups[i]["params"]
                          if id(p) in subject.names)  # fmt: skip
            yield Finding(
                "unscheduled-group",
                "warning",
                brief(names),
                f"group(s) {late} of {type(optimizer).__name__} were added after its learning-rate scheduler was made: "
                "at its next step LambdaLR raises ValueError, OneCycleLR KeyError, others leave the rate as it is",
                "keep frozen parameters in their group (freeze does), or build a new scheduler",
                names,
            )


def check_duplicates(subject: Subject) -> Iterator[Finding]:
    """Parameters that are stepped twice: twice in one group, or in two optimizers."""
    count = Counter(name for _, _, name, _ in subject.members())
    twice = [name for name, times in count.items() if times > 1]
    yield from about(
        twice,
        "duplicate-parameter",
        "error",
        f"{len(twice)} parameter(s) are listed more than once in the optimizers, and move more than once per step",
        "list each parameter once",
    )


def check_idle(subject: Subject) -> Iterator[Finding]:
    """Optimizers that have no parameter left, or frozen ones alone, in a model that trains."""
    for optimizer in subject.optimizers if subject.trainable else ():
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p.requires_grad for p in params):
            names = tuple(subject.names[id(p)] for p in params if id(p) in subject.names)
            kind = type(optimizer).__name__
            what = (
                f"all {len(params)} parameter(s) of {kind} are frozen" if params else f"{kind} has no parameters left"
            )
            yield Finding(
                "nothing-to-step",
                "warning",
                brief(names) if names else kind,
                f"{what}: its step does nothing, and GradScaler.step() fails on an optimizer without gradients",
                "leave the optimizer out of the step while its parameters are frozen",
                names,
            )
