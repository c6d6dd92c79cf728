"""Random single calls of conv2d and its derivatives, held against torch in float64.

Values are -1, 0 and 1, and no sum has more than 256 terms: every result is an integer that each dtype holds exactly,
whatever the order of summation. So equality is exact, on every backend.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freezekit.backends import switched
from freezekit.functional import conv2d

DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["nchw", "nchw", "nhwc", "transposed", "misaligned", "every second"]
TERMS = 256  # integers up to here are exact in bfloat16


@dataclass
class Call:
    """One call: sizes, settings, how the tensors lie, what learns, and what is asked of it."""

    input_size: tuple[int, ...]
    weight_size: tuple[int, ...]
    settings: dict[str, Any]
    dtype: torch.dtype
    backend: str
    device: str
    layouts: tuple[str, str, str]
    needs: tuple[bool, bool, bool]  # input, weight, bias
    bias: bool
    unbatched: bool
    mode: str  # "gradients", "no_grad" or "twice"
    seed: int = field(default=0)


class TorchFails(Exception):
    """A call that freezekit gives to ATen, and that F.conv2d itself gets wrong or does not survive."""


def draw(rng: random.Random) -> Call:
    """A call that most of the time is valid."""
    while True:
        call = _draw(rng)
        n, c, h, w = call.input_size
        k, _, r, s = call.weight_size
        if max(c * r * s, k * r * s, n * (h + 8) * (w + 8)) <= TERMS and min(h, w) > 0:
            return call


def _draw(rng: random.Random) -> Call:
    groups = rng.choice([1, 1, 1, 2, 3, 4, 8])
    cg, kg = rng.choice([(1, 1), (1, 2), (rng.randint(1, 6), rng.randint(1, 6))])
    r, s = rng.choice([(1, 1), (3, 3), (rng.randint(1, 5), rng.randint(1, 5))])
    settings: dict[str, Any] = dict(stride=_pair(rng, 1, 4), dilation=_pair(rng, 1, 3), groups=groups)
    padding = rng.random()
    if padding < 0.08:
        settings.update(padding="same", stride=1)
    elif padding < 0.12:
        settings.update(padding="valid")
    else:
        settings.update(padding=_pair(rng, 0, 4))
    extent = [rng.randint(1, 9), rng.randint(1, 9)]
    if rng.random() < 0.75:  # else the kernel may well be too large, which must be refused as torch refuses it
        spans = [d * (k - 1) + 1 for d, k in zip(_two(settings["dilation"]), (r, s))]
        padded = [2 * p for p in _two(settings["padding"])] if not isinstance(settings["padding"], str) else spans
        extent = [max(e, span - p) for e, span, p in zip(extent, spans, padded)]
    on_gpu = rng.random() < 0.5  # drawn on every machine, so that a case is the same problem on each
    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    own = "native" if device == "cuda" else "emulated"
    dtype = rng.choice(DTYPES)
    return Call(
        input_size=(rng.choice([0, 1, 1, 2, 3]), cg * groups, *extent),
        weight_size=(kg * groups, cg, r, s),
        settings=settings,
        dtype=dtype,
        backend=rng.choice(["auto", "aten", own, own]),
        device=device,
        layouts=(rng.choice(LAYOUTS), rng.choice(LAYOUTS), rng.choice(["nchw", "nhwc", "expanded"])),
        needs=(rng.random() < 0.6, rng.random() < 0.5, rng.random() < 0.5),
        bias=rng.random() < 0.5,
        unbatched=rng.random() < 0.1,
        # Second derivatives add up several sums: beyond what the short dtypes hold exactly.
        mode=rng.choice(["gradients"] * 6 + ["no_grad"] + ["twice"] * 4 * (dtype in (torch.float32, torch.float64))),
        seed=rng.randrange(2**31),
    )


def _pair(rng: random.Random, low: int, high: int) -> Any:
    a, b = (min(rng.randint(low, high), rng.randint(low, high)) for _ in range(2))
    return rng.choice([a, (a, b), [a, b], (a,)])


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def lay(tensor: Tensor, kind: str) -> Tensor:
    """The same values, lying differently."""
    if kind == "nhwc":
        return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
    if kind == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "misaligned":
        base = tensor.new_empty(tensor.numel() + 1)
        return base[1:].view(tensor.shape).copy_(tensor)
    if kind == "every second":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if kind == "expanded":
        return tensor[..., :1, :1].expand(tensor.shape)
    return tensor.contiguous()


def check(call: Call) -> None:
    """Raises AssertionError where freezekit and torch differ."""
    generator = torch.Generator().manual_seed(call.seed)

    def integers(*size: int) -> Tensor:
        return torch.randint(-1, 2, size, generator=generator)

    size = call.input_size[1:] if call.unbatched else call.input_size
    made = [integers(*size), integers(*call.weight_size), integers(call.weight_size[0]) if call.bias else None]
    try:
        expected = _run(F.conv2d, made, call, exact=True)
    except Exception as stock:
        _check_refused(made, call, stock)
        return
    half = call.dtype in (torch.float16, torch.bfloat16)
    if half and call.backend in ("auto", "aten") and _torch_crashes(made, call):
        raise TorchFails("ends the process")
    ours = _run(conv2d, made, call, exact=False)
    if (
        call.input_size[0] == 0 and not call.unbatched
    ):  # torch gives no second derivatives of an empty batch; freezekit gives zeros
        expected.update({n: torch.zeros(t.shape) for n, t in ours.items() if n.startswith("second")})
    assert ours.keys() == expected.keys(), f"{list(ours)} against {list(expected)}"
    for name, right in expected.items():
        mine = ours[name]
        assert mine.dtype == call.dtype, f"{name} has dtype {mine.dtype}"
        assert mine.shape == right.shape, f"{name} has shape {tuple(mine.shape)}, not {tuple(right.shape)}"
        off = (mine.double().cpu() != right).sum().item()
        if off and call.backend in ("auto", "aten") and not _torch_is_right(made, call, name, right):
            raise TorchFails(f"gives another {name}")  # seen in bfloat16, grouped, strided and dilated
        assert not off, f"{name}: {off} of {right.numel()} values differ"


def _torch_is_right(made: list[Any], call: Call, name: str, right: Tensor) -> bool:
    """Whether F.conv2d itself, on the same tensors in the same dtype, gives the exact result."""
    return torch.equal(_run(F.conv2d, made, call, exact=False)[name].double().cpu(), right)


def _torch_crashes(made: list[Any], call: Call) -> bool:
    """Whether F.conv2d itself ends a process, one of its own, by a signal: ATen is what freezekit calls there.

    oneDNN's kernels for float16 and bfloat16 do, on CPUs that have both, for some padded and dilated groups.
    """
    if call.device != "cpu":
        return False
    # A fork is quick; but autograd refuses to run in one once threads for CUDA devices exist.
    way = "spawn" if torch.cuda.is_initialized() or not hasattr(os, "fork") else "fork"
    child = multiprocessing.get_context(way).Process(target=_run_stock, args=(made, call))
    child.start()
    child.join()
    return (child.exitcode or 0) < 0


def _run_stock(made: list[Any], call: Call) -> None:
    faulthandler.disable()  # that it dies is the answer, not news
    with contextlib.suppress(Exception):
        _run(F.conv2d, made, call, exact=False)


def _check_refused(made: list[Any], call: Call, stock: Exception) -> None:
    try:
        _run(conv2d, made, call, exact=False)
    except Exception as error:
        ours: Exception | None = error
    else:
        ours = None
    assert type(ours) is type(stock), f"{ours!r}, where torch raises {stock!r}"


def _run(conv: Any, made: list[Any], call: Call, exact: bool) -> dict[str, Tensor]:
    """Output and gradients; `exact` is the reference: float64, contiguous, on the CPU, by torch."""
    dtype, device = (torch.float64, "cpu") if exact else (call.dtype, call.device)
    tensors = []
    for tensor, layout, needs in zip(made, (*call.layouts[:2], "nchw"), call.needs):
        if tensor is not None:
            tensor = tensor.to(device, dtype)
            tensor = (tensor if exact else lay(tensor, layout)).detach().requires_grad_(needs)
        tensors.append(tensor)
    names = [n for n, t in zip(("dx", "dw", "db"), tensors) if t is not None and t.requires_grad]
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    with torch.set_grad_enabled(call.mode != "no_grad"), switched(call.backend):
        y = conv(*tensors, **call.settings)
    if call.mode == "no_grad" or not leaves:
        assert not y.requires_grad
        return {"y": y}
    g = lay((torch.arange(y.numel()).view(y.shape) % 3 - 1).to(device, dtype), call.layouts[2])
    g = g.detach().requires_grad_(call.mode == "twice")
    grads = torch.autograd.grad(y, leaves, g, create_graph=call.mode == "twice")
    results = {"y": y, **dict(zip(names, grads))}
    if call.mode == "twice":
        again = [one for one in grads if one.requires_grad]
        v = [(torch.arange(one.numel()).view(one.shape) % 2).to(device, dtype) for one in again]
        second = torch.autograd.grad(again, [g, *leaves], v, allow_unused=True)
        results.update({f"second {n}": d for n, d in zip(("dy", *names), second) if d is not None})
    return results
