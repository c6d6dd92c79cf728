"""`explain` tells what a step computes and keeps: against counting on data, and against the formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import freezekit as fk
from freezekit._inputs import arguments
from freezekit.explanation import explain
from freezekit.explanation.trace import trace
from tests.observe import bytes_saved


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 5)
    )


def kept_on_data(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd saves, without those of tensors that the model holds before the call."""
    there = tree_leaves([vars(module) for module in model.modules()])
    return bytes_saved(lambda: model(x), [value for value in there if isinstance(value, Tensor)])


REGIMES = {
    "all learn": lambda name: True,
    "first conv frozen": lambda name: not name.startswith("0."),
    "middle frozen": lambda name: not name.startswith("1."),
    "biases learn": lambda name: name.endswith("bias"),
    "norms learn": lambda name: "norm" in name,
    "all frozen": lambda name: False,
}


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_bytes_are_those_of_a_real_step(regime, needs_dx: bool, convert: bool) -> None:
    model = net()
    if convert:
        fk.convert(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(regime(name))
    x = torch.randn(2, 3, 8, 8, requires_grad=needs_dx)
    assert explain(model, x).bytes_kept == kept_on_data(model, x)


@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_bytes_of_fused_blocks_are_those_of_a_real_step(regime, needs_dx: bool) -> None:
    model = fk.fuse(fk.convert(net())).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(regime(name))
    x = torch.randn(2, 3, 8, 8, requires_grad=needs_dx)
    assert explain(model, x).bytes_kept == kept_on_data(model, x)


def test_what_an_autograd_function_keeps_is_counted() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = 2 * x
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return Doubled.apply(self.conv(x))

    model, x = Calling(), torch.randn(1, 3, 8, 8)
    explained = explain(model, x)
    assert explained.bytes_kept == kept_on_data(model, x)
    (row,) = (row for row in explained if row.layer == "Calling: autograd function")
    assert row.bytes_kept == 2 * x.nbytes


def test_a_fused_block_is_a_row() -> None:
    model = fk.fuse(fk.convert(net())).eval()
    model[1].requires_grad_(False)
    rows = list(explain(model, torch.empty(2, 3, 8, 8, device="meta")))
    (block,) = (row for row in rows if "fused" in row.layer)
    assert (block.name, block.layer) == ("1", "Block: fused conv + norm + add + relu")
    assert (block.fprop, block.dgrad, block.wgrad, block.db) == (True, True, False, False)
    assert block.inputs == block.outputs == (2, 8, 8, 8)
    assert block.bytes_kept == 2 * 8 * 8 * 8 / 8  # a bit per element
    assert block.flops == 2 * 2 * 8 * 8 * 8 * 8 * 9
    assert not any(row.name.startswith("1.") for row in rows)


def test_a_value_that_several_blocks_read_is_explained_too() -> None:
    class Basic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv2(F.relu(self.conv1(x))) + x)

    model = fk.fuse(nn.Sequential(Basic(), Basic()).requires_grad_(False))
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    model(x)
    explained = explain(model, x)
    assert [row.layer for row in explained] == ["Basic: fused conv1 + relu", "Basic: fused conv2 + add + relu"] * 2
    assert explained.bytes_kept == kept_on_data(model, x) == 4 * 4 * 64 / 8


def test_rows_tell_what_runs() -> None:
    model = fk.convert(net())
    model[1].conv.requires_grad_(False)
    rows = {(row.name, row.layer): row for row in explain(model, torch.empty(2, 3, 8, 8, device="meta"))}
    first, frozen = rows["0", "FreezableConv2d"], rows["1.conv", "FreezableConv2d"]
    assert (first.dgrad, first.wgrad, first.db) == (False, True, True)
    assert (frozen.dgrad, frozen.wgrad, frozen.db) == (True, False, False)
    assert frozen.flops == 2 * 2 * 8 * 8 * 8 * 8 * 9
    assert frozen.backward_flops == frozen.flops
    assert frozen.outputs == (2, 8, 8, 8)
    assert rows["1", "Block: relu"].bytes_kept == 2 * 8 * 8 * 8 * 4
    assert rows["2.conv", "FreezableConv2d"].bytes_shared == 2 * 8 * 8 * 8 * 4


