"""`auto` on a GPU, for layers: a kernel is held against torch's operator at its first call, and taken where it won."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from freezekit import _C
from tests.conftest import on
from tests.observe import Calls
from tests.proof.stand_in import FASTER, SLOWER, decided, launched, leaf, stand_in

Layer = Callable[[Tensor], Tensor]

# Name: what proves it, freezekit's layer, torch's, and what a step launches once it is proven. On a CPU dropout draws
# noise, whose bits are those of its signs.
LAYERS: dict[str, tuple[str, Layer, Layer, list[str]]] = {
    "relu": ("activation", fk.functional.relu, F.relu, ["activation_relu", "gate_select"]),
    "relu_": (
        "activation",
        lambda x: fk.functional.relu(x * 1, inplace=True),
        lambda x: F.relu(x * 1, inplace=True),
        ["activation_relu", "gate_select"],
    ),
    "relu6": ("activation", fk.functional.relu6, F.relu6, ["activation_hardtanh", "gate_select"]),
    "hardtanh": (
        "activation",
        lambda x: fk.functional.hardtanh(x, -0.5, 0.25),
        lambda x: F.hardtanh(x, -0.5, 0.25),
        ["activation_hardtanh", "gate_select"],
    ),
    "leaky_relu": (
        "activation",
        lambda x: fk.functional.leaky_relu(x, 0.2),
        lambda x: F.leaky_relu(x, 0.2),
        ["activation_leaky_relu", "gate_scale"],
    ),
    "dropout": (
        "dropout",
        lambda x: fk.functional.dropout(x, 0.3),
        lambda x: F.dropout(x, 0.3),
        ["activation_relu", "gate_scale", "gate_scale"],
    ),
    "dropout_": (
        "dropout",
        lambda x: fk.functional.dropout(x * 1, 0.3, inplace=True),
        lambda x: F.dropout(x * 1, 0.3, inplace=True),
        ["activation_relu", "gate_scale", "gate_scale"],
    ),
    "max_pool2d": (
        "max_pool2d",
        lambda x: fk.functional.max_pool2d(x, 3, 2, 1),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        ["max_pool", "max_pool_scatter"],
    ),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> tuple[str, Layer, Layer, list[str]]:
    return LAYERS[request.param]


@pytest.fixture
def fast() -> Iterator[None]:
    with stand_in(FASTER):
        yield


def step(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient, with a seed of its own."""
    torch.manual_seed(1)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    dy = torch.arange(y.numel(), dtype=torch.float32).remainder(5).view(y.shape).to(y)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_proven_at_the_first_call_and_taken_from_then_on(
    fast: None, layer: tuple[str, Layer, Layer, list[str]], dtype: torch.dtype, channels_last: bool
) -> None:
    name, own, stock, kernels = layer
    x = leaf(2, 5, 9, 8, dtype=dtype, channels_last=channels_last)
    expected = step(stock, x)
    found = []
    first = launched(lambda: found.append(step(own, x)))
    again = launched(lambda: found.append(step(own, x)))
    assert again == kernels
    assert len(first) > len(again)
    assert first[-len(kernels) :] == kernels  # the first call takes what it has proven
    assert list(decided()) == [name]
    assert decided()[name].backend == "native"
    for got in found:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_what_is_slower_is_torch_s_and_keeps_what_torch_keeps(layer: tuple[str, Layer, Layer, list[str]]) -> None:
    name, own, stock, _ = layer
    x = leaf(2, 5, 9, 8)
    with stand_in(SLOWER):
        step(own, x)
        assert decided()[name].agree
        assert decided()[name].backend == "aten"
        assert launched(lambda: step(own, x)) == []
        assert own(x).grad_fn.name() == stock(x).grad_fn.name()


@pytest.mark.parametrize("handicap", [FASTER, SLOWER])
def test_a_proof_leaves_the_tensor_and_the_generator_alone(
    layer: tuple[str, Layer, Layer, list[str]], handicap: float
) -> None:
    _, own, stock, _ = layer
    x = leaf(2, 5, 9, 8)
    before, version = x.detach().clone(), x._version
    torch.manual_seed(3)
    stock(x)
    expected = torch.get_rng_state()
    with stand_in(handicap):
        torch.manual_seed(3)
        own(x)
        assert torch.equal(torch.get_rng_state(), expected)
    assert torch.equal(x, before)
    assert x._version == version


