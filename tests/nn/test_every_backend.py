"""What computes each layer and each function under a backend that demands freezekit's kernels, and what `explain` says.

Every one of them either runs freezekit's kernels or raises the one refusal, or is on the list of those that never have
any (`freezekit.backends.WITHOUT_KERNELS`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
import freezekit.functional as ff
from freezekit import _C
from freezekit.backends import WITHOUT_KERNELS
from tests.conftest import on
from tests.test_docs import ROOT

SIZES = {1: (2, 4, 6), 2: (2, 4, 6, 6), 3: (2, 4, 6, 6, 6)}
# How to make a layer, of those that need arguments.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **{f"FreezableConv{kind}{axes}d": (4, 4, 2) for kind in ("", "Transpose") for axes in SIZES},
    **{f"Freezable{kind}Norm{axes}d": (4,) for kind in ("Batch", "Instance") for axes in SIZES},
    "FreezableLayerNorm": (6,),
    "FreezableGroupNorm": (2, 4),
    **{f"{kind}Pool{axes}d": (2,) for kind in ("Max", "Avg", "AdaptiveAvg") for axes in SIZES},
    **{f"{kind}Pad{axes}d": (1,) for kind in ("Reflection", "Replication") for axes in SIZES},
}
LISTED = {name for names in WITHOUT_KERNELS.values() for name in names}


def axes_of(name: str) -> int:
    return int(name[-2]) if name[-1] == "d" and name[-2].isdigit() else 2


def layer(name: str) -> nn.Module:
    made = getattr(fk.nn, name)(*ARGUMENTS.get(name, ()))
    return made.requires_grad_(not isinstance(made, fk.nn.PReLU))  # a slope that learns is torch's own


def data(axes: int, learns: bool) -> Tensor:
    return torch.randn(SIZES[axes], requires_grad=learns)


def weight(axes: int) -> Tensor:
    return torch.randn(4, 4, *(2,) * axes)


def call_of(name: str) -> Callable[[Tensor], Tensor]:
    """A call of the function of that name on one tensor."""
    function, axes = getattr(ff, name), axes_of(name)
    mean, var = torch.zeros(4), torch.ones(4)
    special: dict[str, Callable[[Tensor], Tensor]] = {
        "batch_norm": lambda x: function(x, mean, var),
        "instance_norm": lambda x: function(x, mean, var, use_input_stats=False),
        "layer_norm": lambda x: function(x, (6,)),
        "group_norm": lambda x: function(x, 2, var, mean),
        "pad": lambda x: function(x, (1, 1, 1, 1), "reflect"),
        "prelu": lambda x: function(x, torch.full((4,), 0.25)),
        "conv2d_dgrad": lambda x: function(x, weight(2), (2, 4, 7, 7)),
        "conv2d_wgrad": lambda x: function(x, torch.ones(2, 4, 7, 7), (4, 4, 2, 2)),
        "conv2d_bias_grad": function,
    }
    if name in special:
        return special[name]
    if name.startswith("conv"):
        return lambda x: function(x, weight(axes))
    return lambda x: function(x, 2) if "pool" in name else function(x)


def launches(run: Callable[[], Tensor]) -> set[str]:
    """Kernels of a forward pass, and of its backward pass if it has one."""
    _C.set_launch_log(True)
    try:
        y = run()
        if y.requires_grad:
            y.sum().backward()
        return {row["kernel"] for row in _C.take_launch_log()}
    finally:
        _C.set_launch_log(False)


def calls(learns: bool) -> dict[str, Callable[[], Tensor]]:
    """A call of each layer and of each function."""
    made: dict[str, Callable[[], Tensor]] = {
        name: lambda name=name: layer(name)(data(axes_of(name), learns)) for name in fk.nn.__all__
    }
    for name in ff.__all__:
        made[name] = lambda name=name: call_of(name)(data(axes_of(name), learns))
    return made


EVERY = sorted(calls(True))


def test_the_list_is_of_layers_and_functions_that_are_there() -> None:
    assert set(WITHOUT_KERNELS) <= set(ff.__all__)
    assert set(fk.nn.__all__) >= LISTED
    for function, names in WITHOUT_KERNELS.items():
        for name in names:
            kind = getattr(fk.nn, name)
            source = "".join(
                inspect.getsource(base) for base in kind.__mro__ if base.__module__.startswith("freezekit")
            )
            assert f"functional.{function}" in source, f"{name} does not call {function}"


@pytest.mark.parametrize("name", EVERY)
def test_emulated_kernels_run_or_none_is_there(name: str) -> None:
    with fk.testing.emulated():
        ran = launches(calls(learns=True)[name])
    assert bool(ran) == (name not in WITHOUT_KERNELS and name not in LISTED)


@pytest.mark.parametrize("mode", ["learns", "no gradient", "no_grad", "inference"])
@pytest.mark.parametrize("name", EVERY)
def test_a_demand_that_cannot_be_met_is_refused(name: str, mode: str) -> None:
    """On a CPU none can: there are no kernels but those of a GPU."""
    call = calls(learns=mode != "no gradient")[name]
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with fk.backend("native"), contexts.get(mode, torch.enable_grad)():
        if name in WITHOUT_KERNELS or name in LISTED:
            assert not launches(call)
        else:
            refusal = r"^backend='native' cannot compute \w+: it needs CUDA tensors, got one on cpu; backend='aten' "
            with pytest.raises(RuntimeError, match=refusal):
                call()


X = torch.randn(2, 4, 6, 6, requires_grad=True)
FUSED = fk.fuse(fk.convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).requires_grad_(False)))
ODD: dict[str, Callable[[], object]] = {
    "integers": lambda: ff.relu(torch.ones(3, dtype=torch.int32)),
    "sparse": lambda: ff.relu(torch.ones(3).to_sparse()),
    "complex": lambda: ff.conv2d(X.cfloat(), weight(2).cfloat()),
    "NaN as an end": lambda: ff.hardtanh(X, float("nan")),
    "a flag that is a number": lambda: ff.dropout(X, 0.5, 1),
    "sizes that are tensors": lambda: ff.max_pool2d(X, torch.tensor(2)),
    "a slope that learns": lambda: ff.prelu(X, torch.full((1,), 0.25, requires_grad=True)),
    "vmap": lambda: torch.vmap(ff.relu)(X),
    "jvp": lambda: torch.func.jvp(lambda x: ff.max_pool2d(x, 2), (X,), (X,)),
    "a fused block": lambda: torch.func.grad(lambda x: FUSED(x).sum())(X.detach()),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_arguments_are_refused_too(name: str) -> None:
    """What torch takes and kernels do not: within the demand it is an error, and never torch's own code silently."""
    with (
        fk.testing.emulated(),
        pytest.raises(RuntimeError, match=r"^backend='emulated' cannot compute \w+: .*; backend='aten' computes it"),
    ):
        ODD[name]()