def test_advice_comes_true() -> None:
    model = net().requires_grad_(False)
    x = torch.empty(2, 3, 8, 8, device="meta", requires_grad=True)
    convs = {row.name: row.advice for row in explain(model, x) if row.layer == "Conv2d"}
    assert {name for name, advice in convs.items() if "convert to FreezableConv2d" in advice} == {"0", "1.conv"}
    # What it keeps F.relu keeps too, which no conversion reaches.
    assert convs["2.conv"].startswith("fk.enable(): up to -")
    fk.convert(model)
    assert not any("Conv2d" in row.advice for row in explain(model, x))
    model[0].requires_grad_(True)
    (row,) = (row for row in explain(model, x) if row.name == "0")
    assert row.advice.startswith("freeze: -")


@pytest.mark.parametrize("converted", [False, True])
def test_freezing_saves_what_the_advice_says(converted: bool) -> None:
    x = torch.empty(2, 3, 8, 8, device="meta")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3))
    if converted:
        fk.convert(model)
    before = explain(model, x)
    (advice,) = (row.advice for row in before if row.name == "0")
    kept = 2 * 3 * 8 * 8 * 4
    assert advice == ("freeze" if converted else "convert and freeze") + f": -31.1 kFLOP, -{kept / 1024:.1f} KiB"
    fk.convert(model)[0].requires_grad_(False)
    after = explain(model, x)
    assert before.bytes_kept - after.bytes_kept == kept  # The sigmoid stays: the last layer reads its output too.


def test_functions_that_keep_memory_have_a_cure() -> None:
    class Net(nn.Module):
        def __init__(self, relu) -> None:  # type: ignore[no-untyped-def]
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.relu = relu

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(x)) * 2

    x = torch.empty(2, 3, 8, 8, device="meta")
    before, after = explain(Net(F.relu), x), explain(Net(fk.functional.relu), x)
    (advice,) = (row.advice for row in before if row.layer == "Net: relu")
    saved = 2 * 8 * 36 * 4 - 2 * 8 * 36 // 8
    assert advice == f"call fk.functional.relu: -{saved / 1024:.1f} KiB"
    assert before.bytes_kept - after.bytes_kept == saved


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("leaky_relu", ()),
        ("dropout", (0.3,)),
        ("max_pool2d", (2,)),
        ("max_pool2d", (20, 1)),  # whose windows are too many elements for a byte
        ("avg_pool2d", (3,)),
    ],
)
def test_a_function_saves_what_the_advice_says(name: str, more: tuple[Any, ...]) -> None:
    class Net(nn.Module):
        def __init__(self, functions: Any) -> None:
            super().__init__()
            self.conv, self.function = nn.Conv2d(3, 8, 3), getattr(functions, name)

        def forward(self, x: Tensor) -> Tensor:
            return self.function(self.conv(x), *more) * 2

    x = torch.empty(2, 3, 31, 30, device="meta")
    before, after = explain(Net(F), x), explain(Net(fk.functional), x)
    (advice,) = (row.advice for row in before if row.layer == f"Net: {name}")
    assert advice == f"call fk.functional.{name}: -{(before.bytes_kept - after.bytes_kept) / 1024:.1f} KiB"


