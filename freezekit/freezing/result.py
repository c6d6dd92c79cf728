"""What a call of `freeze` or `unfreeze` did, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field


@dataclass(repr=False)
class Frozen:
    """What one call changed. As a context manager it restores it at the end of the block.

    Attributes:
        action: "freeze", "unfreeze" or "load".
        params: names whose ``requires_grad`` changed, tied names included.
        already: names that were selected and needed no change.
        norms: layers whose running statistics were frozen (or released).
        shared: per tied parameter, all its names: freezing one freezes the others.
        grads: names whose ``.grad`` was dropped.
        removed, returned: names taken out of, or put back into, groups of the optimizer.
        reset: names whose optimizer state was dropped.
        skipped: names that ``load_freeze_state(strict=False)`` could not match.

    `restore` gives back ``requires_grad``, ``.grad``, statistics, groups and optimizer state as they were, and touches
    no value: what trained in the block stays trained, and parameters that ``load_state_dict(assign=True)`` put there
    stay. Until then the object keeps the dropped gradients and optimizer state alive; drop it to free them.
    """

    action: str
    params: tuple[str, ...] = ()
    already: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    grads: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    returned: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    _undo: ExitStack = field(default_factory=ExitStack, compare=False)

    def on_restore(self, undo: Callable[[], object]) -> None:
        """Have `restore` call ``undo``; the last one given runs first."""
        self._undo.callback(undo)

    def restore(self) -> None:
        """Undo the call; a second time does nothing."""
        self._undo.close()

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        lines = [f"{self.action}: {_count(self.params, 'parameter')}"]
        rows = (
            ("already so", self.already),
            ("statistics", self.norms),
            ("tied", tuple(" = ".join(names) for names in self.shared)),
            (".grad dropped", self.grads),
            ("out of the optimizer", self.removed),
            ("back in the optimizer", self.returned),
            ("state reset", self.reset),
            ("skipped", self.skipped),
        )
        lines += [f"  {title}: {_list(names)}" for title, names in rows if names]
        return "\n".join(lines)


def _count(names: tuple[str, ...], noun: str) -> str:
    plural = noun if len(names) == 1 else noun + "s"
    return f"{len(names)} {plural}" + (f" ({_list(names)})" if names else "")


def _list(names: tuple[str, ...], most: int = 6) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
