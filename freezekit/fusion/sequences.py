"""Sequences that do nothing but call their children in order, so that those may be called in their place."""

from typing import Any, TypeAlias

from torch import nn

from freezekit.fusion.layers import has_global_hooks, is_watched

# Where a fused module's class keeps the class that it is made from.
ORIGINAL = "_freezekit_original"
# Names of a sequence's children, and of theirs where they are sequences too.
Shape = tuple[tuple[str, "Shape | None"], ...]
# The dictionary that a loop over a module goes over to its end, whatever takes the module's place meanwhile.
Children: TypeAlias = dict[str, nn.Module | None]


_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl


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
        and kind.__call__ is _CALL
        and kind._call_impl is _CALL_IMPL
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
    """What `children_of_sequence` compares."""
    return tuple(
        (name, shape(child) if child is not None and is_plain_sequence(child) else None)
        for name, child in sequence._modules.items()
    )


def children_of_list(module: nn.Module, names: tuple[str, ...]) -> Children | None:
    """What a loop over a module goes over, if these are the names of its children now."""
    return module._modules if is_iterated_plainly(module) and tuple(module._modules) == names else None


def children_of_sequence(sequence: nn.Module, expected: Shape) -> Children | None:
    """What a sequence that was looked into calls, if it is plain and made up as it was; its layers may be others."""
    return sequence._modules if is_plain_sequence(sequence) and has_shape(sequence, expected) else None


def has_shape(sequence: nn.Module, expected: Shape) -> bool:
    """Whether a sequence is made up as it was."""
    children = sequence._modules
    if len(children) != len(expected):
        return False
    for (name, child), (wanted, inside) in zip(children.items(), expected, strict=True):
        if name != wanted or child is None or (inside is not None and children_of_sequence(child, inside) is None):
            return False
    return True
