"""What is fused, what is not, and why, in the model's present state."""

from dataclasses import dataclass

from torch import nn

from freezekit._arguments import check_module
from freezekit.fusion.classes import original_class, plan_of
from freezekit.fusion.identity import classes_read
from freezekit.fusion.layers import activation_kind, why_unfused
from freezekit.fusion.plan import BlockNames, make_plan


@dataclass(frozen=True)
class BlockReport:
    """One convolution and what runs with it.

    Attributes:
        conv: the convolution's name in the model.
        norm: the batch norm's name; "" without one.
        activation: "relu", "relu6" or "none".
        residual: whether a tensor is added before the activation.
        fused: whether it would run as one operator in a call made now.
        reason: why it would not; "" otherwise.
        outside: the name of a norm behind the convolution that runs on its own; "" without one.
    """

    conv: str
    norm: str
    activation: str
    residual: bool
    fused: bool
    reason: str = ""
    outside: str = ""

    def __str__(self) -> str:
        parts = [self.conv, self.norm, "add" if self.residual else "", self.activation.replace("none", "")]
        text = " + ".join(filter(None, parts))
        if not self.fused:
            return f"{text}: not fused, {self.reason}"
        if self.outside:
            return f"{text}: fused, but {self.outside} behind it runs on its own"
        # A norm behind it may stand in the caller, which the report cannot see from here.
        return f"{text}: fused, the convolution alone" if text == self.conv else f"{text}: fused"


def fusion_report(model: nn.Module) -> list[BlockReport]:
    """A row for every call of an `nn.Conv2d` that `fuse` knows of, and for every convolution that it could not place.

    Says what a call made now would do: the same blocks run fused while their layers are frozen, and layer by layer
    while they train.

    >>> from torch import nn
    >>> from freezekit.fusion import fuse, fusion_report
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
    >>> print(*fusion_report(fuse(model)))
    0 + 1 + relu: fused
    >>> print(*fusion_report(model.requires_grad_()))
    0 + 1 + relu: not fused, the convolution is trainable
    """
    check_module(model)
    rows: list[BlockReport] = []
    placed: set[str] = set()
    reasons: dict[str, str] = {}
    looked_at = classes_read(model)
    inside: set[str] = set()  # sequences that a module around them runs the layers of
    for name, module in model.named_modules():
        plan = plan_of(module)
        if name in inside:
            continue
        if plan is None or "forward" in module.__dict__:
            reasons[name] = looked_at.get(id(module)) or _why_not_rewritten(module)
            continue
        inside.update(f"{name}.{path}" if name else path for path in plan.sequences)
        for names in plan.blocks:
            row = _row(module, f"{name}." if name else "", names)
            rows.append(row)
            placed.add(row.conv)
        if plan.reason:
            reasons[name] = plan.reason
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name not in placed:
            parent = name.rpartition(".")[0]
            reason = reasons.get(parent, "") if name else "it is the whole model: no module contains it"
            reason = reason or "no forward that could be read calls it by this name"
            rows.append(BlockReport(name, "", "none", False, False, reason))
    return rows


def block_layers(
    module: nn.Module, names: BlockNames
) -> tuple[nn.Module, nn.Module | None, nn.Module | str | None] | None:
    """A block's convolution, norm and activation; an activation that is a function is its name. None if one is gone."""
    activation: nn.Module | str | None = names.activation
    try:
        if names.activation is not None and not names.calls_function:
            activation = module.get_submodule(names.activation)
        norm = None if names.norm is None else module.get_submodule(names.norm)
        return module.get_submodule(names.conv), norm, activation
    except AttributeError:
        return None


def _row(module: nn.Module, prefix: str, names: BlockNames) -> BlockReport:
    layers = block_layers(module, names)
    reason, kind = "a layer of it is gone", names.activation or "none"
    if layers is not None:
        reason, activation = why_unfused(*layers), layers[-1]
        kind = activation_kind(activation) or type(activation).__name__
    norm, outside = (prefix + path if path else "" for path in (names.norm, names.outside))
    return BlockReport(prefix + names.conv, norm, kind, names.adds, not reason, reason, outside)


def _why_not_rewritten(module: nn.Module) -> str:
    if "forward" in module.__dict__:
        return "the module around it has a forward of its own instance"
    if any(True for _ in module.children()):
        return make_plan(module, original_class(module)).reason
    return ""