def test_an_in_place_call_changes_its_tensor_once(fast: None) -> None:
    for inplace in (lambda t: fk.functional.relu(t, inplace=True), lambda t: fk.functional.leaky_relu(t, 2.0, True)):
        for _ in range(2):
            x = leaf(3, 40) * 1
            expected, version = x.detach().clone(), x._version
            inplace(x)
            assert x._version == version + 1
            assert torch.equal(x.detach(), inplace(expected))


def test_without_a_gradient_nothing_is_decided(fast: None, layer: tuple[str, Layer, Layer, list[str]]) -> None:
    _, own, _, _ = layer
    x = torch.randn(2, 5, 9, 8)
    assert launched(lambda: own(x)) == []
    assert fk.tuning.choices() == []


def test_without_the_switch_a_cpu_decides_nothing(layer: tuple[str, Layer, Layer, list[str]]) -> None:
    _, own, _, _ = layer
    assert launched(lambda: step(own, leaf(2, 5, 9, 8))) == []
    assert fk.tuning.choices() == []


@pytest.mark.parametrize("backend", ["aten", "emulated"])
def test_a_demand_is_not_held_against_anything(
    fast: None, layer: tuple[str, Layer, Layer, list[str]], backend: fk.backends.Backend
) -> None:
    _, own, _, kernels = layer
    with on(backend):
        assert launched(lambda: step(own, leaf(2, 5, 9, 8))) == (kernels if backend == "emulated" else [])
    assert fk.tuning.choices() == []


def test_each_dtype_size_and_layout_is_a_meeting_of_its_own(fast: None) -> None:
    calls = [
        lambda: step(fk.functional.relu, leaf(64)),
        lambda: step(fk.functional.relu, leaf(64, dtype=torch.bfloat16)),
        lambda: step(fk.functional.relu, leaf(1 << 20)),
        lambda: step(LAYERS["max_pool2d"][1], leaf(1, 2, 6, 6)),
        lambda: step(LAYERS["max_pool2d"][1], leaf(1, 2, 6, 6, channels_last=True)),
    ]
    for i, call in enumerate(calls):
        call()
        call()
        assert len(fk.tuning.choices()) == i + 1
    step(fk.functional.relu, leaf(3, 5))  # another size of the same class
    step(fk.functional.leaky_relu, leaf(64))  # proven together
    assert len(fk.tuning.choices()) == len(calls)
    assert {choice.problem for choice in fk.tuning.choices()} >= {
        "activation Float small on cpu sm_80 of 4",
        "activation BFloat16 small on cpu sm_80 of 4",
        "activation Float large on cpu sm_80 of 4",
        "max_pool2d Float small channels_last on cpu sm_80 of 4",
    }


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "dropout", "max_pool2d"])
def test_a_tensor_that_kernels_cannot_read_decides_nothing(fast: None, name: str) -> None:
    _, own, stock, kernels = LAYERS[name]
    gaps = leaf(2, 5, 9, 16)[..., ::2]
    assert own(gaps).grad_fn.name() == stock(gaps).grad_fn.name()
    assert fk.tuning.choices() == []
    for _ in range(3):  # proven, then found among what is known, then remembered
        step(own, leaf(2, 5, 9, 8))
        assert launched(lambda: own(gaps)) == []  # nor is it read later, by a copy
    assert own(gaps).grad_fn.name() == stock(gaps).grad_fn.name()
    assert launched(lambda: step(own, leaf(2, 5, 9, 8))) == kernels


