"""Where torch's own code runs in place of a layer of freezekit's, `explain` says so, and counts what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch.func import jvp, vmap

import freezekit as fk
from tests.explanation.test_explain import kept_on_data

Inner = Callable[[Tensor], Tensor]


def forward_mode(inner: Inner, x: Tensor) -> Tensor:
    with fwad.dual_level():
        return fwad.unpack_dual(inner(fwad.make_dual(x, torch.ones_like(x)))).tangent


WAYS: dict[str, Callable[[Inner, Tensor], Tensor]] = {
    "": lambda inner, x: inner(x),
    "within a torch.func transform": lambda inner, x: vmap(inner)(x),
    "within a torch.func transform, jvp": lambda inner, x: jvp(inner, (x,), (torch.ones_like(x),))[1],
    "within forward-mode AD": forward_mode,
}


class Within(nn.Module):
    """A frozen convolution and a ReLU that run in some way, and a convolution that runs as it is."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False)
        self.last = nn.Conv2d(4, 4, 3)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.last(WAYS[self.way](self.inner, x))


@pytest.mark.parametrize("way", WAYS)
def test_a_row_says_why(way: str) -> None:
    model = fk.convert(Within(way))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    rows = {row.name: row for row in fk.explain(model, x)}
    why = way.removesuffix(", jvp")
    for name in ("inner.0", "inner.1"):
        assert (rows[name].fprop, rows[name].dgrad, rows[name].wgrad) == (True, True, False)
        if why:
            assert rows[name].kernel == f"torch's own, {why}"
        else:
            assert "torch's own" not in rows[name].kernel
    assert "torch's own" not in rows["last"].kernel
    input_bytes = 4 * x.numel()
    assert (rows["inner.0"].bytes_kept >= input_bytes) == bool(why)
    assert fk.explain(model, x).bytes_kept == kept_on_data(model, x)


def test_weights_of_a_transform_count_too() -> None:
    """An ensemble maps over the parameters; its layers take inputs as they are."""

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.member = fk.FreezableConv2d(3, 4, 3)
            self.weights = nn.Parameter(torch.randn(5, 4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return vmap(lambda w: torch.func.functional_call(self.member, {"weight": w}, (x,)))(self.weights)

    rows = {row.name: row for row in fk.explain(Ensemble(), torch.empty(2, 3, 8, 8, device="meta"))}
    assert rows["member"].kernel == "torch's own, within a torch.func transform"


def test_complex_numbers() -> None:
    model = fk.FreezableConv2d(3, 4, 3, dtype=torch.complex64)
    (row,) = fk.explain(model, torch.empty(2, 3, 8, 8, device="meta", dtype=torch.complex64))
    assert row.kernel == "torch's own, for complex numbers"


def test_stock_layers_have_no_fallback() -> None:
    rows = fk.explain(Within("within a torch.func transform"), torch.empty(2, 3, 8, 8, device="meta"))
    assert not any("torch's own" in row.kernel for row in rows)


class Later(nn.Module):
    """Its body runs when somebody asks for what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        yield self.layer(x)

    async def in_time(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def mapped(self, x: Tensor) -> Any:
        return map(self.layer, [x])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("measure", [None, True, False])
@pytest.mark.parametrize(("method", "kind"), [("forward", "generator"), ("in_time", "coroutine"), ("mapped", "map")])
def test_what_runs_later_is_refused(method: str, kind: str, measure: bool | None) -> None:
    model, x = Later(), torch.ones(2, 4, requires_grad=True)
    with pytest.raises(TypeError, match=f"got a {kind}, whose body runs later"):
        fk.explain(getattr(model, method), x, measure=measure)
    assert fk.explain(lambda x: list(model.mapped(x)), x, measure=measure).bytes_kept > 0


def test_plan_and_audit_refuse_a_model_that_runs_later() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(TypeError, match="whose body runs later"):
        fk.plan(Later(), x, memory=1000)
    with pytest.raises(TypeError, match="whose body runs later"):
        fk.audit(Later(), None, x)
