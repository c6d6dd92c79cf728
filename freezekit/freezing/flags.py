"""Tells torch.compile, which does not read ``requires_grad`` at each call, that it changed."""

from collections.abc import Iterable

from torch import nn

_MARK = "_freezekit_flags_changed"


def announce(model: nn.Module, params: Iterable[nn.Parameter]) -> None:
    """To be called when flags of ``params`` may have changed.

    A compiled model checks a parameter's flag. Under torch 2.11 it skips that while the dictionaries of its module are
    those that it has seen, by CPython's own count of writes: a step that was compiled frozen would go on frozen after
    `unfreeze`, without a word. So each dictionary is written to, and left as it was.
    """
    changed = {id(param) for param in params}
    for module in model.modules():
        own = module._parameters
        if type(own) is dict and any(id(param) in changed for param in own.values()):
            own[_MARK] = None
            del own[_MARK]
