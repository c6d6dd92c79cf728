"""Checks of the model alone: attributes that do nothing, tied weights, shared storage, statistics that move.

Python lets any attribute be set on a parameter and on a module, so a typo such as ``bias.requires_brad = False`` is
silent (pytorch/pytorch#72332), and so is ``module.requires_grad = False``, which modules do not have.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from freezekit._arguments import shown
from freezekit.conversion import SWAPS
from freezekit.freezing.norm import holds_unasked, reads_batch

from .report import Finding, about
from .subject import Subject, all_frozen, can_train, is_in_frozen_block

# Words by which people of other libraries say "train this" (True) or "hold this still" (False inverts the meaning).
_INTENT = {
    "trainable": True,
    "is_trainable": True,
    "learnable": True,
    "frozen": False,
    "is_frozen": False,
    "freeze": False,
    "stop_gradient": False,
    "no_grad": False,
}
_METHODS = ("requires_grad_", "train", "eval", "zero_grad")


def _is_near(name: str, word: str) -> bool:
    """Whether ``name`` is a slip of ``word``: at most about two letters wrong, missing or swapped.

    >>> _is_near("requires_brad", "requires_grad"), _is_near("require_grad", "requires_grad")
    (True, True)
    >>> _is_near("is_shared", "requires_grad")
    False
    """
    return SequenceMatcher(None, name.lower().strip("_"), word).ratio() >= 0.85


def _says_train(name: str, value: object) -> bool | None:
    """What an attribute seems to ask for: True to train, False to freeze, None when it says nothing of the kind."""
    if not isinstance(value, bool):
        return None
    if _is_near(name, "requires_grad") and name != "requires_grad_":
        return value
    if name.lower() in _INTENT:
        return value == _INTENT[name.lower()]
    return None


def check_parameters(subject: Subject) -> Iterator[Finding]:
    """Attributes of parameters that ask for another state than ``requires_grad`` gives."""
    for name, p in subject.parameters.items():
        for attribute, value in vars(p).items():
            train = _says_train(attribute, value)
            if train is None or train == p.requires_grad or not can_train(p):
                continue
            yield Finding(
                "unknown-attribute",
                "error",
                f"{name}.{attribute}",
                f"{attribute} = {value} does nothing: torch has no such attribute on a parameter, "
                f"and {name}.requires_grad is {p.requires_grad}",
                f"set requires_grad = {train} and delete {attribute!r}",
                (name,),
            )


def check_modules(subject: Subject) -> Iterator[Finding]:
    """Attributes of modules that ask for another state than their parameters have, and overwritten methods."""
    for name, module in subject.modules():
        state = [p.requires_grad for p in module.parameters() if can_train(p)]
        stock = type(module).__module__.startswith("torch.nn.")
        for attribute, value in list(vars(module).items()):
            train = _says_train(attribute, value)
            # A user's class may have a flag of its own by such a name: only one that says "frozen" over trainable
            # parameters is worth a word, and no more than a warning.
            own_flag = not stock and attribute.lower() in _INTENT
            if train is not None and any(flag != train for flag in state) and not (own_flag and train):
                yield Finding(
                    "unknown-attribute",
                    "warning" if own_flag else "error",
                    f"{name}.{attribute}",
                    f"{attribute} = {value} changes no parameter: {sum(f != train for f in state)} of {len(state)} "
                    f"in {name} are not {'trained' if train else 'frozen'}",
                    f"call requires_grad_({train}) on the module"
                    + (", unless its own code reads it" if own_flag else ""),
                    (name,),
                )
            if attribute in _METHODS and not callable(value):
                yield Finding(
                    "overwritten-method",
                    "error",
                    f"{name}.{attribute}",
                    f"the method {attribute} was overwritten by {shown(value)}, so nothing was called",
                    f"delete the attribute and call {attribute}(...) instead of assigning to it",
                    (name,),
                )


def check_buffers(subject: Subject) -> Iterator[Finding]:
    """Buffers that require grad: an optimizer never sees them, and ``parameters()`` does not list them."""
    for name, buffer in subject.model.named_buffers():
        if isinstance(buffer, torch.Tensor) and buffer.requires_grad and buffer.is_leaf:
            yield Finding(
                "trainable-buffer",
                "warning",
                name,
                "a buffer that requires grad: its gradient is computed, but parameters() does not list it and no "
                "pattern by parameter name reaches it",
                "register it as nn.Parameter, or call requires_grad_(False) on it",
                (name,),
            )


def check_qconfig(subject: Subject) -> Iterator[Finding]:
    """Layers of freezekit's that torch.ao was to quantize: it knows exact classes, and passes over others."""
    qconfigs: dict[str, Any] = {}
    asked = []
    for path, module in subject.model.named_modules():
        # As prepare will hand it down: what a layer does not say is what the module around it says.
        qconfigs[path] = getattr(module, "qconfig", qconfigs.get(path.rpartition(".")[0]))
        if qconfigs[path] is not None and isinstance(module, tuple(SWAPS.values())):
            asked.append((path or "(root)", module))
    quantized = _quantized() if asked else ()
    names = [name for name, module in asked if isinstance(module, quantized)]
    yield from about(
        names,
        "not-quantized",
        "error",
        f"{len(names)} layer(s) have a qconfig and stay in float: torch.ao.quantization passes over classes that "
        "are not torch.nn's own, without a word",
        "call freezekit.revert(model) before prepare, and freezekit.enable() in place of convert",
    )


def _quantized() -> tuple[type[nn.Module], ...]:
    """Those of the classes that freezekit converts which torch.ao replaces. Others, as ReLU, and dropout in inference
    take quantized tensors as they are."""
    from torch.ao.quantization import quantization_mappings as maps

    classes = {*maps.get_default_static_quant_module_mappings(), *maps.get_default_dynamic_quant_module_mappings()}
    return tuple(kind for kind in SWAPS if kind in classes and not issubclass(kind, _DropoutNd))


def check_tied(subject: Subject) -> Iterator[Finding]:
    """A frozen tensor reached by several names in a model that trains: freezing one name froze them all."""
    if not subject.trainable:
        return
    for p in subject.frozen.values():
        names = subject.all_names[id(p)]
        if len(names) > 1:
            yield from about(
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
        yield from about(
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
    yield from about(
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
        yield from active_dropout(active, f"{len(active)} layer(s) of frozen parts drop at random, in train mode")


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


def active_dropout(paths: Sequence[str], what: str) -> Iterator[Finding]:
    """The finding about frozen modules at ``paths``, which drop."""
    return about(
        paths,
        "active-dropout",
        "info",
        f"{what}: what these parts put out is random",
        "nothing, where that is wanted; else call .eval() on the frozen part after every model.train()",
    )
