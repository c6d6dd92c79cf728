"""torch's own samples in random layouts, called in random ways: enabled against stock."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from tests.enabled.helpers import tolerance
from tests.enabled.test_op_info import OPS

REAL = [info for info in OPS if info.supports_dtype(torch.float32, "cpu")]
CASES = 40  # of one operator
MOST = 100  # samples to choose from: max_pool2d alone has 1,440
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16]

Call = Callable[..., Any]


def channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()]) if t.dim() in formats else t


def swapped(t: Tensor, a: int, b: int) -> Tensor:
    """The same values, in memory with two axes swapped."""
    return t.transpose(a, b).contiguous().transpose(a, b) if t.dim() >= 2 else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "channels last": channels_last,
    "columns first": lambda t: swapped(t, -1, -2),
    "batch inside": lambda t: swapped(t, 0, 1),
    "every other": lambda t: torch.stack([t, t], -1)[..., 0],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t,
    "expanded": lambda t: t[:, :1].expand(t.shape) if t.dim() >= 2 else t,
    "negative bit": lambda t: torch.complex(t, -t).conj().imag if t.dtype == torch.float32 else t,
}


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


def first_of(made: Any) -> Tensor:
    return tree_flatten(made)[0][0]


def with_no_grad(call: Call, x: Tensor) -> Any:
    with torch.no_grad():
        return call(x)


def in_inference_mode(call: Call, x: Tensor) -> Any:
    with torch.inference_mode():
        return call(x)


def under_hooks(call: Call, x: Tensor) -> Any:
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return call(x)


def under_autocast(call: Call, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call(x)


def with_a_tangent(call: Call, x: Tensor) -> Any:
    with forward_ad.dual_level():
        y = first_of(call(forward_ad.make_dual(x, torch.ones_like(x))))
        return tuple(t.detach() for t in forward_ad.unpack_dual(y) if t is not None)


def forward_over_reverse(call: Call, x: Tensor) -> Any:
    with forward_ad.dual_level():
        y = first_of(call(forward_ad.make_dual(x, torch.ones_like(x))))
        (dx,) = torch.autograd.grad(y.sum(), x)
        return tuple(t.detach() for t in forward_ad.unpack_dual(dx) if t is not None)


WAYS: dict[str, Callable[[Call, Tensor], Any]] = {
    "plainly": lambda call, x: call(x),
    "twice differentiated": lambda call, x: call(x),
    "batched gradients": lambda call, x: call(x),
    "of a view": lambda call, x: call((x * 1)[:]),
    "no_grad": with_no_grad,
    "inference mode": in_inference_mode,
    "hooks": under_hooks,
    "checkpoint": lambda call, x: checkpoint(call, x, use_reentrant=False),
    "autocast": under_autocast,
    "dual": with_a_tangent,
    "forward over reverse": forward_over_reverse,
    "jvp": lambda call, x: torch.func.jvp(lambda z: first_of(call(z)), (x,), (torch.ones_like(x),)),
    "func.grad": lambda call, x: torch.func.grad(lambda z: first_of(call(z)).sum())(x),
    "vmap": lambda call, x: torch.vmap(call, randomness="same")(torch.stack([x, x * 2])),
    "functionalize": lambda call, x: torch.func.functionalize(call)(x),
    "subclass": lambda call, x: tree_map(lambda y: y.as_subclass(torch.Tensor), call(x.as_subclass(Plain))),
}


@dataclass(frozen=True)
class Case:
    """A call on a sample's tensors, each in a layout of its own; the first learns, or some of the others, or none."""

    name: str
    call: Call
    in_place: bool
    tree: Any
    layouts: tuple[str, ...]
    learning: tuple[bool, ...]
    way: str

    def __str__(self) -> str:
        leaves = [tuple(v.shape) for v in tree_flatten(self.tree)[0] if isinstance(v, Tensor)]
        tensors = ", ".join(
            f"{shape} {layout}{' learns' if learns else ''}"
            for shape, layout, learns in zip(leaves, self.layouts, self.learning, strict=True)
        )
        others = [v for v in tree_flatten(self.tree)[0] if not isinstance(v, Tensor)]
        return f"{self.name}{'_' if self.in_place else ''} {self.way} of {tensors}, {others}"


