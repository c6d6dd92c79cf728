"""Attributes that were meant to freeze something and do nothing: ``bias.requires_brad = False``.

Python lets any attribute be set on a parameter and on a module, so a typo is silent (pytorch/pytorch#72332), and so is
``module.requires_grad = False``, which modules do not have.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher

import torch

from freezekit.conversion import SWAPS

from .report import Finding, about
from .subject import Subject, can_train

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
                    f"the method {attribute} was overwritten by {value!r}, so nothing was called",
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
    names = [
        name
        for name, module in subject.modules()
        if isinstance(module, tuple(SWAPS.values())) and vars(module).get("qconfig") is not None
    ]
    if names:
        yield about(
            names,
            "not-quantized",
            "error",
            f"{len(names)} layer(s) have a qconfig and stay in float: torch.ao.quantization passes over classes that "
            "are not torch.nn's own, without a word",
            "call freezekit.revert(model) before prepare, and freezekit.enable() in place of convert",
        )
