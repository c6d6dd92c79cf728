"""What all schedules share: freezing layers of a model that may be wrapped, and saying what changed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from freezekit._arguments import check_module, shown
from freezekit.distributed import rewrap, sync_buffers
from freezekit.distributed.watching import unwrapped
from freezekit.freezing import freeze, unfreeze
from freezekit.freezing.arguments import check_optimizers

from .layers import Layer, layers_of


@dataclass(frozen=True)
class Change:
    """What one `step` of a schedule changed; falsy when nothing did.

    Attributes:
        step: how many steps had been taken.
        frozen, thawed: names of the layers.
        rewrapped: whether the schedule's ``model`` is a new DDP wrapper, to be used from now on.
    """

    step: int
    frozen: tuple[str, ...] = ()
    thawed: tuple[str, ...] = ()
    rewrapped: bool = False

    def __bool__(self) -> bool:
        return bool(self.frozen or self.thawed)


def compile_entries(changes: int, *, validation: bool = True) -> int:
    """How many versions torch.compile makes of a model whose frozen set changes ``changes`` times.

    Each set of frozen parameters is a version of its own, and a validation pass under ``no_grad`` is one more for each.

    >>> compile_entries(3), compile_entries(3, validation=False)
    (8, 4)
    """
    return (changes + 1) * (2 if validation else 1)


def is_count(value: object) -> bool:
    """Whether that is an integer from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class Schedule:
    """Base of the schedules: holds the model, its layers, and which of them are frozen.

    Attributes:
        model: the model as it is to be called now. Under DDP a change of stage makes a new wrapper: use
            ``schedule.model``, or ``model = schedule.model`` after a `step` that returned a change.
        layers: what is frozen as one, first to last.
        steps: how many times `step` was called.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        layers: Sequence[Any] | None,
        remove: bool,
        state: Literal["keep", "reset"],
    ) -> None:
        check_module(model)
        if isinstance(getattr(model, "_orig_mod", None), DDP):
            raise ValueError("model is a compiled DDP wrapper, which cannot be rewrapped: compile inside DDP, "
                             "DDP(torch.compile(model))")  # fmt: skip
        given = check_optimizers(optimizer, remove, state)
        if len(given) > 1:
            raise TypeError(f"optimizer must be one torch.optim.Optimizer, got {len(given)}")
        self.model = model
        self.optimizer = given[0] if given else None
        self.remove, self.state = remove, state
        self.layers: tuple[Layer, ...] = layers_of(unwrapped(model), layers)
        self.steps = 0
        self._frozen: set[str] = set()

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the layers that the schedule holds frozen, first to last."""
        return tuple(layer.name for layer in self.layers if layer.name in self._frozen)

    def _set(self, frozen: Iterable[str]) -> Change:
        """Freeze these layers and no other of the schedule's; rewrap DDP when anything changes."""
        wanted = set(frozen)
        new = [layer for layer in self.layers if layer.name in wanted - self._frozen]
        old = [layer for layer in self.layers if layer.name in self._frozen - wanted]
        if not (new or old):
            return Change(self.steps)
        inner = unwrapped(self.model)
        ddp = self.model if isinstance(self.model, DDP) else None
        if ddp:
            sync_buffers(ddp)
        if new:
            freeze(inner, *(p for layer in new for p in layer.patterns), optimizer=self.optimizer, remove=self.remove,
                   state=self.state, norm="freeze")  # fmt: skip
        if old:
            unfreeze(inner, *(p for layer in old for p in layer.patterns), optimizer=self.optimizer, state=self.state)
        self._frozen = wanted
        if ddp:
            self.model = rewrap(ddp)
        return Change(self.steps, tuple(x.name for x in new), tuple(x.name for x in old), ddp is not None)

    def _config(self) -> dict[str, Any]:
        """What must be the same for a saved state to fit."""
        return {"kind": type(self).__name__, "layers": [layer.name for layer in self.layers]}

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, as plain data and tensors."""
        return {"config": self._config(), "steps": self.steps, "frozen": list(self.frozen)}

    def load_state_dict(self, state: dict[str, Any]) -> Change:
        """Take up where ``state`` was saved, and freeze what was frozen then.

        Load the model and the optimizer first. Under DDP the wrapper is rebuilt: use ``schedule.model`` afterwards.

        Raises:
            ValueError: the state is of a schedule with other settings, or not whole; the message names what differs.
            TypeError: the state is not a dict.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be the dict that state_dict() returns, got {type(state).__name__}")
        mine, theirs = self._config(), state.get("config", {})
        if not isinstance(theirs, dict):
            raise ValueError(f"state: 'config' must be a dict, got {shown(theirs)}")
        differ = [f"{k} is {shown(mine.get(k))} here and {shown(theirs.get(k))} there" for k in sorted({*mine, *theirs})
                  if mine.get(k) != theirs.get(k)]  # fmt: skip
        if differ:
            raise ValueError(f"state is of another schedule: {'; '.join(differ)}")
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(f"state must be whole, it has no {', '.join(map(repr, missing))}")
        for key, wanted in self._misfits(state):
            raise ValueError(f"state: {key!r} must be {wanted}, got {shown(state[key])}")
        self.steps = state["steps"]
        return self._set(state["frozen"])

    def _misfits(self, state: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """What of a whole state is not as `state_dict` has it: the key, and what it should be."""
        if not is_count(state["steps"]):
            yield "steps", "a number of steps"
        if not self._are_layers(state["frozen"], list):
            yield "frozen", "a list of layers"

    def _are_layers(self, names: object, kind: type) -> bool:
        known = [layer.name for layer in self.layers]
        return isinstance(names, kind) and all(name in known for name in cast("Iterable[object]", names))
