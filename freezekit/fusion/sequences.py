"""Sequences that do nothing but call their children in order, so that those may be called in their place."""

from __future__ import annotations

from typing import Any

from torch import nn

from freezekit.fusion.layers import has_global_hooks, is_watched

# Where a fused module's class keeps the class that it is made from.
ORIGINAL = "_freezekit_original"
# Names of a sequence's children, and of theirs where they are sequences too.
Shape = tuple[tuple[str, "Shape | None"], ...]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was fused."""
    return getattr(type(module), ORIGINAL, type(module))


def is_plain_sequence(module: nn.Module | None) -> bool:
    """Whether calling a module is calling its children one after the other, and nothing else."""
    if not isinstance(module, nn.Sequential):
        return False
    kind: Any = original_class(module)
    return (
        kind.forward is nn.Sequential.forward
        and kind.__iter__ is nn.Sequential.__iter__
        and kind.__call__ is nn.Module.__call__
        and not is_watched(module)
        and getattr(module, "_compiled_call_impl", None) is None
        and not has_global_hooks()
    )


def is_iterated_plainly(module: nn.Module | None) -> bool:
    """Whether a loop over a module is one over its children."""
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return False
    kind: Any = original_class(module)
    return kind.__iter__ is (nn.Sequential if issubclass(kind, nn.Sequential) else nn.ModuleList).__iter__


def members(sequence: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """What a plain sequence calls, with the paths; sequences in it are looked into."""
    found: list[tuple[tuple[str, ...], nn.Module]] = []
    for name, child in sequence._modules.items():
        if child is not None and is_plain_sequence(child):
            found += [((name, *path), module) for path, module in members(child)]
        elif child is not None:
            found.append(((name,), child))
    return found


def nested(sequence: nn.Module) -> list[str]:
    """Paths of the sequences that `members` looks into."""
    return sorted({".".join(path[:i]) for path, _ in members(sequence) for i in range(1, len(path))})


def shape(sequence: nn.Module) -> Shape:
    """What `is_still` compares."""
    return tuple(
        (name, shape(child) if child is not None and is_plain_sequence(child) else None)
        for name, child in sequence._modules.items()
    )


def is_list_of(module: nn.Module | None, names: tuple[str, ...]) -> bool:
    """Whether a loop over a module goes over the children of these names."""
    return is_iterated_plainly(module) and tuple(module._modules) == names  # type: ignore[union-attr]


def is_still(sequence: nn.Module | None, expected: Shape) -> bool:
    """Whether a sequence that was looked into is plain, and made up as it was; its layers may be others."""
    return is_plain_sequence(sequence) and has_shape(sequence, expected)  # type: ignore[arg-type]


def has_shape(sequence: nn.Module, expected: Shape) -> bool:
    """Whether a sequence is made up as it was."""
    children = sequence._modules
    if len(children) != len(expected):
        return False
    for (name, child), (wanted, inside) in zip(children.items(), expected, strict=True):
        if name != wanted or child is None or (inside is not None and not is_still(child, inside)):
            return False
    return True
