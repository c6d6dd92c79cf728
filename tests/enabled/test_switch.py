"""The switch itself: what it takes over, that it gives it back, and what misuse says."""

from __future__ import annotations

import functools
import os
import signal
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from tests import fresh
from tests.enabled.helpers import AUTOGRAD_KEYS, tables
from tests.observe import bytes_saved


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    assert not fk.is_enabled()
    yield
    assert not fk.is_enabled()


def keeps_input() -> bool:
    """Whether a frozen convolution keeps its input."""
    conv = nn.Conv2d(2, 2, 3).requires_grad_(False)
    x = torch.ones(1, 2, 8, 8, requires_grad=True)
    return bytes_saved(lambda: conv(x * 1), conv.parameters()) >= 4 * x.numel()


def test_every_table_is_what_it_was() -> None:
    before = tables()
    with fk.enabled():
        for name, table in tables().items():
            for key in AUTOGRAD_KEYS:
                entry = next(line for line in table.splitlines() if line.startswith(key + ":"))
                assert "csrc/torch/enable" in entry, (name, entry)
    assert tables() == before


def test_only_their_autograd_keys_change() -> None:
    before = tables()
    with fk.enabled():
        for name, table in tables().items():
            changed = set(table.splitlines()) ^ set(before[name].splitlines())
            assert {line.split(":")[0] for line in changed} == set(AUTOGRAD_KEYS), name


def test_it_saves_while_it_is_on() -> None:
    assert keeps_input()
    fk.enable()
    try:
        assert fk.is_enabled()
        assert not keeps_input()
    finally:
        fk.disable()
    assert keeps_input()


def test_calls_nest() -> None:
    fk.enable()
    with fk.enabled():
        fk.enable()
        fk.disable()
        assert fk.is_enabled()
    assert fk.is_enabled()
    assert not keeps_input()
    fk.disable()
    assert not fk.is_enabled()


def test_disable_needs_an_enable() -> None:
    with pytest.raises(RuntimeError, match=r"not enabled: disable\(\) needs an enable\(\)"):
        fk.disable()


def test_an_exception_passes_and_switches_off() -> None:
    with pytest.raises(ZeroDivisionError), fk.enabled():
        raise ZeroDivisionError
    assert keeps_input()


def test_decorator() -> None:
    @fk.enabled()
    def inside(deeper: bool) -> bool:
        assert not keeps_input()
        return inside(False) if deeper else fk.is_enabled()

    assert inside(True)
    assert not fk.is_enabled()


def test_what_runs_after_the_call_is_refused() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    class Later:
        async def __call__(self) -> None: ...

    cached = functools.lru_cache(numbers)
    for later in (
        numbers,
        functools.partial(numbers),
        cached,
        functools.partial(cached),
        staticmethod(numbers),
        Later(),
    ):
        with pytest.raises(TypeError, match="generator or coroutine .*(numbers|Later)"):
            fk.enabled()(later)


def test_what_is_no_function_is_refused() -> None:
    for other in (nn.ReLU, 3):
        with pytest.raises(TypeError, match=r"enabled\(\) decorates functions, got (<class|3)"):
            fk.enabled()(other)  # type: ignore[type-var]
    assert fk.enabled()(nn.ReLU())(torch.ones(2)).tolist() == [1, 1]


