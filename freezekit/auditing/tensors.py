"""Checks of the tensors alone: tied weights, shared storage, statistics that move under a frozen layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from numbers import Real

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from freezekit.freezing.norm import holds_unasked, reads_batch

from .report import Finding, about
from .subject import Subject, all_frozen, is_in_frozen_block


def check_tied(subject: Subject) -> Iterator[Finding]:
    """A frozen tensor reached by several names in a model that trains: freezing one name froze them all."""
    if not subject.trainable:
        return
    for p in subject.frozen.values():
        names = subject.all_names[id(p)]
        if len(names) > 1:
            yield about(
                names,
                "tied",
                "warning",
                f"one tensor under {len(names)} names ({', '.join(names)}): freezing any of them froze all",
                "nothing, when both were meant; else give one of them a parameter of its own (a clone) before freezing",
            )


def _extent(p: torch.Tensor) -> tuple[int, int, int] | None:
    """Storage pointer, first and last byte of a tensor in it; None for tensors without memory of their own."""
    if is_lazy(p) or p.numel() == 0 or p.device.type == "meta" or is_traceable_wrapper_subclass(p):
        return None
    last: int = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
    first = int(p.storage_offset()) * p.element_size()
    return p.untyped_storage().data_ptr(), first, first + (last + 1) * p.element_size()


def check_shared_storage(subject: Subject) -> Iterator[Finding]:
    """A frozen parameter and a trainable one over the same memory: training one moves the other."""
    by_storage: dict[int, list[tuple[int, int, str, bool]]] = defaultdict(list)
    for name, p in subject.parameters.items():
        extent = _extent(p) if p.layout == torch.strided else None
        if extent is not None:
            by_storage[extent[0]].append((extent[1], extent[2], name, p.requires_grad))
    for members in by_storage.values():
        frozen = [m for m in members if not m[3]]
        for first, last, name, _ in frozen:
            movers = [m[2] for m in members if m[3] and m[0] < last and first < m[1]]
            if movers:
                yield Finding(
                    "shared-storage",
                    "error",
                    name,
                    f"frozen, but it shares memory with the trainable {', '.join(movers)} (tied through .data or a "
                    "view): a step of that one moves this one",
                    "tie weights by assigning the same Parameter, or copy the values",
                    (name, *movers),
                )


def moves_statistics(module: nn.Module) -> bool:
    """Whether a forward pass in the module's present mode changes the statistics that it keeps."""
    if isinstance(module, _SpectralNorm):
        return module.training
    return (
        isinstance(module, _NormBase)
        and module.training
        and module.track_running_stats
        and module.running_mean is not None
        and module.momentum != 0.0
    )


def check_statistics(subject: Subject) -> Iterator[Finding]:
    """Batch norm, and spectral norm, in train mode over frozen parameters: what they compute still changes."""
    found: dict[tuple[bool, bool], list[str]] = defaultdict(list)
    for path, module in subject.model.named_modules():
        if moves_statistics(module) and is_in_frozen_block(subject.model, path):
            found[isinstance(module, _SpectralNorm), reads_batch(module)].append(path or "(root)")
    for (spectral, asked), names in found.items():
        what, cure = _SPECTRAL if spectral else _NORM
        yield about(
            names,
            "moving-statistics",
            "info" if asked else "error",
            f"{len(names)} {what}",
            'nothing: freeze was told norm="batch"' if asked else cure,
        )


_NORM = (
    "frozen normalisation layer(s) are in train mode: running_mean and running_var move at every forward pass, and the "
    "output depends on the other samples of the batch",
    'freeze with norm="freeze", or call .eval() on them after every model.train(); with norm="batch", where the batch '
    "is meant to be read, as by the discriminator of a GAN",
)
_SPECTRAL = (
    "frozen weight(s) have a spectral norm in train mode: each forward pass runs a power iteration, which changes the "
    "weight that the layer uses",
    'freeze with norm="freeze", or call .eval() on the layer after every model.train()',
)


def check_held(subject: Subject) -> Iterator[Finding]:
    """Norms that `freeze` holds in eval mode, while their parameters were made trainable by hand."""
    held = []
    for path, module in subject.modules():
        parameters = list(module.parameters(recurse=False))
        if holds_unasked(module) and any(p.requires_grad for p in parameters):
            held.append(path)
    if held:
        yield about(
            held,
            "held-statistics",
            "warning",
            f"{len(held)} norm(s) train their parameters, and freeze() still holds their statistics: they stay in eval "
            "mode whatever train() says",
            "call freezekit.unfreeze(model, ...) instead of setting requires_grad by hand",
        )


def _dropout_of(module: nn.Module) -> float:
    """The probability by which a module drops elements, heads or branches in train mode."""
    if isinstance(module, nn.RNNBase):
        return module.dropout if module.num_layers > 1 else 0.0
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout
    name = type(module).__name__.lower()
    # The last drops whole branches, as DropPath does.
    if isinstance(module, _DropoutNd) or "drop" in name or name == "stochasticdepth":
        probabilities = (getattr(module, attribute, None) for attribute in ("drop_prob", "p", "prob"))
        return next((float(p) for p in probabilities if isinstance(p, Real) and not isinstance(p, bool)), 0.0)
    return 0.0


def check_dropout(subject: Subject) -> Iterator[Finding]:
    """Dropout in train mode in a frozen part: its output is random, however frozen it is."""
    active = dropout_in_frozen_parts(subject.model)
    if active and subject.trainable:
        yield active_dropout(active, f"{len(active)} layer(s) of frozen parts drop at random, in train mode")


def dropout_in_frozen_parts(model: nn.Module) -> list[str]:
    """Paths of layers that drop at random in a frozen block, or between frozen layers of an `nn.Sequential`."""
    sequences = (_in_order(module) for module in model.modules() if _is_sequence(module))
    between = {id(module) for run in sequences for module in _between_frozen(list(run))}
    found = ((path, module) for path, module in model.named_modules() if drops(module))
    return [path for path, module in found if id(module) in between or is_in_frozen_block(model, path)]


def _is_sequence(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is nn.Sequential.forward and "forward" not in vars(module)


def _in_order(sequence: nn.Module) -> Iterator[nn.Module]:
    """What runs one after the other; an `nn.Sequential` within is part of it."""
    for child in sequence._modules.values():  # children() passes over one that comes again
        if child is not None:
            yield from _in_order(child) if _is_sequence(child) else (child,)


def _between_frozen(run: list[nn.Module]) -> Iterator[nn.Module]:
    """Modules without parameters that have a frozen one before and a frozen one behind them."""
    frozen = [all_frozen(module) if any(True for _ in module.parameters()) else None for module in run]
    for i, module in enumerate(run):
        before = next((flag for flag in frozen[:i][::-1] if flag is not None), False)
        behind = next((flag for flag in frozen[i + 1 :] if flag is not None), False)
        if frozen[i] is None and before and behind:
            yield module


def drops(module: nn.Module) -> bool:
    """Whether this is a layer that drops at random in its present mode."""
    return module.training and _dropout_of(module) > 0


def active_dropout(paths: Sequence[str], what: str) -> Finding:
    """The finding about frozen modules at ``paths``, which drop."""
    return about(
        paths,
        "active-dropout",
        "info",
        f"{what}: what these parts put out is random",
        "nothing, where that is wanted; else call .eval() on the frozen part after every model.train()",
    )
