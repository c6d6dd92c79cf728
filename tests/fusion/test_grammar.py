"""Forwards made from a grammar of what people write: fused, each does what it does without."""

from __future__ import annotations

import copy
import importlib.util
import sys
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from freezekit.fusion import fuse, fusion_report
from tests.fusion.alike import assert_alike, outcome
from tests.fusion.nets import settled

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.fusion.test_grammar import Parts, Reverse


class Net(Parts):
    def residual(self, h):
        return F.relu(self.norm1(self.conv1(h)) + h)

    def forward(self, x, skip=None, *, scale=None):
        y = z = x
"""
NAMES = ("x", "y", "z")


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.norm0, self.norm1 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act, self.act6, self.same, self.smooth = nn.ReLU(), nn.ReLU6(inplace=True), nn.Identity(), nn.SiLU()
        self.seq = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()])
        self.on, self.missing = True, None


LAYERS = ["self.conv0({})", "self.conv1({})", "self.norm0({})", "self.norm1({})", "self.act({})", "self.seq({})"]
LAYERS += ["self.same({})", "self.smooth({})", "F.relu({})", "F.relu6({})", "torch.relu({})", "({}).relu()"]
LAYERS += ["self.layers[0]({})", "self.residual({})", "self.conv0(input={})"]
OTHERS = ["Reverse.apply({})", "({}).detach()", "({}) * 2", "torch.cat([{}, z], 1)[:, :4]", "self.act6(({}) * 1)"]
OTHERS += ["checkpoint(self.seq, {}, use_reentrant=False)", "checkpoint(self.residual, {}, use_reentrant=False)"]
OTHERS += ["(({0}) if scale is None else ({0}) * scale)", "F.max_pool2d({}, 3, 1, 1)"]

names = st.sampled_from(NAMES)
# A block as it is mostly written, so that many examples have one.
blocks = st.builds(
    lambda conv, norm, tail, value: tail.format(norm.format(conv.format(value))),
    st.sampled_from(LAYERS[:2]),
    st.sampled_from(["self.norm0({})", "self.norm1({})", "{}"]),
    st.sampled_from(["self.act({})", "F.relu({} + x)", "F.relu(y + {})", "{} + z", "{}", "torch.add({}, x)"]),
    names,
)
expressions = st.recursive(
    names | blocks,
    lambda inner: (
        st.builds(str.format, st.sampled_from(LAYERS + OTHERS), inner)
        | st.builds("({} + {})".format, inner, inner)
        | st.builds("torch.add({}, {})".format, inner, inner)
    ),
    max_leaves=4,
)


@st.composite
def statements(draw: Any, depth: int = 0) -> list[str]:
    kind = draw(st.sampled_from(["set", "set", "steps", "residual", "add", "if", "with", "for", "alias", "write"]))
    name, value = draw(names), draw(expressions)
    if kind in ("if", "with", "for") and depth < 2:
        heads = {
            "if": [
                "self.on",
                "self.missing is not None",
                "not self.training",
                "torch.is_grad_enabled()",
                "skip is None",
            ],
            "with": ["torch.no_grad()", "torch.enable_grad()", "torch.autocast('cpu', enabled=False)"],
            "for": ["_ in range(2)", "layer in self.layers"],
        }
        head = draw(st.sampled_from(heads[kind]))
        if head == "layer in self.layers":
            return [f"for {head}:", f"    {name} = layer({name})"]
        body = draw(st.lists(statements(depth + 1), min_size=1, max_size=2))
        return [f"{kind} {head}:", *(f"    {line}" for lines in body for line in lines)]
    if kind == "steps":
        gate = [f"if self.missing is not None: {name} = self.missing({name})"] if draw(st.booleans()) else []
        add = [f"{name} += {draw(names)}"] if draw(st.booleans()) else []
        act = [f"{name} = self.act({name})"] if draw(st.booleans()) else []
        return [f"{name} = self.conv0({draw(names)})", f"{name} = self.norm0({name})", *gate, *add, *act]
    if kind == "residual":
        return [
            f"{name} = self.norm0(self.conv0({name}))",
            "h = self.seq(x)",
            f"{name} += h",
            f"{name} = F.relu({name})",
        ]
    if kind == "alias":
        return [f"{name} = {draw(names)}"]
    if kind == "add":
        return [f"{name} = {name} * 1", f"{name} += {value}"]
    if kind == "write":
        return [f"{name} = {name} * 1", f"{name}.mul_(2)"]
    return [f"{name} = {value}"]


results = st.sampled_from(["return {0}", "return {0}, {1}", "return {{'a': {0}, 'b': [{1}]}}", "return self.act({0})"])
forwards = st.builds(
    lambda lines, result, a, b: [line for group in lines for line in group] + [result.format(a, b)],
    st.lists(statements(), min_size=1, max_size=5),
    results,
    expressions,
    names,
)
_numbers = count()


def module_of(lines: list[str], folder: Path) -> ModuleType:
    """A module with this forward, in a file of its own."""
    name = f"made_forward_{next(_numbers)}"
    path = folder / f"{name}.py"
    path.write_text(HEAD + "".join(f"        {line}\n" for line in lines))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forwards")


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    lines=forwards,
    learns=st.sets(st.sampled_from(["conv0", "norm0", "seq.2", "layers.0"]), max_size=1),
    train=st.booleans(),
    single=st.booleans(),
    options=st.fixed_dictionaries({"grad": st.booleans(), "skip": st.booleans(), "no_grad": st.booleans()}),
)
def test_a_made_forward(
    folder: Path, lines: list[str], learns: set[str], train: bool, single: bool, options: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    dtype, tolerance = (torch.float32, 2e-3) if single else (torch.float64, 1e-9)
    stock = settled(module_of(lines, folder).Net()).to(dtype).train(train and bool(learns))
    for name in learns:
        stock.get_submodule(name).requires_grad_(True)
    fused = fuse(copy.deepcopy(stock))
    fusion_report(fused)
    inputs = [torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=options["grad"])]
    if options["skip"]:
        inputs.append(torch.randn(2, 4, 5, 6, dtype=dtype))
    with torch.set_grad_enabled(not options["no_grad"]):
        try:
            outcome(copy.deepcopy(stock), inputs)
        except RuntimeError:  # a write to what backward needs, or to a leaf: an error of the forward's own
            assume(False)
        assert_alike(fused, stock, inputs, tolerance)