@pytest.mark.parametrize("records", [True, False])
@pytest.mark.parametrize("slopes", [1, 4])
def test_prelu_by_kernels_is_torch_s(slopes: int, records: bool) -> None:
    x, slope = X.detach().requires_grad_(records), torch.linspace(-0.5, 0.5, slopes)
    with fk.testing.emulated():
        y = ff.prelu(x, slope)
    assert torch.equal(y, F.prelu(x, slope))
    assert y.requires_grad == records


@pytest.mark.parametrize("backend", ["auto", "aten", "native", "emulated"])
@pytest.mark.parametrize("name", fk.nn.__all__)
def test_explain_says_so(name: str, backend: str) -> None:
    x = data(axes_of(name), True).to("meta")
    with on(backend):
        if backend == "native" and name not in LISTED:
            with pytest.raises(RuntimeError, match="backend='native' cannot compute"):
                fk.explain(layer(name), x)
            return
        (row,) = fk.explain(layer(name), x)
    assert (row.kernel == "always the same") == (name in LISTED)
    if backend == "emulated":
        assert row.kernel


def test_the_documentation_names_all_of_them() -> None:
    page = (ROOT / "docs/kernels.md").read_text()
    missing = [name for name in sorted(LISTED | set(WITHOUT_KERNELS)) if f"`{name}`" not in page]
    assert not missing
