"""Running statistics that hold still: the one thing about freezing that ``requires_grad`` does not cover.

A normalisation layer with running statistics is *held* by an instance attribute ``train`` of class `Hold` that
hides the class's own method, so that ``model.train()`` reaches it and leaves the layer in eval mode. Why this and not

* a subclass put in by ``__class__``: ``type(m) is nn.BatchNorm2d`` would fail (tools key on it), and it fights with
  others that swap classes (parametrizations, FSDP2, `convert`) over the order of undoing;
* a forward pre-hook that resets the flag: ``m.training`` would say True between ``train()`` and the forward, and a
  compiled graph would have to replay the write;
* a patched ``nn.Module.train``: that is everybody's.

The attribute is in the instance's ``__dict__``: no entry in ``state_dict``, ``type`` and ``isinstance`` as before, and
read by no forward, so nothing recompiles. A copy of the module, shallow or deep, has its own (`standing`). A pickle
holds a stand-in made of the standard library alone, which holds the layer just as well: a frozen stock model loads
where freezekit is not installed (``del layer.train, layer.reset_running_stats`` releases the layer there), and stays
frozen in a process that it was sent to.

A trainer that records ``module.training`` before an evaluation and writes it back afterwards goes past ``train``: a
layer held in between is put into train mode. Nothing of the instance can refuse that write, so it is looked for after
every optimizer step of the process: the layer is put right, and a `NormWarning` says that its statistics moved. A
warning, for the step may be that of another model. A layer *released* in between gets eval mode back behind it: it is
looked for as well, and told from one that its user put there by `Released`.

What builds a new module loses it: convert to SyncBatchNorm first, then freeze.

Tools that compute statistics anew (``torch.optim.swa_utils.update_bn``) reset those of every batch norm first, and one
in eval mode would not fill them again. So a held layer keeps them: `KeptStatistics` hides its ``reset_running_stats``
in the same way. What writes to the buffers themselves is not stopped, but `guard` sees it.

Spectral norm has running statistics too: its singular vectors move at each forward in training, and with them the
weight that the layer uses, however frozen the parameter is. In eval they hold still, so they are held the same way.

Only `is_held` answers whether a layer is held.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.optim.optimizer import register_optimizer_step_post_hook

from freezekit._arguments import brief, check_module, shown
from freezekit.freezing.standing import StandIn

# What a layer was asked to do, in its dictionary, and so in copies and files of it.
_READS_BATCH = "_freezekit_reads_batch"
_LEARNS = "_freezekit_learns"


class NormWarning(UserWarning):
    """What a norm computes changed under ``freeze``, or its frozen statistics moved, without anybody having asked.

    Either `freeze` was not told what is to become of norms in train mode, or the mode of one that it holds, or that
    `unfreeze` released, was set past ``train()``. Or frozen statistics were to be reset, and were not.
    """


class _Train(StandIn):
    """Stands in for the ``train`` method of one layer; every optimizer step looks at the layer."""

    name = "train"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        _watched().add(module)

    def bind(self, module: nn.Module) -> None:
        super().bind(module)
        _watched().add(module)


class Hold(_Train):
    """Keeps a layer in eval mode.

    Args:
        module: the layer, with running statistics.
        parent: the module that it is registered in, whose mode it is to follow when it is released; None where there
            is none.
    """

    def __init__(self, module: nn.Module, parent: nn.Module | None) -> None:
        super().__init__(module)
        self.before = module.__dict__.get("train")
        self.asked = module.training
        # A layer that was put into another mode than its surroundings by hand returns to that mode. Where these are not
        # known, one that trains was not put into eval mode.
        self.follows = module.training if parent is None else parent.training == module.training

    def __call__(self, mode: bool = True) -> nn.Module:
        if not isinstance(mode, bool):
            raise ValueError(f"mode must be a bool, got {shown(mode)}")
        self.asked = mode
        type(self.module).train(self.module, False)
        return self.module

    def follow(self, memo: dict[int, Any]) -> None:
        self.before = copy.deepcopy(self.before, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, _stand_in(self.module)


class KeptStatistics:
    """Stands in for ``reset_running_stats`` of a held layer, and of copies of it; a file's does the same by itself."""

    says = (
        "reset_running_stats() of a layer whose running statistics freeze() holds: they stay as they are, and "
        "torch.optim.swa_utils.update_bn, or what else computes them anew, passes over this layer. If they are to be "
        "computed, call unfreeze() before, on the copy in an AveragedModel too"
    )

    def __call__(self) -> None:
        warnings.warn(self.says, NormWarning, stacklevel=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptStatistics":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (warnings.warn, self.says)


class Released(_Train):
    """Waits, in a layer that was released while its parent evaluates, for the first call of ``train()``.

    As long as there was none, it was no user who put the layer into another mode than its parent's.
    """

    def __init__(self, module: nn.Module, parent: nn.Module) -> None:
        super().__init__(module)
        self.parent: Callable[[], nn.Module | None] = ref(parent)

    def __call__(self, mode: bool = True) -> nn.Module:
        self.module.__dict__.pop("train", None)
        return self.module.train(mode)

    def bind(self, module: nn.Module) -> None:
        super().bind(module)
        self.source, self.parent = self.parent, lambda: None  # a shallow copy has no place in the parent

    def follow(self, memo: dict[int, Any]) -> None:
        copied = memo.get(id(self.source()))
        if copied is not None:
            self.parent = ref(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (type(self.module).train, self.module)

    def settle(self) -> bool:
        """Once the parent trains again, let the layer follow and end the wait. Returns whether it had not followed."""
        parent = self.parent()
        if parent is None or not parent.training:
            return False
        left = not self.module.training
        self(True)
        return left


@cache
def _watched() -> WeakSet[nn.Module]:
    """The layers that every optimizer step looks at, from the first of them on.

    After the step, so that `guard`, which looks before it, comes first.
    """
    register_optimizer_step_post_hook(_check_modes)
    return WeakSet()


def _check_modes(*step: Any) -> None:
    """Put layers right that are in another mode than they should be, and warn if there are any."""
    if torch.compiler.is_compiling():  # a step inside a compiled function: its graph is to be the same without us
        return
    held = [module for module in _watched() if module.training and is_held(module)]
    for module in held:
        module.training = False
    waiting = [(module, module.__dict__.get("train")) for module in _watched()]
    released = [module for module, wait in waiting if isinstance(wait, Released) and wait.settle()]
    for wrong, verb, mode, since in (
        (held, "freeze", True, "Its running statistics moved in every forward since; from here they hold still again"),
        (released, "unfreeze", False, "It used its running statistics in every forward since; from here it trains"),
    ):
        if wrong:
            layers = brief(list(map(str, wrong)))
            warnings.warn(
                f"{layers}: given to {verb}(), but .training was set to {mode} past train(), as a trainer does that "
                f"records every module's mode before an evaluation and restores it afterwards. {since}. Call {verb}() "
                "outside of the evaluation (in Lightning: on_train_epoch_start, not on_validation_*)",
                NormWarning,
                stacklevel=2,
            )


def _stand_in(module: nn.Module) -> tuple[Any, ...]:
    """What a `partial` is made of that takes a mode, or nothing, leaves ``module`` as it is, and returns it.

    ``getattr(module.eval, "__self__", mode)`` is ``module``: the mode is a default that is never needed.
    """
    return getattr, module.eval, "__self__"


def statistics_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The running statistics that ``module`` itself carries, by the names of their buffers.

    Means, variances and the counter of BatchNorm, SyncBatchNorm, InstanceNorm and whatever else names its buffers as
    they do; the singular vectors of spectral norm, as a parametrization and as the older hook.
    """
    own = dict(module._buffers.items())  # not itself a dict in a ScriptModule
    if not own:
        return {}
    pairs = [("running_mean", "running_var"), ("_u", "_v")]
    pairs += [(f"{h.name}_u", f"{h.name}_v") for h in module._forward_pre_hooks.values() if isinstance(h, SpectralNorm)]
    found: dict[str, torch.Tensor] = {}
    for pair in pairs:
        present = {name: buffer for name in pair if (buffer := own.get(name)) is not None}
        found.update(present if len(present) == 2 else {})
    counter = own.get("num_batches_tracked")
    if "running_mean" in found and counter is not None:
        found["num_batches_tracked"] = counter
    return found


def has_statistics(module: nn.Module) -> bool:
    """Whether ``module`` itself carries running statistics.

    >>> has_statistics(nn.BatchNorm2d(3)), has_statistics(nn.BatchNorm2d(3, track_running_stats=False))
    (True, False)
    """
    return bool(statistics_of(module))


def is_held(module: nn.Module) -> bool:
    """Whether ``module``'s running statistics are frozen: it uses them, keeps them, and ignores ``train()``.

    >>> import freezekit as fk
    >>> norm = nn.BatchNorm2d(4)
    >>> _ = fk.freeze(norm, norm="freeze")
    >>> fk.freezing.is_held(norm), norm.train().training
    (True, False)
    """
    check_module(module, "module")
    train = module.__dict__.get("train")
    from_pickle = isinstance(train, partial) and (train.func, *train.args) == _stand_in(module)
    return isinstance(train, Hold) or from_pickle


def hold(module: nn.Module, parent: nn.Module | None = None) -> None:
    """Freeze the running statistics of ``module``; no effect on one that is held already.

    Args:
        parent: the module that it is registered in; see `Hold`.
    """
    if is_held(module):
        return
    if isinstance(wait := module.__dict__.get("train"), Released):
        wait.settle()
        module.__dict__.pop("train", None)
    holder = Hold(module, parent)
    type(module).train(module, False)
    module.__dict__["train"] = holder
    keep_statistics(module)


def keep_statistics(module: nn.Module) -> None:
    """Have a held layer refuse resets. While it has no data it is filled by one: a lazy norm, one on meta."""
    has_data = not any(is_lazy(buffer) or buffer.is_meta for buffer in statistics_of(module).values())
    if has_data and hasattr(type(module), "reset_running_stats"):
        module.__dict__["reset_running_stats"] = KeptStatistics()


def release(module: nn.Module, parent: nn.Module | None = None) -> None:
    """Undo `hold`: the layer follows the mode of ``parent`` again. No effect on one that is not held.

    Not the mode that was last asked of the layer: a trainer that records every module's ``training`` and restores it
    asks a held layer for eval, which was not intended. That mode counts where there is no parent, since nothing tells a
    trainer from a user who evaluates, and for a layer whose mode differed from its parent's when it was held.
    """
    if not is_held(module):
        return
    holder = module.__dict__.pop("train")
    module.__dict__.pop("reset_running_stats", None)
    if getattr(holder, "before", None) is not None:
        module.__dict__["train"] = holder.before
    if parent is None or not getattr(holder, "follows", True):
        module.train(getattr(holder, "asked", module.training))
        return
    module.train(parent.training)
    if not parent.training and "train" not in module.__dict__:
        module.__dict__["train"] = Released(module, parent)


def note(module: nn.Module, *, batch: bool, learns: bool) -> None:
    """Note what was asked of a layer.

    Args:
        batch: its statistics are to move while its parameters are frozen.
        learns: its parameters are to train while its statistics are held.
    """
    for name, asked in ((_READS_BATCH, batch), (_LEARNS, learns)):
        if asked:
            module.__dict__[name] = True
        else:
            module.__dict__.pop(name, None)


def notes(module: nn.Module) -> dict[str, bool]:
    """The arguments of `note` that give what is noted now."""
    return {"batch": _READS_BATCH in module.__dict__, "learns": _LEARNS in module.__dict__}


def reads_batch(module: nn.Module) -> bool:
    """Whether ``freeze(norm="batch")`` left the statistics of ``module`` to move."""
    return _READS_BATCH in module.__dict__


def learns_held(module: nn.Module) -> bool:
    """Whether ``module`` is held and its parameters were told to train all the same, as ``unfreeze`` tells them."""
    return is_held(module) and _LEARNS in module.__dict__


def holds_unasked(module: nn.Module) -> bool:
    """Whether ``module`` is held and its parameters were not told to train all the same."""
    return is_held(module) and not learns_held(module)


def held_statistics(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    """The statistics that must not move: dotted name, buffer and layer."""
    for prefix, module in model.named_modules():
        if is_held(module):
            for name, buffer in statistics_of(module).items():
                yield f"{prefix}.{name}" if prefix else name, buffer, module