def test_enabling_saves_what_the_advice_says() -> None:
    class NormAct(nn.BatchNorm2d):
        """As timm's: a norm with a forward of its own, and an activation inside."""

        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8), nn.SyncBatchNorm(8), nn.Sigmoid())
    model = fk.convert(model.eval()).requires_grad_(False)
    x = torch.empty(2, 3, 8, 8, device="meta", requires_grad=True)
    before = explain(model, x)
    advice = {row.layer: row.advice for row in before}
    saved = 2 * 8 * 36 * 4
    assert advice["NormAct: batch_norm"] == f"fk.enable(): -{saved / 1024:.1f} KiB"
    assert advice["SyncBatchNorm"] == ""  # the sigmoid before it keeps the same tensor
    with fk.enabled():
        after = explain(model, x)
    assert before.bytes_kept - after.bytes_kept == saved
    assert not any("enable" in row.advice for row in after)


def test_what_could_be_fused_is_told_and_then_is() -> None:
    model = fk.convert(net()).eval().requires_grad_(False)
    model[0].requires_grad_(True)
    x = torch.empty(2, 3, 8, 8, device="meta")
    advised = {row.name: row.advice.partition(":")[0] for row in explain(model, x) if row.advice.startswith("fuse")}
    assert advised == {f"{i}.conv": f"fuse with {i}.norm, add, relu" for i in (1, 2)}
    whole = {row.name for row in explain(lambda x: model(x), x) if row.advice.startswith("fuse with model.1.norm, add")}
    assert whole == {"model.1.conv"}
    assert [row.name for row in explain(fk.fuse(model), x) if "fused" in row.layer] == ["1", "2"]


def test_nothing_is_changed_and_nothing_is_allocated() -> None:
    model = fk.convert(net()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    explain(model, torch.empty(4096, 3, 8, 8, device="meta"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_too_big_for_the_machine() -> None:
    with torch.device("meta"):
        model = fk.convert(nn.Sequential(nn.Conv2d(2**14, 2**14, 3), nn.Conv2d(2**14, 2**16, 3)))
    kept = explain(model, torch.empty(64, 2**14, 64, 64, device="meta")).bytes_kept
    assert kept == 4 * 64 * 2**14 * (64 * 64 + 62 * 62)  # 31 GiB


def test_json_print_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explanation = explain(fk.convert(net()), torch.empty(2, 3, 8, 8, device="meta"))
    data = json.loads(explanation.to_json())
    assert data["totals"] == explanation.totals()
    assert sum(row["bytes_kept"] for row in data["rows"]) == explanation.bytes_kept
    explanation.print(Console(width=160))
    out = capsys.readouterr().out
    assert "1.conv" in out
    assert "Block: relu" in out
    explanation.plot(tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_the_native_kernel_and_its_reason_are_shown() -> None:
    model = fk.convert(net())
    with fk.testing.emulated():
        rows = list(explain(model, torch.empty(2, 3, 8, 8, device="meta")))
    kernels = [row.kernel for row in rows if row.layer == "FreezableConv2d"]
    assert all("direct_fprop" in kernel and "(" in kernel for kernel in kernels)
    assert len(kernels) == 3


def test_inputs_as_sequence_and_mapping() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * b

    a, b = torch.ones(3, requires_grad=True), torch.ones(3)
    assert explain(Two(), (a, b)).bytes_kept == explain(Two(), {"a": a, "b": b}).bytes_kept == 3 * 4


def test_what_cannot_be_explained_says_why() -> None:
    class Values(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    class Sentence(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("it ends in a full stop.")

    with pytest.raises(RuntimeError, match="Values was run on tensors without data, where it fails"):
        explain(Values(), torch.ones(3, device="meta"))
    with pytest.raises(RuntimeError, match=r"it ends in a full stop\. If it needs the values"):
        explain(Sentence(), torch.ones(3, device="meta"))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, or a callable that runs one.*, got int"):
        explain(3, torch.ones(1))


def test_a_shared_module_has_a_row_for_each_call() -> None:
    conv = fk.FreezableConv2d(4, 4, 1)
    calls = trace(nn.Sequential(conv, nn.Sequential(conv)), arguments(torch.empty(1, 4, 2, 2))).calls
    assert [call.name for call in calls] == ["0", "0"]
