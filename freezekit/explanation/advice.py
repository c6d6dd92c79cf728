"""What converting, freezing, fusing or enabling would take away of a layer: only what saves, with how much.

How much is not worked out from the classes of layers but seen: the model is traced again, converted, converted and
frozen, and with freezekit enabled, on copies.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import nn

from freezekit import conversion
from freezekit._showing import bytes_text, flops_text
from freezekit.conversion.report import INSTALLED
from freezekit.enabling import enabled, is_enabled
from freezekit.explanation.record import Call, Trace
from freezekit.freezing import freeze
from freezekit.freezing.norm import has_statistics
from freezekit.fusion.classes import original_class, plan_of
from freezekit.fusion.layers import why_unfused
from freezekit.fusion.plan import make_plan
from freezekit.fusion.report import block_layers

Key = tuple[str, str, int]  # a call by module, function, and how many like it came before
Again = Callable[[Callable[[str, nn.Module], object], bool], Trace]

# Functions that keep as little by the same name in freezekit.functional, whatever learns and whatever runs before them.
FUNCTIONS = (
    *("relu", "relu6", "leaky_relu", "hardtanh", "dropout"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
)


class Held(NamedTuple):
    """Bytes that a call holds.

    first: those that no earlier call holds. shared: the others. alone: those that no other call holds.
    """

    first: int = 0
    shared: int = 0
    alone: int = 0

    @property
    def all(self) -> int:
        return self.first + self.shared


def held_by_call(traced: Trace) -> list[Held]:
    """What each call of a trace holds."""
    first, shared, alone = ([0] * len(traced.calls) for _ in range(3))
    for kept in traced.kept:
        first[kept.holders[0]] += kept.nbytes
        for holder in kept.holders[1:]:
            shared[holder] += kept.nbytes
        if len(kept.holders) == 1:
            alone[kept.holders[0]] += kept.nbytes
    return [Held(*found) for found in zip(first, shared, alone)]


class Advisor:
    """Knows what each call of a trace would hold with the model converted, with all of it frozen as well, or enabled.

    Args:
        traced: the model as it is.
        again: traces the model once more: on copies that its first argument has changed, and, if the second is True,
            with inputs that need a gradient.
    """

    def __init__(self, traced: Trace, again: Again) -> None:
        self._traced, self._again = traced, again
        self._fusible = _fusible(traced.modules)
        self._converted: dict[Key, Held] = {}
        self._frozen: dict[Key, Held] = {}
        if any(call.module is not None and not call.function for call in traced.calls):
            self._converted = _by_key(again(_convert, False))
            self._frozen = _by_key(again(_convert_and_freeze, True))
        self._free = _held_by_itself(traced, self._converted)

    @cached_property
    def _enabled(self) -> tuple[dict[Key, int], dict[Key, Held]]:
        """With freezekit enabled: how much each call alone would let go of, and what it would hold."""
        with enabled():
            then = _by_key(self._again(lambda name, module: None, False))
        return _held_by_itself(self._traced, then), then

    def advise(self, call: Call, key: Key, held: Held) -> str:
        """A sentence on one call; "" where nothing would be saved."""
        if call.function:
            name = call.function.rstrip("_")
            if name not in FUNCTIONS or _is_a_librarys(call.package):
                return self._advise_enabling(key, held)
            saved = self._saved_enabled(key, held, self._free)
            return f"call fk.functional.{name}: {saved}" if saved else ""
        swap = conversion.SWAPS.get(type(call.module)) if call.module is not None else None
        if call.learns("weight") and call.output_needs_grad:
            after = self._frozen.get(key, Held()).all if call.input_needs_grad else 0
            parts = [f"-{flops_text(call.flops)}"] if call.flops else []
            parts += [saved] if (saved := _saved(held, held.all, after)) else []
            return f"{'convert and ' if swap else ''}freeze: {', '.join(parts)}" if parts else ""
        saved = _saved(held, self._free[key], self._converted.get(key, held).all)
        if swap is not None and saved:
            return f"convert to {swap.__name__}: {saved}"
        return self._fusible.get(id(call.module), "") or self._advise_enabling(key, held)

    def _advise_enabling(self, key: Key, held: Held) -> str:
        """Advice for layers that freezekit has no class for, and for calls in code that is not the user's."""
        saved = self._saved_enabled(key, held)
        return f"fk.enable(): {saved}" if saved else ""

    def _saved_enabled(self, key: Key, held: Held, alone: dict[Key, int] | None = None) -> str:
        """What a call keeps less with freezekit enabled, of what it lets go of if it `alone` is replaced."""
        if not held.all or is_enabled():
            return ""
        free, then = self._enabled
        return _saved(held, (free if alone is None else alone)[key], then.get(key, held).all)


