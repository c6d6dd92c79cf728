"""Malformed calls of what is public beside the layers: what each is, its exception, and what the text must say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import freezekit as fk
from freezekit.backends import current_backend
from freezekit.conversion import conversion_report
from freezekit.distributed import rewrap
from freezekit.freezing import PatternError, is_held, load_freeze_state
from freezekit.functional import conv2d_bias_grad
from freezekit.fusion import fusion_report
from freezekit.guarding import Guard
from freezekit.planning import Machine
from freezekit.schedules import FreezeOut, UpdateNorm
from freezekit.tuning import choices, clear_choices, dump_choices, load_choices

X, G = torch.ones(2, 4, 8, 8), torch.ones(2, 6, 6, 6)
MACHINE = Machine(flops=1e11, bandwidth=1e10)


@dataclass(frozen=True)
class Call:
    """One malformed call of a public name; `says` are parts of the text of its error."""

    public: str
    what: str
    call: Callable[[nn.Module, torch.optim.Optimizer], Any]
    kind: type[Exception]
    says: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.public}, {self.what}"


CALLS: list[Call] = []


def rows(public: str, *calls: tuple[str, Callable[..., Any], type[Exception], tuple[str, ...]]) -> None:
    CALLS.extend(Call(public, *call) for call in calls)


def first(
    public: Callable[..., Any], argument: str = "model", more: Callable[..., tuple[Any, ...]] = lambda m, o: ()
) -> None:
    """`public` wants a module first: text, nothing and a class are none."""
    for value in ("resnet50", None, nn.Conv2d):
        kind = type(value).__name__
        call = lambda m, o, value=value: public(value, *more(m, o))  # noqa: E731
        rows(public.__name__, (f"{argument} of type {kind}", call, TypeError, (argument, "Module", kind)))


def recorded() -> fk.profile:
    with fk.profile() as profile:
        pass
    return profile


def state_of(model: nn.Module, **changed: Any) -> dict[str, Any]:
    return {**fk.freeze_state(model), **changed}


first(fk.audit)
rows(
    "audit",
    ("an optimizer's name", lambda m, o: fk.audit(m, "sgd"), TypeError, ("optimizer", "Optimizer", "'sgd'")),
    ("a number among optimizers", lambda m, o: fk.audit(m, [o, 3]), TypeError, ("optimizer", "3")),
    ("schedule of a number", lambda m, o: fk.audit(m, schedule=3), TypeError, ("schedule", "compile_entries", "int")),
    ("input of rank 2", lambda m, o: fk.audit(m, inputs=torch.ones(2, 3)), RuntimeError, ("input", r"[2, 3]")),
)
rows(
    "backend",
    ("no backend", lambda m, o: fk.backend("cuda"), ValueError, ("backend", "aten", "'cuda'")),
    ("None", lambda m, o: fk.backend(None), ValueError, ("backend", "aten", "None")),
    ("hopper of text", lambda m, o: fk.backend("native", hopper="yes"), TypeError, ("hopper", "True", "'yes'")),
    ("hopper for aten", lambda m, o: fk.backend("aten", hopper=True), ValueError, ("hopper", "native", "'aten'")),
)
rows("choices", ("an argument", lambda m, o: choices(1), TypeError, ("choices", "1 was given")))
rows("dump_choices", ("an argument", lambda m, o: dump_choices(1), TypeError, ("dump_choices", "1 was given")))
rows("clear_choices", ("an argument", lambda m, o: clear_choices(1), TypeError, ("clear_choices", "1 was given")))
rows(
    "current_backend",
    ("an argument", lambda m, o: current_backend("aten"), TypeError, ("current_backend", "1 was given")),
)
rows(
    "conv2d_bias_grad",
    ("no tensor", lambda m, o: conv2d_bias_grad(None), TypeError, ("grad_output", "Tensor", "NoneType")),
    ("rank 1", lambda m, o: conv2d_bias_grad(G[0, 0, 0]), RuntimeError, ("grad_output", "4 dimensions", "[6]")),
    ("rank 3", lambda m, o: conv2d_bias_grad(G[0]), RuntimeError, ("grad_output", "4 dimensions", "[6, 6, 6]")),
    ("sparse", lambda m, o: conv2d_bias_grad(G.to_sparse()), RuntimeError, ("grad_output", "dense", "Sparse")),
    ("no backend", lambda m, o: conv2d_bias_grad(G, backend="x"), ValueError, ("backend", "aten", "'x'")),
    ("native on a CPU", lambda m, o: conv2d_bias_grad(G, backend="native"), RuntimeError, ("native", "cpu")),
)
first(conversion_report)
rows(
    "conversion_report",
    (
        "input of rank 2",
        lambda m, o: conversion_report(m, inputs=torch.ones(2, 3)),
        RuntimeError,
        ("input", "[2, 3]"),
    ),
)
for swap in (fk.convert, fk.revert):
    first(swap)
    rows(
        swap.__name__,
        ("only a number", lambda m, o, f=swap: f(m, only=3), TypeError, ("only", "names", "3")),
        ("only another class", lambda m, o, f=swap: f(m, only=[int]), TypeError, ("only", "nn.Module", "int")),
        ("only what is not there", lambda m, o, f=swap: f(m, only="9.*"), PatternError, ("only", "'9.*'")),
    )
first(fk.explain, more=lambda m, o: (X,))
rows(
    "explain",
    ("input of rank 2", lambda m, o: fk.explain(m, torch.ones(2, 3)), RuntimeError, ("Sequential", "input", "[2, 3]")),
    ("no input", lambda m, o: fk.explain(m, None), TypeError, ("inputs", "tensor", "NoneType")),
    ("two inputs", lambda m, o: fk.explain(m, (X, X)), TypeError, ("forward", "3 were given")),
    ("another keyword", lambda m, o: fk.explain(m, {"y": X}), TypeError, ("forward", "'y'")),
)
for change in (fk.freeze, fk.unfreeze):
    first(change)
    rows(
        change.__name__,
        ("unknown name", lambda m, o, f=change: f(m, "9"), PatternError, ("patterns", "'9'", "'0'")),
        ("a number for a name", lambda m, o, f=change: f(m, 3), TypeError, ("patterns", "name", "3")),
        ("another class", lambda m, o, f=change: f(m, int), TypeError, ("patterns", "nn.Module", "int")),
        ("a list of numbers", lambda m, o, f=change: f(m, [7]), TypeError, ("patterns", "name", "7")),
        ("an empty list", lambda m, o, f=change: f(m, []), PatternError, ("patterns", "empty list", "nothing")),
        ("class of no layer", lambda m, o, f=change: f(m, nn.Linear), PatternError, ("Linear", "Conv2d")),
        ("no optimizer", lambda m, o, f=change: f(m, optimizer="sgd"), TypeError, ("optimizer", "Optimizer", "str")),
        ("state", lambda m, o, f=change: f(m, optimizer=o, state="drop"), ValueError, ("state", "keep", "'drop'")),
        ("state of nothing", lambda m, o, f=change: f(m, state="reset"), ValueError, ("state", "optimizer")),
        ("norm", lambda m, o, f=change: f(m, norm="hold"), ValueError, ("norm", "batch", "'hold'")),
        ("until a number", lambda m, o, f=change: f(m, until=3), TypeError, ("until", "name", "3")),
        ("until what is not there", lambda m, o, f=change: f(m, until="9"), PatternError, ("until", "'9'", "'0'")),
        ("inputs for nothing", lambda m, o, f=change: f(m, inputs=X), ValueError, ("inputs", "until")),
    )
rows(
    "freeze",
    ("remove from nothing", lambda m, o: fk.freeze(m, remove=True), ValueError, ("remove", "optimizer")),
    (
        "remove of text",
        lambda m, o: fk.freeze(m, optimizer=o, remove="yes"),
        TypeError,
        ("remove", "True or False", "'yes'"),
    ),
)
rows(
    "unfreeze",
    (
        "group past the end",
        lambda m, o: fk.unfreeze(m, optimizer=o, group=7),
        ValueError,
        ("group", "from 0 to 0", "7"),
    ),
    ("group of text", lambda m, o: fk.unfreeze(m, optimizer=o, group="a"), ValueError, ("group", "index", "'a'")),
    ("group of nothing", lambda m, o: fk.unfreeze(m, group=0), ValueError, ("group", "optimizer")),
)
first(fk.freeze_state)
rows("freeze_state", ("no optimizer", lambda m, o: fk.freeze_state(m, [3]), TypeError, ("optimizer", "int")))
first(load_freeze_state, more=lambda m, o: (state_of(m),))
rows(
    "load_freeze_state",
    ("no state", lambda m, o: load_freeze_state(m, None), ValueError, ("state", "dict", "NoneType")),
    ("empty", lambda m, o: load_freeze_state(m, {}), ValueError, ("state", "freeze_state", "'version'")),
    ("version", lambda m, o: load_freeze_state(m, state_of(m, version=9)), ValueError, ("version", "1", "9")),
    ("names", lambda m, o: load_freeze_state(m, state_of(m, frozen=3)), ValueError, ("'frozen'", "list", "3")),
    ("other names", lambda m, o: load_freeze_state(m, state_of(m, frozen=["x"])), ValueError, ("state", "'x'")),
    ("strict", lambda m, o: load_freeze_state(m, state_of(m), strict="no"), TypeError, ("strict", "True", "'no'")),
    ("optimizers", lambda m, o: load_freeze_state(m, state_of(m), o), ValueError, ("optimizer", "none", "1")),
)
for fusing in (fk.fuse, fk.unfuse, fusion_report):
    first(fusing)
first(is_held, "module")
for watch in (fk.guard, Guard):
    first(watch, more=lambda m, o: (o, 1, "raise"))
    rows(
        watch.__name__,
        ("no optimizer", lambda m, o, f=watch: f(m, "o", 1, "raise"), TypeError, ("optimizer", "Optimizer", "str")),
        ("every 0 steps", lambda m, o, f=watch: f(m, o, 0, "raise"), ValueError, ("every", "from 1", "0")),
        ("every 1.5 steps", lambda m, o, f=watch: f(m, o, 1.5, "raise"), ValueError, ("every", "from 1", "1.5")),
        ("mode", lambda m, o, f=watch: f(m, o, 1, "warn"), ValueError, ("mode", "restore", "'warn'")),
    )
rows(
    "load_choices",
    ("a number", lambda m, o: load_choices(3), TypeError, ("text", "str", "int")),
    ("bytes", lambda m, o: load_choices(b"{}"), TypeError, ("text", "str", "bytes")),
    ("no JSON", lambda m, o: load_choices("no json"), ValueError, ("text", "dump_choices", "no json")),
    ("a list", lambda m, o: load_choices("[]"), ValueError, ("text", "dump_choices", "[]")),
    ("half", lambda m, o: load_choices('{"choices": []}'), ValueError, ("text", "dump_choices", "measured_with")),
    (
        "choices of another kind",
        lambda m, o: load_choices('{"measured_with": {}, "choices": [3]}'),
        ValueError,
        ("text", "dump_choices", "[3]"),
    ),
)
first(fk.plan, more=lambda m, o: (X,))
rows(
    "plan",
    ("memory of text", lambda m, o: fk.plan(m, X, memory="1G"), TypeError, ("memory", "number", "'1G'")),
    ("memory of a bool", lambda m, o: fk.plan(m, X, memory=True), TypeError, ("memory", "number", "True")),
    ("no memory", lambda m, o: fk.plan(m, X, memory=0), ValueError, ("memory", "positive", "0")),
    ("memory of NaN", lambda m, o: fk.plan(m, X, memory=float("nan")), ValueError, ("memory", "positive", "nan")),
    ("negative time", lambda m, o: fk.plan(m, X, time=-1.0), ValueError, ("time", "positive", "-1.0")),
    ("machine by name", lambda m, o: fk.plan(m, X, machine="h100"), TypeError, ("machine", "Machine", "str")),
    ("nothing to freeze", lambda m, o: fk.plan(nn.ReLU(), X), ValueError, ("model", "parameters")),
    ("rank 2", lambda m, o: fk.plan(m, torch.ones(2, 3), machine=MACHINE), RuntimeError, ("input", "[2, 3]")),
    (
        "measure without data",
        lambda m, o: fk.plan(m, X.to("meta"), machine=MACHINE, measure=True),
        ValueError,
        ("measure", "data", "meta"),
    ),
)
for public, call in {
    "audit": lambda inputs: lambda m, o: fk.audit(m, o, inputs),
    "conversion_report": lambda inputs: lambda m, o: conversion_report(m, inputs),
    "explain": lambda inputs: lambda m, o: fk.explain(m, inputs),
    "freeze": lambda inputs: lambda m, o: fk.freeze(m, until="0", inputs=inputs),
    "plan": lambda inputs: lambda m, o: fk.plan(m, inputs, machine=MACHINE),
    "unfreeze": lambda inputs: lambda m, o: fk.unfreeze(m, until="0", inputs=inputs),
}.items():
    rows(
        public,
        ("inputs of a number", call(3), TypeError, ("inputs", "tensor", "tuple", "int")),
        ("inputs of text", call("x"), TypeError, ("inputs", "tensor", "tuple", "str")),
        ("inputs by number", call({0: X}), TypeError, ("inputs", "name", "0")),
    )
rows(
    "profile",
    ("an argument", lambda m, o: fk.profile("cpu"), TypeError, ("profile", "2 were given")),
    ("read before its block", lambda m, o: fk.profile().counts(), RuntimeError, ("profile", "with")),
    ("entered twice", lambda m, o: recorded().__enter__(), RuntimeError, ("profile", "every block")),
    ("diff with a number", lambda m, o: recorded().diff(3), TypeError, ("after", "profile", "int")),
    ("path of a number", lambda m, o: recorded().to_chrome_trace(3), TypeError, ("PathLike", "int")),
    (
        "a folder that is not there",
        lambda m, o: recorded().to_chrome_trace("/nowhere/trace.json"),
        FileNotFoundError,
        ("path", "folder", "/nowhere/trace.json"),
    ),
)
rows(
    "rewrap",
    ("a model", lambda m, o: rewrap(m), TypeError, ("ddp", "DistributedDataParallel", "Sequential")),
    ("None", lambda m, o: rewrap(None), TypeError, ("ddp", "DistributedDataParallel", "NoneType")),
)
first(FreezeOut, more=lambda m, o: (0.5, 4))
rows(
    "FreezeOut",
    ("t0 of 0", lambda m, o: FreezeOut(m, 0, 4), ValueError, ("t0", "above 0", "0")),
    ("t0 of text", lambda m, o: FreezeOut(m, "half", 4), TypeError, ("t0", "number", "'half'")),
    ("no steps", lambda m, o: FreezeOut(m, 0.5, 0), ValueError, ("total_steps", "at least 1", "0")),
    ("half a step", lambda m, o: FreezeOut(m, 0.5, 2.5), TypeError, ("total_steps", "integer", "2.5")),
    ("how", lambda m, o: FreezeOut(m, 0.5, 4, how="log"), ValueError, ("how", "cubic", "'log'")),
    ("no stages", lambda m, o: FreezeOut(m, 0.5, 4, stages=0), ValueError, ("stages", "at least 1", "0")),
    ("stages of text", lambda m, o: FreezeOut(m, 0.5, 4, stages="a"), TypeError, ("stages", "integer", "'a'")),
    ("unknown layer", lambda m, o: FreezeOut(m, 0.5, 4, layers=["9"]), PatternError, ("layers", "'9'", "'0'")),
    ("one layer", lambda m, o: FreezeOut(m, 0.5, 4, layers=["0"]), ValueError, ("layers", "two", "1")),
    ("layers of a number", lambda m, o: FreezeOut(m, 0.5, 4, layers=3), TypeError, ("layers", "names", "3")),
    ("layers of numbers", lambda m, o: FreezeOut(m, 0.5, 4, layers=[3]), TypeError, ("layers", "names", "3")),
    ("layers of text", lambda m, o: FreezeOut(m, 0.5, 4, layers="02"), TypeError, ("layers", "sequence", "'02'")),
    ("no optimizer", lambda m, o: FreezeOut(m, 0.5, 4, optimizer="o"), TypeError, ("optimizer", "str")),
    ("state", lambda m, o: FreezeOut(m, 0.5, 4, optimizer=o, state="x"), ValueError, ("state", "keep", "'x'")),
    ("remove", lambda m, o: FreezeOut(m, 0.5, 4, remove=True), ValueError, ("remove", "optimizer")),
    ("anneal nothing", lambda m, o: FreezeOut(m, 0.5, 4, anneal=True), ValueError, ("anneal", "optimizer")),
    ("scale nothing", lambda m, o: FreezeOut(m, 0.5, 4, scale_lr=True), ValueError, ("scale_lr", "anneal")),
    ("load None", lambda m, o: FreezeOut(m, 0.5, 4).load_state_dict(None), TypeError, ("state", "dict", "NoneType")),
    ("load nothing", lambda m, o: FreezeOut(m, 0.5, 4).load_state_dict({}), ValueError, ("state", "another")),
    (
        "load a part",
        lambda m, o: (s := FreezeOut(m, 0.5, 4)).load_state_dict({"config": s.state_dict()["config"]}),
        ValueError,
        ("state", "whole", "'frozen'", "'steps'"),
    ),
    ("factor", lambda m, o: FreezeOut(m, 0.5, 4).lr_factor("9", 1), ValueError, ("layer", "'0'", "'9'")),
    ("groups", lambda m, o: FreezeOut.param_groups("resnet", 0.1), TypeError, ("model", "nn.Module", "str")),
)
first(UpdateNorm, more=lambda m, o: (o, 0.1))
rows(
    "UpdateNorm",
    ("no optimizer", lambda m, o: UpdateNorm(m, None, 0.1), TypeError, ("optimizer", "Optimizer", "None")),
    ("threshold of 0", lambda m, o: UpdateNorm(m, o, 0), ValueError, ("threshold", "above 0", "0")),
    ("threshold of text", lambda m, o: UpdateNorm(m, o, "a"), TypeError, ("threshold", "number", "'a'")),
    ("threshold of NaN", lambda m, o: UpdateNorm(m, o, float("nan")), ValueError, ("threshold", "above 0", "nan")),
    ("every None", lambda m, o: UpdateNorm(m, o, 0.1, every=None), TypeError, ("every", "integer", "None")),
    ("every 1.5", lambda m, o: UpdateNorm(m, o, 0.1, every=1.5), TypeError, ("every", "integer", "1.5")),
    ("patience", lambda m, o: UpdateNorm(m, o, 0.1, patience=0), ValueError, ("patience", "at least 1", "0")),
    ("thaw_after", lambda m, o: UpdateNorm(m, o, 0.1, thaw_after=-1), ValueError, ("thaw_after", "1", "-1")),
    ("max_changes", lambda m, o: UpdateNorm(m, o, 0.1, max_changes="a"), TypeError, ("max_changes", "'a'")),
    ("layers", lambda m, o: UpdateNorm(m, o, 0.1, layers=[3]), TypeError, ("layers", "names", "3")),
    ("state", lambda m, o: UpdateNorm(m, o, 0.1, state="x"), ValueError, ("state", "keep", "'x'")),
    ("load 3", lambda m, o: UpdateNorm(m, o, 0.1).load_state_dict(3), TypeError, ("state", "dict", "int")),
)
