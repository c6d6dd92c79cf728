"""What a proof finds: kernels that are wrong in one element, that fail, that find no memory. No user meets them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import freezekit as fk
from freezekit import _C
from freezekit.functional import conv2d
from tests.proof.stand_in import FASTER, Faulty, decided, launched, leaf, stand_in
from tests.proof.test_layers import LAYERS, step


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    made = Faulty(tmp_path_factory.mktemp("faulty"))
    yield made
    made.close()


@pytest.fixture
def faulty(kernels: Faulty) -> Iterator[Faulty]:
    with stand_in(FASTER):
        yield kernels
        kernels.device(0, 0)
    kernels.mend()
    kernels.capture(False)


# Layer, the kernel that fails, what the choice says where it gives one wrong element.
LAYER_FAULTS = [
    ("relu", "activation", "relu: a value differs by"),
    ("relu", "bits", "relu: 1 of 514 words differ"),
    ("relu", "gate", "relu: a value differs by"),
    ("relu", "leaky_relu", "leaky_relu: a value differs by"),
    ("dropout", "pack_bytes", "1 of 514 words differ"),
    ("dropout", "gate", "a value differs by"),
    ("dropout", "bits", "1 of 514 words differ"),
    ("max_pool2d", "max_pool", "a value differs by"),
    ("max_pool2d", "scatter", "a value differs by"),
    ("max_pool2d", "wide_pool", "a value differs by"),
]
# Layer, the kernel that fails, for which values.
HIDDEN_FAULTS = [
    *(("relu", kernel, values) for kernel in ("activation", "gate") for values in ("negative", "positive", "nan")),
    *(("dropout", "gate", values) for values in ("negative", "positive", "nan")),
    *(("max_pool2d", "max_pool", values) for values in ("negative", "positive", "nan", "ties")),
]
# First batches that tell nothing: what warms up a program.
BLANK = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "minus ones": lambda x: torch.full_like(x, -1),
    "all of one sign": torch.abs,
    "nan": lambda x: torch.full_like(x, float("nan")),
}


MARK = "freezekit's kernel for ["
Told = Callable[[Callable[[], Any]], tuple[Any, list[str]]]


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Told:
    """What a call gives, and freezekit's warnings: Python's, or lines on stderr where torch hands none to Python."""

    def run(call: Callable[[], Any]) -> tuple[Any, list[str]]:
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = call()
        lines = [str(warning.message) for warning in caught] + capfd.readouterr().err.splitlines()
        return result, [line[line.index(MARK) :] for line in lines if MARK in line]

    return run


@pytest.mark.parametrize(("layer", "kernel", "says"), LAYER_FAULTS)
def test_one_wrong_element_is_found_and_reported_once(
    faulty: Faulty, told: Told, layer: str, kernel: str, says: str
) -> None:
    name, own, stock, _ = LAYERS[layer]
    x = leaf(2, 5, 9, 8)
    with torch.no_grad():
        x.view(-1)[-1] = 2.0  # the element that is wrong is let through
    faulty.fail(kernel, "wrong")
    found, texts = told(lambda: step(own, x))
    torch.testing.assert_close(found, step(stock, x), rtol=0, atol=0)
    choice = decided()[name]
    assert not choice.agree
    assert choice.backend == "aten"
    assert choice.note.startswith(says)
    assert len(texts) == 1
    assert texts[0].startswith(f"freezekit's kernel for [{choice.problem}] is not used in this process")
    assert choice.note in texts[0]
    assert "Please report" in texts[0]
    faulty.mend()
    assert launched(lambda: told(lambda: step(own, x))) == []  # never again in this process
    assert told(lambda: step(own, x.bfloat16()))[1] == []
    backends = {choice.problem.split()[1]: choice.backend for choice in fk.tuning.choices()}
    assert backends == {"Float": "aten", "BFloat16": "native"}  # another dtype is another kernel


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layer", "kernel"), [fault[:2] for fault in LAYER_FAULTS])
def test_one_wrong_element_is_found_in_every_dtype_and_layout(
    faulty: Faulty, told: Told, layer: str, kernel: str, dtype: torch.dtype, channels_last: bool
) -> None:
    name, own, stock, _ = LAYERS[layer]
    faulty.fail(kernel, "wrong")
    for size in ((1, 1, 2, 2), (3, 7, 5, 1)):
        fk.tuning.clear_choices()
        x = leaf(*size, dtype=dtype, channels_last=channels_last)
        found, texts = told(lambda x=x: step(own, x))
        assert not decided()[name].agree
        assert len(texts) == 1
        torch.testing.assert_close(found, step(stock, x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        *(("relu", kernel) for kernel in ("activation", "gate")),
        *(("dropout", kernel) for kernel in ("pack_bytes", "gate")),
        *(("max_pool2d", kernel) for kernel in ("max_pool", "scatter")),
    ],
)
def test_what_is_wrong_in_large_tensors_alone_is_found_by_one(
    faulty: Faulty, told: Told, layer: str, kernel: str
) -> None:
    name, own, stock, kernels = LAYERS[layer]
    faulty.fail(kernel, "far")
    small, large = leaf(2, 5, 9, 8), leaf(64, 32, 32, 16)
    assert launched(lambda: step(own, small))[-len(kernels) :] == kernels
    fk.tuning.clear_choices()
    found, texts = told(lambda: step(own, large))
    assert not decided()[name].agree
    assert len(texts) == 1
    torch.testing.assert_close(found, step(stock, large), rtol=0, atol=0)


@pytest.mark.parametrize("batch", BLANK)
@pytest.mark.parametrize(("layer", "kernel", "values"), HIDDEN_FAULTS)
def test_no_first_batch_hides_a_fault(
    faulty: Faulty, told: Told, layer: str, kernel: str, values: str, batch: str
) -> None:
    name, own, stock, _ = LAYERS[layer]
    x = leaf(2, 5, 9, 8)
    faulty.fail(kernel, values)
    told(lambda: step(own, BLANK[batch](x.detach())))
    assert not decided()[name].agree
    assert "-nan" not in decided()[name].note
    torch.testing.assert_close(step(own, x), step(stock, x), rtol=0, atol=0)


@pytest.mark.parametrize("batch", BLANK)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_right_kernel_is_taken_whatever_the_first_batch(faulty: Faulty, told: Told, layer: str, batch: str) -> None:
    name, own, _, kernels = LAYERS[layer]
    x = leaf(2, 5, 9, 8)
    assert told(lambda: step(own, BLANK[batch](x.detach())))[1] == []
    assert decided()[name].backend == "native"
    assert launched(lambda: step(own, x)) == kernels


@pytest.mark.parametrize(
    ("how", "says"), [("throws", "it failed: planted"), ("refused", "it failed: freezekit kernel activation_")]
)
def test_a_kernel_that_fails_is_torch_s(faulty: Faulty, told: Told, how: str, says: str) -> None:
    x = leaf(7, 9)
    faulty.fail("activation", how)
    found, texts = told(lambda: step(fk.functional.relu, x))
    torch.testing.assert_close(found, step(torch.relu, x), rtol=0, atol=0)
    assert decided()["activation"].note.startswith(says)
    assert len(texts) == 1
    faulty.mend()
    assert launched(lambda: step(fk.functional.relu, x)) == []
    # Nothing sticks: the next kernel that is met runs.
    step(LAYERS["max_pool2d"][1], leaf(1, 2, 6, 6))
    assert decided()["max_pool2d"].backend == "native"


@pytest.mark.parametrize(
    ("kernel", "how"),  # torch's exception, as its allocator for GPUs throws, C++'s, and a launch's
    [(kernel, how) for kernel in ("activation", "gate") for how in ("memory", "bad_alloc")] + [("activation", "full")],
)
def test_no_memory_is_no_fault_and_never_seen(faulty: Faulty, told: Told, kernel: str, how: str) -> None:
    x = leaf(7, 9)
    faulty.fail(kernel, how)
    found, texts = told(lambda: step(fk.functional.relu, x))
    torch.testing.assert_close(found, step(torch.relu, x), rtol=0, atol=0)
    assert texts == []
    assert decided()["activation"].note == "no memory was left to compare them"
    assert json.loads(fk.tuning.dump_choices())["choices"] == [], "true of a moment, and kept in no file"
    assert launched(lambda: step(fk.functional.relu, x)) == []


def convolution(x: Tensor, w: Tensor, padding: int = 1, groups: int = 1) -> tuple[Tensor, ...]:
    y = conv2d(x, w, padding=padding, groups=groups)
    return (y.detach(), *torch.autograd.grad(y, (x, w), torch.ones_like(y)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["wrong", "throws", "refused", "memory", "bad_alloc"])
def test_convolutions_are_held_the_same_way(faulty: Faulty, told: Told, how: str, dtype: torch.dtype) -> None:
    x, w = leaf(2, 8, 6, 6, dtype=dtype), leaf(8, 8, 3, 3, dtype=dtype)
    faulty.fail("conv2d", how)
    found, texts = told(lambda: convolution(x, w))
    with fk.backend("aten"):
        torch.testing.assert_close(found, convolution(x, w), rtol=0, atol=0)
    assert list(decided()) == ["conv2d", "conv2d_dgrad", "conv2d_wgrad"]
    assert not any(choice.agree for choice in fk.tuning.choices())
    assert len(texts) == (0 if how in ("memory", "bad_alloc") else 3)
    faulty.mend()
    assert launched(lambda: convolution(x, w)) == []


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "filters", "settings"),
    [
        (8, (8, 8, 1, 1), {}),
        (6, (9, 2, 3, 2), {"groups": 3, "padding": (2, 0)}),
        (16, (16, 1, 3, 3), {"groups": 16, "padding": 1}),
        (4, (8, 1, 5, 5), {"groups": 4, "stride": 2, "padding": 2}),
        (3, (5, 3, 2, 3), {"stride": (2, 3), "dilation": (2, 1)}),
    ],
    ids=["pointwise", "grouped", "depthwise", "multiplier", "dilated"],
)
@pytest.mark.parametrize("kernel", ["fprop", "dgrad", "wgrad"])
def test_one_wrong_element_of_any_convolution_is_found(
    faulty: Faulty,
    told: Told,
    kernel: str,
    channels: int,
    filters: tuple[int, ...],
    settings: dict[str, Any],
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    x, w = leaf(2, channels, 9, 8, dtype=dtype, channels_last=channels_last), leaf(*filters, dtype=dtype)
    faulty.fail(kernel, "wrong")
    told(lambda: conv2d(x, w, **settings).sum().backward())
    wrong = {name for name, choice in decided().items() if not choice.agree}
    assert wrong == {"conv2d" if kernel == "fprop" else f"conv2d_{kernel}"}
    assert len(decided()) == 3


@pytest.mark.parametrize("how", ["", "wrong", "nonzero"])
def test_float32_that_may_be_rounded_to_tf32_is_a_dtype_of_its_own(
    faulty: Faulty, told: Told, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU unless a program forbids it: sums of a caller's numbers differ by more, of integers in nothing."""
    x, w = leaf(2, 16, 9, 9, channels_last=True), leaf(16, 16, 3, 3)
    convolution(x, w)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    faulty.fail("conv2d" if how else "", how)
    told(lambda: convolution(x, w))
    in_tf32 = [choice for choice in fk.tuning.choices() if "Float(tf32)" in choice.problem]
    assert len(in_tf32) == len(fk.tuning.choices()) - len(in_tf32) == 3
    assert all("implicit_gemm" in choice.problem for choice in in_tf32)
    assert {choice.agree for choice in in_tf32} == {not how}
    torch.testing.assert_close(convolution(x, w)[0], F.conv2d(x, w, padding=1).detach(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("how", ["wrong", "throws", "memory"])
@pytest.mark.parametrize("kernel", ["dgrad", "wgrad"])
def test_what_fails_in_the_backward_pass_alone_costs_the_backward_pass_alone(
    faulty: Faulty, told: Told, kernel: str, how: str, channels_last: bool
) -> None:
    x, w = leaf(2, 8, 7, 5, channels_last=channels_last), leaf(8, 8, 3, 3)
    faulty.fail(kernel, how)
    found, texts = told(lambda: convolution(x, w))
    assert {name for name, choice in decided().items() if not choice.agree} == {f"conv2d_{kernel}"}
    assert len(texts) == (how != "memory")
    with fk.backend("aten"):
        torch.testing.assert_close(found, convolution(x, w))
    faulty.mend()
    assert len(launched(lambda: convolution(x, w))) == 2


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", BLANK)
@pytest.mark.parametrize("how", ["nonzero", "moved"])
def test_no_batch_and_no_weight_hide_a_convolution_s_fault(
    faulty: Faulty, told: Told, how: str, batch: str, channels_last: bool
) -> None:
    """Twice what is right, where zero stays zero; another pixel's, where all pixels are one."""
    x, w = leaf(2, 8, 7, 7, channels_last=channels_last), leaf(8, 8, 3, 3)
    faulty.fail("conv2d", how)
    first = [BLANK[batch](t.detach()).requires_grad_() for t in (x, w)]
    told(lambda: convolution(*first))
    wrong = {name for name, choice in decided().items() if not choice.agree}
    assert wrong == ({"conv2d"} if how == "moved" else {"conv2d", "conv2d_dgrad", "conv2d_wgrad"})
    with fk.backend("aten"):
        expected = convolution(x, w)
    torch.testing.assert_close(convolution(x, w), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", BLANK)
def test_a_right_convolution_is_taken_whatever_the_first_batch(
    faulty: Faulty, told: Told, batch: str, dtype: torch.dtype
) -> None:
    x, w = (BLANK[batch](leaf(*size, dtype=dtype).detach()).requires_grad_() for size in ((2, 8, 7, 7), (8, 8, 3, 3)))
    assert told(lambda: convolution(x, w))[1] == []
    assert {choice.backend for choice in fk.tuning.choices()} == {"native"}


@pytest.mark.parametrize("how", ["nonzero", "moved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_block_of_zeros_hides_no_fault(faulty: Faulty, told: Told, how: str, dtype: torch.dtype) -> None:
    """As a block whose last norm begins with a scale of zero, and a convolution that begins with zeros, give."""
    x = torch.zeros(1, 8, 7, 7, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.zeros(8, 8, 3, 3, dtype=dtype)
    vectors = {name: torch.zeros(8) for name in ("norm_weight", "norm_bias", "running_mean")}
    settings = {"padding": [1], "running_var": torch.ones(8), "eps": 1e-5, **vectors}
    faulty.fail("conv2d", how)
    told(lambda: torch.ops.freezekit.frozen_conv2d(x, w, residual=x, activation="relu", **settings)[0].sum().backward())
    blocks = {c.problem.split()[0]: c.agree for c in fk.tuning.choices() if c.problem.startswith("conv2d")}
    dgrad = "conv2d_dgrad+frozen+residual+norm=-FF--"  # of x, which the residual's gradient is added to
    assert blocks == {"conv2d+frozen+residual+relu+mask+norm=FFFF-": False, dgrad: how == "moved"}


def test_a_block_that_is_right_is_taken_though_its_batch_is_zeros(faulty: Faulty, told: Told) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for activation in ("none", "relu", "relu6"):
            fk.tuning.clear_choices()
            x = torch.zeros(1, 8, 7, 7, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
            vectors = {name: torch.zeros(8) for name in ("bias", "norm_weight", "norm_bias", "running_mean")}
            if dtype == torch.float64:
                vectors["bias"] = vectors["bias"].double()
            settings = {"padding": [1], "running_var": torch.ones(8), "eps": 1e-3, **vectors}

            def call(x: Tensor = x, activation: str = activation, settings: dict[str, Any] = settings) -> None:
                y = torch.ops.freezekit.frozen_conv2d(
                    x, x.detach()[:, :, :3, :3].expand(8, -1, -1, -1), activation=activation, **settings
                )[0]
                y.sum().backward()

            assert told(call)[1] == []
            assert {choice.backend for choice in fk.tuning.choices()} == {"native"}


def test_another_device_decides_for_itself(faulty: Faulty) -> None:
    x, w = leaf(1, 3, 6, 6), leaf(4, 3, 3, 3)
    monday = [choice.problem for choice in decide_on(faulty, (80, 108), x, w)]
    assert len(monday) == 4
    both = [choice.problem for choice in decide_on(faulty, (90, 132), x, w)]
    assert len(both) == 8
    assert set(monday) < set(both)
    assert len(decide_on(faulty, (80, 108), x, w)) == 8


def decide_on(faulty: Faulty, device: tuple[int, int], x: Tensor, w: Tensor) -> list[fk.tuning.Choice]:
    faulty.device(*device)
    step(fk.functional.relu, x), convolution(x, w)
    return fk.tuning.choices()


def test_bits_that_belong_to_another_result_are_found(faulty: Faulty, told: Told) -> None:
    x, w = leaf(1, 8, 6, 6, channels_last=True), torch.randn(8, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    faulty.fail("conv2d_mask", "wrong")
    _, texts = told(lambda: torch.ops.freezekit.frozen_conv2d(x, w, activation="relu", padding=[1]))
    (choice,) = [choice for choice in fk.tuning.choices() if choice.problem.startswith("conv2d+")]
    assert choice.note.startswith("1 of ")
    assert choice.note.endswith(" words differ")
    assert len(texts) == 1


def test_under_capture_nothing_is_held_and_what_is_known_is_taken(faulty: Faulty) -> None:
    x, w = leaf(1, 3, 6, 6), leaf(4, 3, 3, 3)
    faulty.capture(True)
    assert launched(lambda: step(fk.functional.relu, x)) == []
    assert launched(lambda: convolution(x, w)) == []
    assert fk.tuning.choices() == []
    faulty.capture(False)
    step(fk.functional.relu, x), convolution(x, w)
    faulty.capture(True)
    assert launched(lambda: step(fk.functional.relu, x)) == LAYERS["relu"][3]
    assert len(launched(lambda: convolution(x, w))) == 3


@pytest.mark.parametrize("how", ["channels", "slices"])
def test_one_kernel_s_ways_are_classes_of_their_own(faulty: Faulty, told: Told, how: str) -> None:
    """A kernel has other code for odd numbers of channels, and adds slices in one order or another."""
    names = set()
    faulty.fail("conv2d", how)
    for channels, size in ((32, 8), (36, 7)) if how == "channels" else ((32, 14), (32, 16)):
        x, w = leaf(1, channels, size, size), leaf(channels, channels, 3, 3)
        found, _ = told(lambda x=x, w=w: [convolution(x, w) for _ in range(2)][1])
        names.update(c.problem.partition(" channels by ")[0] for c in fk.tuning.choices() if "wgrad" in c.problem)
        with fk.backend("aten"):
            torch.testing.assert_close(found, convolution(x, w), rtol=1e-4, atol=1e-4)
    assert len({choice.agree for choice in fk.tuning.choices()}) == 2, "one was right, another wrong"
    if how == "channels":
        assert len(names) == 1, "by one kernel"


@pytest.mark.parametrize("blank", [False, True])
def test_a_sum_of_many_slices_is_rehearsed_in_many(faulty: Faulty, told: Told, blank: bool) -> None:
    """Eight threads add what one adds of fewer, and a batch of zeros tells nothing of either."""
    faulty.device(80, 108)
    x, w = leaf(2, 128, 64, 64, channels_last=True), leaf(1, 128, 1, 1)
    faulty.fail("conv2d", "many_slices")
    first = torch.zeros_like(x).requires_grad_() if blank else x
    told(lambda: conv2d(first, w).sum().backward())
    (wgrad,) = [choice for choice in fk.tuning.choices() if choice.problem.startswith("conv2d_wgrad")]
    assert "in many slices" in wgrad.problem
    assert not wgrad.agree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("how", "size", "filters", "groups"),
    [
        ("rest_of_positions", (2, 32, 9, 9), (32, 32, 3, 3), 1),
        ("rest_of_inputs", (2, 40, 8, 10), (32, 40, 3, 3), 1),
        ("rest_of_outputs", (2, 32, 8, 10), (40, 32, 3, 3), 1),
        ("rest_of_inputs", (2, 40, 8, 10), (40, 1, 3, 3), 40),
    ],
)
def test_what_is_left_over_behind_whole_tiles_is_held_though_the_first_call_leaves_nothing(
    faulty: Faulty,
    told: Told,
    how: str,
    size: tuple[int, ...],
    filters: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
) -> None:
    """Another size of a class may meet what the first has not."""
    depthwise = groups > 1
    first = leaf(2, 32, 8, 10, dtype=dtype, channels_last=True), leaf(32, 1 if depthwise else 32, 3, 3, dtype=dtype)
    x, w = leaf(*size, dtype=dtype, channels_last=True), leaf(*filters, dtype=dtype)
    faulty.fail("conv2d", how)
    told(lambda: convolution(*first, groups=32 if depthwise else 1))
    decided_by_first = fk.tuning.choices()
    found, _ = told(lambda: convolution(x, w, groups=groups))
    assert fk.tuning.choices() == decided_by_first, "of the same classes"
    with fk.backend("aten"):
        expected = convolution(x, w, groups=groups)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert {choice.agree for choice in decided_by_first} == {False}


# What is wrong; x, w and groups of the first call, which is right, and of a later one, which is not.
Call = tuple[tuple[int, ...], tuple[int, ...], int]
SQUARE = (16, 16, 3, 3)
LATER: list[tuple[str, Call, Call, dict[str, int]]] = [
    ("images", ((1, 16, 8, 8), SQUARE, 1), ((2, 16, 6, 6), SQUARE, 1), {"padding": 1}),
    ("groups", ((1, 8, 8, 8), (8, 4, 3, 3), 2), ((1, 16, 8, 8), (16, 4, 3, 3), 4), {"padding": 1}),
    ("tiles", ((1, 16, 7, 7), SQUARE, 1), ((1, 16, 9, 9), SQUARE, 1), {"padding": 1}),
    ("one_tile", ((1, 16, 9, 9), SQUARE, 1), ((1, 16, 7, 7), SQUARE, 1), {"padding": 1}),
    ("rows_left", ((1, 16, 15, 16), SQUARE, 1), ((1, 16, 16, 15), SQUARE, 1), {"padding": 1, "stride": 2}),
    ("no_rows_left", ((1, 16, 16, 15), SQUARE, 1), ((1, 16, 15, 15), SQUARE, 1), {"padding": 1, "stride": 2}),
    ("columns_left", ((1, 16, 15, 15), SQUARE, 1), ((1, 16, 15, 16), SQUARE, 1), {"padding": 1, "stride": 2}),
    ("no_columns_left", ((1, 16, 15, 16), SQUARE, 1), ((1, 16, 15, 15), SQUARE, 1), {"padding": 1, "stride": 2}),
    ("multiplier", ((1, 16, 8, 8), (16, 1, 3, 2), 16), ((1, 8, 8, 8), (16, 1, 3, 2), 8), {"padding": 1}),
    ("no_multiplier", ((1, 8, 8, 8), (16, 1, 3, 2), 8), ((1, 16, 8, 8), (16, 1, 3, 2), 16), {"padding": 1}),
    ("long_sums", ((1, 8, 12, 12), (32, 8, 1, 1), 1), ((1, 160, 3, 3), (32, 160, 1, 1), 1), {}),
    ("short_sums", ((1, 160, 3, 3), (32, 160, 1, 1), 1), ((1, 8, 12, 12), (32, 8, 1, 1), 1), {}),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("how", "first", "later", "settings"), LATER, ids=[row[0] for row in LATER])
def test_what_a_class_leaves_open_is_held_though_the_first_call_is_of_one_kind(
    faulty: Faulty,
    told: Told,
    how: str,
    first: Call,
    later: Call,
    settings: dict[str, int],
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    def call(of: Call) -> tuple[Tensor, ...]:
        x, w, groups = of
        operands = (torch.ones(size).to(dtype).requires_grad_() for size in (x, w))
        a, b = (
            t.contiguous(memory_format=torch.channels_last) if channels_last and t.shape == x else t for t in operands
        )
        y = conv2d(a, b, groups=groups, **settings)
        if how.endswith("sums"):
            return (y.detach(),)  # of many channels dgrad has another kernel than of few
        return (y.detach(), *torch.autograd.grad(y, (a, b), torch.ones_like(y)))

    faulty.fail("conv2d", how)
    told(lambda: call(first))
    decided_by_first = fk.tuning.choices()
    found, _ = told(lambda: call(later))
    assert fk.tuning.choices() == decided_by_first, "of the same classes"
    with fk.backend("aten"):
        torch.testing.assert_close(found, call(later), rtol=0, atol=0)
    assert False in {choice.agree for choice in decided_by_first}


def test_a_bias_is_held_though_the_first_call_has_none(faulty: Faulty, told: Told) -> None:
    x, w = leaf(2, 8, 6, 6), leaf(8, 8, 3, 3)
    faulty.fail("conv2d", "biased")
    told(lambda: conv2d(x, w))
    torch.testing.assert_close(conv2d(x, w, torch.ones(8)), F.conv2d(x, w, torch.ones(8)), rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 3, 6, 7])
def test_that_there_is_none_is_held_though_the_first_call_has_one(faulty: Faulty, told: Told, size: int) -> None:
    """Also where there is nothing to make ragged, and where an image less has as many elements as channels more."""
    x, w = leaf(2, 8, size, size), leaf(8, 8, min(size, 3), min(size, 3))
    faulty.fail("conv2d", "unbiased")
    told(lambda: conv2d(x, w, torch.ones(8)))
    torch.testing.assert_close(conv2d(x, w), F.conv2d(x, w), rtol=0, atol=0)


@pytest.mark.parametrize("groups", [1, 16])
def test_padding_is_held_though_the_first_call_has_none(faulty: Faulty, told: Told, groups: int) -> None:
    """What is outside of an image is other code than what is inside."""
    x, w = leaf(2, 16, 7, 7, channels_last=True), leaf(16, 16 // groups, 3, 3)
    faulty.fail("conv2d", "padded")
    told(lambda: convolution(x, w, 0, groups))
    found, _ = told(lambda: convolution(x, w, 1, groups))
    with fk.backend("aten"):
        expected = convolution(x, w, 1, groups)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_float32_bias_of_a_block_in_short_dtype_is_held_apart(faulty: Faulty) -> None:
    x, w = (leaf(*size, dtype=torch.bfloat16, channels_last=True).detach() for size in ((1, 8, 6, 6), (8, 8, 3, 3)))
    for bias in (torch.ones(8).bfloat16(), torch.ones(8)):
        torch.ops.freezekit.frozen_conv2d(x, w, bias)
    assert len(fk.tuning.choices()) == 2, "kernels read it by other code"


def test_each_vector_of_a_norm_and_its_dtype_is_held_apart(faulty: Faulty) -> None:
    """One that is there or of another dtype is read by code of its own."""
    x, w = (leaf(*size, dtype=torch.bfloat16, channels_last=True).detach() for size in ((1, 8, 6, 6), (8, 8, 3, 3)))
    block, dgrad = torch.ops.freezekit.frozen_conv2d, torch.ops.freezekit.frozen_conv2d_dgrad
    dy, seen = block(x, w)[0], 1
    for vector in (torch.ones(8), torch.ones(8).bfloat16()):
        norm = {"running_var": vector}
        for name in ("running_mean", "norm_weight", "norm_bias", "bias"):
            norm[name] = vector
            block(x, w, **norm)
            seen += 1
            assert len(fk.tuning.choices()) == seen
    for norm in ({}, {"norm_weight": torch.ones(8)}, {"norm_weight": torch.ones(8).bfloat16()}):
        dgrad(dy, w, x.shape, running_var=torch.ones(8), **norm)
        seen += 1
        assert len(fk.tuning.choices()) == seen


@pytest.mark.parametrize("which", ["x", "w", "dy", "bias"])
def test_kernels_meet_no_addresses_that_no_proof_has_met(faulty: Faulty, which: str) -> None:
    """Views may begin anywhere, and kernels have other code for addresses that are no multiples of 16."""
    x, w = leaf(2, 8, 6, 6, channels_last=True), leaf(8, 8, 3, 3, channels_last=True)
    bias, dy = torch.ones(8), torch.ones(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    given = {"x": x.detach(), "w": w.detach(), "dy": dy, "bias": bias}

    def step(x: Tensor, w: Tensor, dy: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y = conv2d(x.requires_grad_(), w.requires_grad_(), bias)
        return (y.detach(), *torch.autograd.grad(y, (x, w), dy))

    def moved(t: Tensor) -> Tensor:
        flat = torch.empty(t.numel() + 1)[1:]
        return flat.as_strided(t.size(), t.stride(), flat.storage_offset()).copy_(t)

    faulty.fail("conv2d", "unaligned")
    expected = [step(**given) for _ in range(2)][1]
    assert all(choice.backend == "native" for choice in fk.tuning.choices())
    found = step(**{**given, which: moved(given[which])})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_device_that_nothing_was_compiled_for_is_torch_s_without_a_word(faulty: Faulty, told: Told) -> None:
    x, w = leaf(1, 3, 6, 6), leaf(4, 3, 3, 3)
    faulty.device(75, 40)
    _, texts = told(lambda: [(step(fk.functional.relu, x), convolution(x, w)) for _ in range(2)])
    assert texts == []
    assert {choice.note for choice in fk.tuning.choices()} == {"this build has no code for such a device"}
    assert launched(lambda: (step(fk.functional.relu, x), convolution(x, w))) == []
    assert json.loads(fk.tuning.dump_choices())["choices"] == [], "another build may have it"


def test_where_memory_is_short_later_torch_s_way_serves(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = leaf(2, 8, 6, 6), leaf(8, 8, 3, 3)
    convolution(x, w)
    saved = fk.tuning.dump_choices()
    with fk.backend("aten"):
        expected = convolution(x, w)
    faulty.fail("conv2d", "memory")
    torch.testing.assert_close(convolution(x, w), expected, rtol=0, atol=0)
    assert {choice.backend for choice in fk.tuning.choices()} == {"native"}, "of that call alone"
    # Where results are to repeat, what memory there is must not tell in their bits.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    fk.tuning.load_choices(saved)
    with pytest.raises(torch.OutOfMemoryError):
        convolution(x, w)


@pytest.mark.parametrize("run", [4, 5, 6])
def test_what_interrupts_one_run_decides_nothing(faulty: Faulty, run: int) -> None:
    """Three runs compare, three are timed; the emulated ones are told to be a thousand times as fast as they are."""
    x, w = leaf(1, 3, 6, 6), leaf(4, 3, 3, 3)
    _C.choices.emulate(1e-3)
    faulty.wait(run)
    conv2d(x, w)
    assert decided()["conv2d"].backend == "native"


@pytest.mark.parametrize("how", ["no_code", "no_translation"])
def test_a_launch_that_finds_no_code_is_no_fault_of_the_kernel(faulty: Faulty, told: Told, how: str) -> None:
    """Code for sm_90a runs on no later device, and an older driver than nvcc translates nothing: no property tells."""
    x, w = leaf(1, 3, 6, 6), leaf(4, 3, 3, 3)
    for kernel, call in (("activation", lambda: step(fk.functional.relu, x)), ("conv2d", lambda: convolution(x, w))):
        faulty.fail(kernel, how)
        assert told(call)[1] == []
    assert {choice.note for choice in fk.tuning.choices()} == {"this build has no code for such a device"}


def test_a_device_that_cannot_be_asked_what_it_is_is_torch_s(faulty: Faulty) -> None:
    """Where the driver serves the CUDA of torch, but not a later one that freezekit was built with."""
    faulty.fail("target", "old_driver")
    x, w, block = leaf(1, 3, 6, 6), leaf(4, 3, 3, 3), torch.ops.freezekit.frozen_conv2d
    calls = [lambda own=own: step(own, x) for _, own, _, _ in LAYERS.values()]
    calls += [lambda: convolution(x, w), lambda: block(x.detach(), w.detach(), activation="relu")[0]]
    for call in calls:
        with fk.backend("aten"):
            expected = call()
        assert launched(call) == []
        torch.testing.assert_close(call(), expected, rtol=0, atol=0)
    assert fk.tuning.choices() == []


@pytest.mark.parametrize("how", ["", "wrong", "throws", "memory"])
def test_a_proof_ends_no_capture_that_is_under_way_elsewhere(faulty: Faulty, told: Told, how: str) -> None:
    """Waits and allocations of a thread do, unless it has said that they have nothing to do with captures."""
    x = leaf(3, 50)
    faulty.capture_modes()
    faulty.fail("activation" if how else "", how)
    told(lambda: fk.functional.relu(x))
    others, in_proof, now = faulty.capture_modes()
    assert in_proof > 0
    assert others == (0 if how else 1), "the call itself, where the proof let it"
    assert now == 0
