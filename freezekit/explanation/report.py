"""`explain`: a row for each layer, with what a training step computes and keeps now, and what would change it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import freezekit._C as _C
from freezekit._arguments import check_flag
from freezekit._inputs import Arguments, arguments, with_tensors
from freezekit._showing import BLUE, Shown, bytes_text, console_for, figure, flops_text
from freezekit._twin import looking_once
from freezekit.distributed.watching import unwrapped
from freezekit.explanation.advice import Advisor, Held, Key, keyed
from freezekit.explanation.kernels import WITHOUT_CHOICE, kernels_of
from freezekit.explanation.record import Call, Trace
from freezekit.explanation.trace import trace

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Row:
    """One layer, or one function that a module with children calls in its own forward.

    Attributes:
        name: the module's name; "" is the model itself, or the function that is explained, for what this calls itself.
        layer: the module's class, or that function's name, with the function that it calls where the row is one.
        inputs, outputs: shapes; of a nested tensor the size that is another for each part is a name, such as "j1".
        flops: of the forward pass; a dgrad and a wgrad cost as much again, each.
        fprop, dgrad, wgrad, db: whether a training step runs it now.
        bytes_kept: for backward, by this row first.
        bytes_shared: kept by an earlier row, which this one holds too.
        lossy: whether it keeps derivatives in few bits, as `enable` is asked to with a precision: gradients through it
            differ from stock's.
        made_from: of a row whose operand is made again in backward, the rows that keep what it is made from (see
            "Chains" in docs/enable.md).
        kernel: what computes it, and why; of a layer of freezekit's that is torch's own in this call, what makes it so;
            "always the same" of one that has no kernels; "" for what is not a layer of freezekit's.
        advice: what converting, freezing or fusing it would change; "" for nothing.
    """

    name: str
    layer: str
    inputs: tuple[int | str, ...]
    outputs: tuple[int | str, ...]
    flops: int
    fprop: bool
    dgrad: bool
    wgrad: bool
    db: bool
    bytes_kept: int
    bytes_shared: int
    lossy: bool
    made_from: tuple[str, ...]
    kernel: str
    advice: str

    @property
    def backward_flops(self) -> int:
        return self.flops * (self.dgrad + self.wgrad)


class Explanation(Shown):
    """What `explain` found: rows, totals, and ways to show them. Iterates over its rows.

    Attributes:
        rows: in forward order.
        measured: whether a copy ran on data; else none did.
    """

    def __init__(self, rows: list[Row], measured: bool = False) -> None:
        self.rows = rows
        self.measured = measured

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Explanation({len(self)} rows, {bytes_text(self.bytes_kept)} kept, {flops_text(self.flops)} forward)"

    @property
    def bytes_kept(self) -> int:
        """Bytes that autograd keeps from one forward pass, parameters and buffers aside."""
        return sum(row.bytes_kept for row in self.rows)

    @property
    def flops(self) -> int:
        """Of the forward pass."""
        return sum(row.flops for row in self.rows)

    @property
    def backward_flops(self) -> int:
        """Of the backward pass as the model is now."""
        return sum(row.backward_flops for row in self.rows)

    def totals(self) -> dict[str, int]:
        """Sums over the rows; bytes and floating-point operations."""
        return {"bytes_kept": self.bytes_kept, "flops": self.flops, "backward_flops": self.backward_flops}

    def to_dict(self) -> dict[str, Any]:
        """`{"rows": [...], "totals": {...}, "measured": bool}`, as plain data; a row has the attributes of `Row`."""
        return {"rows": [asdict(row) for row in self.rows], "totals": self.totals(), "measured": self.measured}

    def print(self, console: Console | None = None) -> None:
        """A table on the terminal, with the totals last."""
        from rich.table import Table

        meanings = {"aten": _C.choices.rule, WITHOUT_CHOICE: "freezekit has no kernels of its own for such layers"}
        said = [f"kernel {name}: {text}" for name, text in meanings.items() if any(row.kernel == name for row in self)]
        table = Table(title="what a training step computes and keeps now", caption="\n".join(said) or None)
        for column in ("name", "layer", "output"):
            table.add_column(column, overflow="fold")
        for column in ("forward", "runs", "kept", "also held"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("kernel", overflow="fold")
        table.add_column("what would change it", overflow="fold")
        for row in self.rows:
            shape = "x".join(map(str, row.outputs))
            kept, shared = (bytes_text(n) if n else "" for n in (row.bytes_kept, row.bytes_shared))
            kept += "\nlossy" if row.lossy else ""
            shared = "\n".join([*filter(None, [shared]), *(f"made from {name}" for name in row.made_from)])
            flops = flops_text(row.flops) if row.flops else ""
            runs = " ".join(name for name in ("fprop", "dgrad", "wgrad", "db") if getattr(row, name))
            table.add_row(row.name, row.layer, shape, flops, runs, kept, shared, row.kernel, row.advice)
        backward = f"backward {flops_text(self.backward_flops)}"
        table.add_section()
        table.add_row("total", f"{len(self)} rows", "", flops_text(self.flops), backward, bytes_text(self.bytes_kept))
        console_for(console).print(table)

    def plot(self, path: str | Path) -> None:
        """A PNG: bytes kept by each row, in order of the forward pass.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        rows = [row for row in self if row.bytes_kept]
        made = figure(8, max(2.0, 0.22 * len(rows) + 1))
        axes = made.subplots()
        axes.barh(range(len(rows)), [row.bytes_kept / 2**20 for row in rows], color=BLUE)
        axes.set_yticks(range(len(rows)), [f"{row.name} ({row.layer})" for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("kept for backward [MiB]")
        axes.set_title(f"{self.bytes_kept / 2**20:.1f} MiB kept between forward and backward")
        made.savefig(path, dpi=150)


def explain(model: Callable[..., Any], inputs: Any, *, measure: bool | None = None) -> Explanation:
    """What a training step of `model` computes and keeps now, layer by layer.

    A copy of the model runs one forward pass, in the mode that the model is in; nothing of the model itself changes.
    Where that is enough the copy holds no data: then nothing is computed, and a model too big for the machine can be
    explained. Bytes are those that autograd keeps between forward and backward; parameters and buffers are not counted,
    since they are there anyway, nor is what hooks that the forward sets itself, as ``save_on_cpu``, make of a tensor.

    Args:
        model: an nn.Module, or a callable over some, such as ``model.decode`` or ``lambda x: vae.decode(x)``; in the
            mode, and with the parameters frozen, that you want explained.
        inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments of its forward.
            Without data only shapes, dtypes and `requires_grad` matter: tensors on the meta device do.
        measure: True runs the copy on data and measures; the copy takes as much memory as the model, the step what a
            training step takes. False never does. None does where data is needed to tell, if the inputs hold some:
            for a forward that reads the values of its tensors (``.item()``), and for LSTMs, whose
            workspace is known to their library alone.

    Returns:
        Explanation: iterate over it, `.print()`, `.to_dict()`, `.plot("kept.png")`, `.bytes_kept`, `.flops`.

    Raises:
        TypeError: if `model` runs no nn.Module or cannot be copied, or `inputs` is none of those.
        RuntimeError: if its forward pass fails, or needs data that is not there.
        ValueError: if it is to be measured, and there is no data.

    >>> import torch, freezekit as fk
    >>> from torch import nn
    >>> net = fk.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))
    >>> explain(net, torch.empty(1, 3, 12, 12, device="meta"))
    Explanation(2 rows, 4.8 KiB kept, 117 kFLOP forward)
    >>> net[1].requires_grad_(False)  # keeps its input no more
    FreezableConv2d(8, 8, kernel_size=(3, 3), stride=(1, 1))
    >>> explain(net, torch.empty(1, 3, 12, 12, device="meta")).bytes_kept == 3 * 12 * 12 * 4
    True
    """
    if measure is not None:
        check_flag("measure", measure)
    model, given = unwrapped(model), arguments(inputs)
    with looking_once():
        return _explain(model, given, measure)


def _explain(model: Callable[..., Any], given: Arguments, measure: bool | None) -> Explanation:
    traced = trace(model, given, measure)

    def again(prepare: Callable[[str, nn.Module], object], learns: bool) -> Trace:
        try:
            return trace(model, learning(given) if learns else given, traced.measured, prepare)
        except Exception as error:  # of any class: the model was never run like this
            warnings.warn(f"no advice from a run of the model converted, frozen or enabled: {error}", stacklevel=5)
            return traced  # in which nothing is saved

    advisor = Advisor(traced, again)
    rows = [_row(advisor, traced, i, *found) for i, found in enumerate(keyed(traced))]
    shown = [row for row in rows if row.flops or row.bytes_kept or row.bytes_shared or row.fprop]
    return Explanation(shown, traced.measured)


def learning(inputs: Arguments) -> Arguments:
    """The same inputs as computed tensors, no leaves, which need a gradient wherever they can."""

    def learns(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            leaf = (value.clone() if value.is_inference() else value.detach()).requires_grad_()
            return leaf.view_as(leaf)
        return value

    with torch.inference_mode(False), torch.enable_grad():
        return with_tensors(learns, inputs)


def _title(call: Call) -> str:
    name = call.name or call.layer
    return f"{name}: {call.function}" if call.function else name


def _row(advisor: Advisor, traced: Trace, index: int, call: Call, key: Key, held: Held) -> Row:
    # The calls that keep what the operand of this one is made from.
    first = [kept.holders[0] for kept in traced.kept if index in kept.chained]
    sources = [traced.calls[i] for i in first if i != index]
    return Row(
        name=call.name,
        layer=f"{call.layer}: {call.function}" if call.function else call.layer,
        inputs=call.inputs,
        outputs=call.outputs,
        flops=call.flops,
        fprop=call.moved > 0,
        dgrad=call.input_needs_grad and call.output_needs_grad,
        wgrad=call.learns("weight"),
        db=call.learns("bias"),
        bytes_kept=held.first,
        bytes_shared=held.shared,
        lossy=any(kept.lossy and kept.holders[0] == index for kept in traced.kept),
        made_from=tuple(dict.fromkeys(map(_title, sources))),
        kernel=kernels_of(call, traced.has_device),
        advice=advisor.advise(call, key, held),
    )