def _held_by_itself(traced: Trace, after: dict[Key, Held]) -> dict[Key, int]:
    """Bytes that each call holds now and that no other would hold any more if each held what it does `after`."""
    keys, held = _keys(traced), held_by_call(traced)
    lets_go = [after.get(key, now).all < now.all for key, now in zip(keys, held)]
    found: dict[Key, int] = defaultdict(int)
    for kept in traced.kept:
        for holder in kept.holders:
            if all(lets_go[other] for other in kept.holders if other != holder):
                found[keys[holder]] += kept.nbytes
    return found


def _keys(traced: Trace) -> list[Key]:
    seen: Counter[tuple[str, str]] = Counter()
    keys = []
    for call in traced.calls:
        keys.append((call.name, call.function, seen[call.name, call.function]))
        seen[call.name, call.function] += 1
    return keys


def _by_key(traced: Trace) -> dict[Key, Held]:
    return dict(zip(_keys(traced), held_by_call(traced)))


def keyed(traced: Trace) -> Iterable[tuple[Call, Key, Held]]:
    """Each call with its key and with what it holds."""
    return zip(traced.calls, _keys(traced), held_by_call(traced))


def _convert(name: str, module: nn.Module) -> None:
    conversion.convert(module)


def _convert_and_freeze(name: str, module: nn.Module) -> None:
    conversion.convert(module)
    if next(module.parameters(), None) is not None or any(map(has_statistics, module.modules())):
        freeze(module, norm="freeze")


def _is_a_librarys(package: str) -> bool:
    """Whether the code that makes a call belongs to an installed package, and not to the user."""
    source = getattr(sys.modules.get(package), "__file__", None)
    return source is not None and any(Path(source).is_relative_to(folder) for folder in INSTALLED)


def _saved(held: Held, most: int, after: int) -> str:
    """What goes when ``after`` bytes are held instead. What is shared goes when its last holder lets go of it."""
    if most <= after:
        return ""
    text = f"-{bytes_text(most - after)}"
    return text if held.alone == held.all else f"up to {text} (shared)"


def _fusible(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """By convolution: what `fuse` would make of it and the layers behind it, in blocks that are frozen now."""
    found: dict[int, str] = {}
    for name, module in modules.items():
        if plan_of(module) is not None or "forward" in module.__dict__ or next(module.children(), None) is None:
            continue
        if not any(isinstance(child, nn.Conv2d) for child in module.children()):
            continue
        for names in make_plan(module, original_class(module)).blocks:
            layers = block_layers(module, names)
            activation = names.activation if names.calls_function else _below(name, names.activation)
            rest = [part for part in (_below(name, names.norm), "add" if names.adds else "", activation) if part]
            if rest and layers is not None and not why_unfused(*layers):
                found[id(layers[0])] = f"fuse with {', '.join(rest)}: one kernel each way instead of {len(rest) + 1}"
    return found


def _below(name: str, path: str | None) -> str:
    """The whole name of what a module of that name knows by a path."""
    return f"{name}.{path}" if name and path else path or ""