def cases_of(info: Any) -> list[Case]:
    draw = random.Random(info.full_name)
    torch.manual_seed(0)
    samples = {
        dtype: list(islice(info.sample_inputs("cpu", dtype, requires_grad=False), MOST))
        for dtype in dict.fromkeys(DTYPES)
        if info.supports_dtype(dtype, "cpu")
    }
    cases = []
    for _ in range(CASES):
        sample = draw.choice(samples[draw.choice([dtype for dtype in DTYPES if dtype in samples])])
        tree = ((sample.input, *sample.args), sample.kwargs)
        tensors = [v for v in tree_flatten(tree)[0] if isinstance(v, Tensor)]
        in_place = info.inplace_variant is not None and draw.random() < 0.3
        chances = [0.8, *(0.3 for _ in tensors[1:])]
        cases.append(
            Case(
                info.full_name,
                info.inplace_variant if in_place else info.op,
                in_place,
                tree,
                tuple(draw.choice(list(LAYOUTS)) for _ in tensors),
                tuple(draw.random() < p and t.is_floating_point() for p, t in zip(chances, tensors)),
                draw.choice(list(WAYS)),
            )
        )
    return cases


def gradients(case: Case, y: Tensor, leaves: list[Tensor]) -> list[Any]:
    dy = (torch.arange(y.numel()).view(y.shape) % 5 - 2).to(y.dtype)
    if case.way == "batched gradients":
        return list(torch.autograd.grad(y, leaves, torch.stack([dy, dy - 1]), is_grads_batched=True, allow_unused=True))
    if case.way != "twice differentiated":
        return list(torch.autograd.grad(y, leaves, dy, allow_unused=True))
    dy.requires_grad_()
    first = torch.autograd.grad(y, leaves, dy, create_graph=True, allow_unused=True)
    learning = [g for g in first if g is not None and g.requires_grad]
    if not learning:
        return list(first)
    return [*first, *torch.autograd.grad(learning, [dy, *leaves], [g.detach() for g in learning], allow_unused=True)]


def layout_of(y: Tensor) -> list[int]:
    """The strides, where they tell where an element is."""
    return [stride for stride, size in zip(y.stride(), y.shape) if size > 1] if y.numel() else []


def run(case: Case) -> list[Any]:
    """Results, gradients, what became of the input and of the random numbers; or the error."""
    torch.manual_seed(0)
    values, spec = tree_flatten(case.tree)
    how = iter(zip(case.layouts, case.learning, strict=True))
    leaves: list[Tensor] = []

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        layout, learns = next(how)
        laid_out = LAYOUTS[layout](value.clone()) if value.is_floating_point() else value.clone()
        leaf = laid_out.detach().requires_grad_(learns)
        if learns:
            leaves.append(leaf)
        return leaf

    values = [own(value) for value in values]
    x = values[0]

    def call(x: Tensor) -> Any:
        if case.in_place:  # which refuses leaves
            x = x * 1
        args, kwargs = tree_unflatten([x, *values[1:]], spec)
        return case.call(*args, **kwargs)

    try:
        made = WAYS[case.way](call, x)
        outputs = [y for y in tree_flatten(made)[0] if isinstance(y, Tensor)]
        found: list[Any] = [y.detach() for y in outputs]
        found += [(y.requires_grad, y.is_leaf, y.is_inference(), y.dtype, layout_of(y)) for y in outputs]
        learning = [y for y in outputs if y.requires_grad]
        if leaves and learning:
            found += [g if g is None else g.detach() for g in gradients(case, learning[0], leaves)]
        return [*found, x.detach(), x._version, torch.get_rng_state()]
    except Exception as error:
        return [type(error), str(error)]


@pytest.mark.parametrize("info", REAL, ids=lambda info: info.full_name)
def test_layouts_and_ways_of_calling(info: Any) -> None:
    cases = cases_of(info)
    expected = [run(case) for case in cases]
    with fk.enabled():
        found = [run(case) for case in cases]
    assert any(isinstance(stock[0], Tensor) for stock in expected)  # not all are errors
    for case, ours, stock in zip(cases, found, expected, strict=True):
        assert len(ours) == len(stock), (str(case), ours, stock)
        for a, b in zip(ours, stock):
            if not isinstance(b, Tensor):
                assert a == b, str(case)
                continue
            torch.testing.assert_close(a, b, **tolerance(b), msg=lambda text, case=case: f"{case}: {text}")
