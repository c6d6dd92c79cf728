"""What a proof finds: kernels that are wrong in one element, that fail, that find no memory. No user meets them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import freezekit as fk
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
    kernels.mend()
    kernels.capture(False)


# Layer, the kernel that fails, what the choice says where it gives one wrong element.
LAYER_FAULTS = [
    ("relu", "activation", "a value differs by 0.25 where 0 is allowed"),
    ("relu", "bits", "a value differs by"),
    ("relu", "gate", "a value differs by 0.25"),
    ("relu", "leaky_relu", "leaky_relu: a value differs by 0.25"),
    ("dropout", "pack_bytes", "a value differs by"),
    ("dropout", "gate", "a value differs by 0.25"),
    ("dropout", "bits", "1 of "),
    ("max_pool2d", "max_pool", "a value differs by 0.25"),
    ("max_pool2d", "scatter", "a value differs by 0.25"),
    ("max_pool2d", "wide_pool", "a value differs by"),
]


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


@pytest.mark.parametrize("kernel", ["activation", "gate"])
def test_no_memory_is_no_fault_and_never_seen(faulty: Faulty, told: Told, kernel: str) -> None:
    x = leaf(7, 9)
    faulty.fail(kernel, "memory")
    found, texts = told(lambda: step(fk.functional.relu, x))
    torch.testing.assert_close(found, step(torch.relu, x), rtol=0, atol=0)
    assert texts == []
    assert decided()["activation"].note == "no memory was left to compare them"
    assert launched(lambda: step(fk.functional.relu, x)) == []


def convolution(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = conv2d(x, w, padding=1)
    return (y.detach(), *torch.autograd.grad(y, (x, w), torch.ones_like(y)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["wrong", "throws", "refused", "memory"])
def test_convolutions_are_held_the_same_way(faulty: Faulty, told: Told, how: str, dtype: torch.dtype) -> None:
    x, w = leaf(2, 8, 6, 6, dtype=dtype), leaf(8, 8, 3, 3, dtype=dtype)
    faulty.fail("conv2d", how)
    found, texts = told(lambda: convolution(x, w))
    with fk.backend("aten"):
        torch.testing.assert_close(found, convolution(x, w), rtol=0, atol=0)
    assert list(decided()) == ["conv2d", "conv2d_dgrad", "conv2d_wgrad"]
    assert not any(choice.agree for choice in fk.tuning.choices())
    assert len(texts) == (0 if how == "memory" else 3)
    faulty.mend()
    assert launched(lambda: convolution(x, w)) == []


def test_bits_that_belong_to_another_result_are_found(faulty: Faulty, told: Told) -> None:
    x, w = leaf(1, 8, 6, 6, channels_last=True), torch.randn(8, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    faulty.fail("conv2d_mask", "wrong")
    _, texts = told(lambda: torch.ops.freezekit.frozen_conv2d(x, w, activation="relu", padding=[1]))
    assert [choice.note for choice in fk.tuning.choices() if choice.problem.startswith("conv2d+")] == [
        "1 of 9 words differ"
    ]
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