@pytest.mark.parametrize("setting", ["algorithms", "cudnn"])
def test_under_determinism_nothing_is_measured_and_only_what_was_loaded_is_taken(
    fast: None, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    x = leaf(3, 50)
    step(fk.functional.relu, x)
    exported = fk.tuning.dump_choices()
    if setting == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    else:
        torch.use_deterministic_algorithms(True)
    try:
        assert launched(lambda: step(fk.functional.relu, x)) == []  # measured: a clock decided
        fk.tuning.clear_choices()
        assert launched(lambda: step(fk.functional.relu, x)) == []
        assert fk.tuning.choices() == []
        fk.tuning.load_choices(exported)
        assert launched(lambda: step(fk.functional.relu, x)) == LAYERS["relu"][3]
    finally:
        torch.use_deterministic_algorithms(False)


def test_bits_that_are_there_are_read_by_kernels_whatever_is_set_since(fast: None) -> None:
    x = leaf(3, 50)
    y = fk.functional.relu(x)
    torch.use_deterministic_algorithms(True)
    try:
        assert launched(lambda: y.sum().backward()) == ["gate_select"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(x.grad, (x > 0).float())


def test_choices_forgotten_between_the_passes_do_no_harm(fast: None) -> None:
    for name in ("relu", "leaky_relu", "dropout", "max_pool2d"):
        _, own, stock, _ = LAYERS[name]
        x = leaf(2, 5, 9, 8)
        torch.manual_seed(1)
        y = own(x)
        fk.tuning.clear_choices()
        y.sum().backward()
        torch.manual_seed(1)
        torch.testing.assert_close(x.grad, torch.autograd.grad(stock(x).sum(), x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("watch", ["mode", "grad", "vmap", "compile"])
def test_tracers_and_transforms_decide_nothing(
    fast: None, layer: tuple[str, Layer, Layer, list[str]], watch: str
) -> None:
    name, own, _, _ = layer
    if watch == "vmap" and name == "dropout":
        pytest.skip("torch's own dropout refuses vmap without a randomness")
    x = leaf(2, 5, 9, 8)
    if watch == "mode":
        with Calls():
            own(x)
    elif watch == "grad":
        torch.func.grad(lambda t: own(t).sum())(x)
    elif watch == "vmap":
        torch.vmap(own)(x.unsqueeze(0))
    else:
        torch.compile(own, backend="aot_eager")(x).sum().backward()
    assert fk.tuning.choices() == []


@pytest.mark.parametrize("name", ["relu", "max_pool2d"])
def test_compiled_activations_are_the_compilers_and_pools_are_not(fast: None, name: str) -> None:
    """Once proven, too: a compiler fuses an activation with its neighbours, and has nothing for a pool."""
    _, own, _, kernels = LAYERS[name]
    x = leaf(2, 5, 9, 8)
    step(own, x)
    compiled = torch.compile(own, backend="aot_eager")
    assert launched(lambda: step(compiled, x)) == ([] if name == "relu" else kernels)
    torch._dynamo.reset()
    with fk.testing.emulated():  # a demand takes the bits
        assert launched(lambda: step(compiled, x)) == kernels


def test_enabled_operators_go_the_same_way(layer: tuple[str, Layer, Layer, list[str]]) -> None:
    name, _, stock, kernels = layer
    x = leaf(2, 5, 9, 8)
    expected = step(stock, x)
    for handicap, wanted in ((FASTER, kernels), (SLOWER, [])):
        with stand_in(handicap), fk.enabled():
            torch.testing.assert_close(step(stock, x), expected, rtol=0, atol=0)
            assert launched(lambda: step(stock, x)) == wanted
            assert list(decided()) == [name]


def test_threads_that_meet_a_kernel_at_once_decide_once(fast: None) -> None:
    x = leaf(64, 64)
    expected = torch.relu(x.detach())
    start, wrong = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        for _ in range(20):
            y, dx = step(fk.functional.relu, x)
            if not torch.equal(y, expected) or bool((dx[x <= 0] != 0).any()):
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # Which a proof alone runs here: two pairs of ends, out of place and in place. At most four threads prove.
    assert launched(run).count("activation_hardtanh") in (4, 8, 12, 16)
    assert not wrong
    assert list(decided()) == ["activation"]


def test_a_checkpoint_makes_again_what_it_kept_though_another_thread_was_proving(fast: None) -> None:
    """A first pass by torch's operator would have kept a tensor where the second keeps bits."""
    large, x = leaf((1 << 20) - 1), leaf(1 << 9)
    checkpoint(torch.sin, x, use_reentrant=False)  # its first call imports
    _C.set_launch_log(True)
    try:
        other = threading.Thread(target=lambda: fk.functional.relu(large))
        other.start()
        while not _C.take_launch_log() and other.is_alive():
            pass
        y = checkpoint(lambda t: fk.functional.relu(t) * 2, x, use_reentrant=False)
        other.join()
    finally:
        _C.set_launch_log(False)
    y.sum().backward()
    assert torch.equal(x.grad, (x > 0).float() * 2)
    assert len(fk.tuning.choices()) == 1
