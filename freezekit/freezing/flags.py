"""Tells those who do not read ``requires_grad`` at each call that it changed: torch.compile, and guards."""

from collections.abc import Iterable
from typing import Protocol
from weakref import WeakSet

from torch import nn

_MARK = "_freezekit_flags_changed"


class Watch(Protocol):
    """What `announce` tells of parameters that may train from now on: a guard."""

    def note_unfrozen(self, params: Iterable[nn.Parameter]) -> None: ...


watches: WeakSet[Watch] = WeakSet()


def announce(model: nn.Module, params: Iterable[nn.Parameter]) -> None:
    """To be called when flags of ``params``, or which norms are held, may have changed.

    Guards hear of it: what trains meanwhile and is frozen again is held to another value. A compiled model checks a
    parameter's flag. Under torch 2.11 it skips that while the dictionaries of its module are those that it has seen, by
    CPython's own count of writes: a step that was compiled frozen would go on frozen after `unfreeze`, without a word.
    So each dictionary is written to, and left as it was.
    """
    params = list(params)
    for watch in tuple(watches):
        watch.note_unfrozen(param for param in params if param.requires_grad)
    changed = {id(param) for param in params}
    for module in model.modules():
        own = module._parameters
        if type(own) is dict and any(id(param) in changed for param in own.values()):
            own[_MARK] = None
            del own[_MARK]