def test_backward_needs_no_switch() -> None:
    conv = nn.Conv2d(2, 3, 3).requires_grad_(False)
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with fk.enabled():
        y = F.relu(conv(x))
    expected = torch.autograd.grad(F.relu(conv(x)).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_the_switch_is_the_process_s() -> None:
    found = []
    with fk.enabled():
        thread = threading.Thread(target=lambda: found.append(keeps_input()))
        thread.start()
        thread.join()
    assert found == [False]


def test_switching_while_other_threads_compute() -> None:
    conv = nn.Conv2d(2, 2, 3).requires_grad_(False)
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(F.relu(conv(x)).sum(), x)[0]
    stop, wrong = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            if not torch.equal(torch.autograd.grad(F.relu(conv(x)).sum(), x)[0], expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        with fk.enabled():
            F.relu(conv(x))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_is_as_its_parent_and_apart_from_it() -> None:
    with fk.enabled():
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if fk.is_enabled() and not keeps_input():
                    fk.disable()
                    code = 0 if keeps_input() else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not keeps_input()


def test_a_child_forked_while_another_thread_switches() -> None:
    stop = threading.Event()

    def switch() -> None:
        while not stop.is_set():
            with fk.enabled():
                pass

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(10)  # one that waits for the other thread's lock is ended
                fk.enable()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()


def test_cuda_stays_uninitialised() -> None:
    with fk.enabled():
        F.relu(torch.ones(2, requires_grad=True)).sum().backward()
    assert torch.cuda.is_available() or not torch.cuda.is_initialized()


def test_inference_mode_and_no_grad_are_torch_s() -> None:
    conv = nn.Conv2d(2, 2, 3)
    x = torch.randn(1, 2, 8, 8)
    expected = conv(x)
    with fk.enabled():
        with torch.inference_mode():
            y = F.relu_(conv(x))
            assert y.is_inference()
        assert torch.equal(y, F.relu(expected))
        with torch.no_grad():
            assert not F.relu(conv(x)).requires_grad
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            conv(y.unsqueeze(0)[0])


OTHER = """
import warnings
import torch
import torch.nn.functional as F
import freezekit as fk

seen = []

def theirs(x):
    seen.append("theirs")
    return torch.zeros_like(x)

library = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    library.impl("relu", theirs, "AutogradCPU")
x = torch.ones(2, requires_grad=True)
before = torch._C._dispatch_dump_table("aten::relu")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        with fk.enabled():
            assert F.relu(x).tolist() == [0.0, 0.0]
            y = F.hardtanh(x)
            assert "Freezekit" in y.grad_fn.name(), y.grad_fn
messages = [str(w.message) for w in caught if "another library" in str(w.message)]
assert len(messages) == 1 and "relu" in messages[0] and "hardtanh" not in messages[0], messages
assert seen == ["theirs"] * 2
assert torch._C._dispatch_dump_table("aten::relu") == before
"""

LATER = """
import warnings
import torch
import torch.nn.functional as F
import freezekit as fk

x = torch.ones(2, requires_grad=True)
before = torch._C._dispatch_dump_table("aten::relu")
fk.enable()
library = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    library.impl("relu", lambda x: torch.zeros_like(x), "AutogradCPU")
assert F.relu(x).tolist() == [0.0, 0.0]
fk.disable()
assert F.relu(x).tolist() == [0.0, 0.0]
library._destroy()
assert F.relu(x).tolist() == [1.0, 1.0]
assert torch._C._dispatch_dump_table("aten::relu") == before
"""


BELOW = """
import sys
import warnings
import torch
import torch.nn.functional as F
import freezekit as fk

operator, key = sys.argv[1:]
calls = {
    "relu": F.relu,
    "hardtanh_": lambda x: F.hardtanh_(x * 1),
    "dropout": lambda x: (torch.manual_seed(0), F.dropout(x, 0.5))[1],
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d_with_indices": lambda x: F.max_pool2d(x, 2),
    "max_pool3d_with_indices": lambda x: F.max_pool3d(x[None], 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
}
kernel, seen = torch.library.get_kernel(f"aten::{operator}", key), []

def theirs(keys, *args):
    seen.append(operator)
    return kernel.call_boxed(keys, *args)

library = torch.library.Library("aten", "IMPL")
x = torch.randn(1, 2, 4, 4, requires_grad=True)
expected = calls[operator](x)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    library.impl(operator, theirs, key, with_keyset=True)
    with fk.enabled():
        assert torch.equal(calls[operator](x), expected)
assert seen
name = operator.removesuffix("_with_indices")
print(any("another library" in str(w.message) and name in str(w.message) for w in caught))
library._destroy()
with fk.enabled():
    assert "Freezekit" in calls[operator](x).grad_fn.name()
"""


@pytest.mark.parametrize(
    ("operator", "key", "warns"),
    [
        ("relu", "CPU", True),
        ("hardtanh_", "CPU", True),
        ("max_pool2d_with_indices", "CPU", True),
        ("max_pool2d_with_indices", "AutogradCPU", True),
        ("max_pool3d_with_indices", "CPU", True),
        ("dropout", "CPU", True),  # composed by torch, of operators that have kernels
        ("max_pool2d", "CPU", True),
        ("avg_pool2d", "CPU", False),  # freezekit calls it
    ],
)
def test_another_library_s_kernel_for_a_device_is_called(operator: str, key: str, warns: bool) -> None:
    """As libraries of kernels register theirs: below autograd."""
    done = fresh.run(BELOW, operator, key)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{warns}\n"


@pytest.mark.parametrize("script", [OTHER, LATER], ids=["before", "after"])
def test_another_library_s_kernel_is_called(script: str) -> None:
    done = fresh.run(script)
    assert done.returncode == 0, done.stderr


def test_a_warning_made_an_error_leaves_it_off() -> None:
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.impl("relu", torch.zeros_like, "AutogradCPU")
        before = tables()
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(UserWarning, match="another library has overridden relu"):
                    fk.enable()
            assert not fk.is_enabled()
            assert tables() == before
    finally:
        library._destroy()


def test_no_warning_is_given() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fk.enabled():
            pass


def test_many_switches_hold_no_memory() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def switch(times: int) -> None:
        for _ in range(times):
            with fk.enabled():
                pass

    switch(200)
    before = resident()
    switch(400)
    assert resident() - before < 400 << 10  # less than a kilobyte for each


def test_kernels_are_called_as_before_under_a_user_s_mode() -> None:
    from tests.observe import Calls

    def step(x: Tensor) -> Tensor:
        return F.max_pool2d(F.dropout(F.hardtanh(F.relu(x)), 0.5), 2)

    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with Calls() as stock:
        step(x)
    with fk.enabled(), Calls() as enabled:
        step(x)
    assert enabled.count == stock.count
