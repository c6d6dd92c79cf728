"""torch.compile: what is compiled while enabled keeps no frozen input, what is compiled without is torch's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import freezekit as fk
from tests.enabled.helpers import gradients
from tests.fresh import Fresh
from tests.observe import bytes_saved


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, 2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 4, 1),
    )
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_no_frozen_input_is_kept(dynamic: bool) -> None:
    model = net()
    owned = [*model.parameters(), *model.buffers()]
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    expected = gradients(model, x)
    stock = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch_s = bytes_saved(lambda: stock(x), owned)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with fk.enabled():
        ours = bytes_saved(lambda: compiled(x), [*owned, x])
        # Batch norm's scale, and what the compiler keeps of ReLU: its own choice.
        relu = 2 * 8 * 16 * 16 * 4
        assert ours <= relu + 4096 < torch_s / 4
        for a, b in zip(gradients(compiled, x), expected, strict=True):
            torch.testing.assert_close(a, b)
    # It stays what it was compiled to, and right.
    for a, b in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_batch_norm_in_training_moves_its_statistics() -> None:
    """torch.compile learns from a kernel in Python that this operator writes to them."""
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    norms = [nn.BatchNorm2d(3).requires_grad_(False) for _ in range(2)]
    expected = gradients(norms[0], x)
    with fk.enabled():
        found = gradients(torch.compile(norms[1], backend="aot_eager", fullgraph=True), x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(norms[1], name), getattr(norms[0], name))
    assert not torch.equal(norms[1].running_mean, torch.zeros(3))


def test_compiled_without_is_torch_s() -> None:
    model = net()
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    before = bytes_saved(lambda: torch.compile(model, backend="aot_eager")(x))
    torch._dynamo.reset()
    with fk.enabled():
        torch.compile(model, backend="aot_eager")(x)
    torch._dynamo.reset()
    assert bytes_saved(lambda: torch.compile(model, backend="aot_eager")(x)) == before


def test_switching_within_a_compiled_function_breaks_the_graph() -> None:
    conv = nn.Conv2d(2, 2, 3).requires_grad_(False)

    @torch.compile(backend="eager")
    def call(x: Tensor) -> Tensor:
        with fk.enabled():
            y = conv(x)
        return y

    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    assert torch.equal(call(x), conv(x))
    assert not fk.is_enabled()


def test_compiled_autograd() -> None:
    model = net()
    x = torch.randn(2, 3, 16, 16)

    def step() -> Tensor:
        leaf = x.clone().requires_grad_()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            model(leaf).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = torch.autograd.grad(model(x.requires_grad_()).sum(), x)[0]
    x = x.detach()
    with fk.enabled():
        torch.testing.assert_close(step(), expected)


def test_the_user_s_tag_is_kept() -> None:
    from torch.compiler import config

    with config.patch(cache_key_tag="mine"):
        with fk.enabled():
            assert config.cache_key_tag == "mine+freezekit"
            with config.patch(cache_key_tag="other"):
                assert config.cache_key_tag == "other+freezekit"
            assert config.cache_key_tag == "mine+freezekit"
        assert config.cache_key_tag == "mine"
        with config.patch(cache_key_tag="other"):
            fk.enable()
        assert config.cache_key_tag == "mine+freezekit"
        fk.disable()
        assert config.cache_key_tag == "mine"


def test_the_tag_is_there_in_every_thread() -> None:
    """torch's settings of a compiler are each thread's own."""
    from torch.compiler import config

    def elsewhere() -> str:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: config.cache_key_tag).result()

    before = elsewhere()
    with fk.enabled():
        assert elsewhere() == before + "+freezekit"
    assert elsewhere() == before


COMPILE = """
import sys
import torch
from torch._dynamo.utils import counters

if sys.argv[1] == "enabled":
    import freezekit as fk
    fk.enable()
torch.manual_seed(0)
conv = torch.nn.Conv2d(3, 4, 3).requires_grad_(False)
x = torch.randn(1, 3, 8, 8, requires_grad=True)
kept = []
with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
    y = torch.compile(conv)(x * 1)
y.sum().backward()
assert sys.argv[1] == "enabled" or "freezekit" not in sys.modules
found = counters["aot_autograd"]
print(found["autograd_cache_hit"], found["autograd_cache_miss"], int(x.numel() in kept))
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Fresh]:
    """Each with an empty memory, all with one folder for what they compile."""
    environment = {"CACHE_DIR": str(tmp_path), "FX_GRAPH_CACHE": "1", "AUTOGRAD_CACHE": "1"}
    environment |= {
        "COMPILE_THREADS": "1",
        "VEC_ISA_OK": "1",
    }  # no other processes
    with_inductor = Fresh("torch._inductor.compile_fx", {f"TORCHINDUCTOR_{k}": v for k, v in environment.items()})
    yield with_inductor
    with_inductor.close()


def test_persistent_caches_hand_nothing_across(processes: Fresh) -> None:
    """Processes that share one cache: (hits, misses, whether the convolution keeps its input)."""

    def process(how: str) -> list[str]:
        done = processes.run(COMPILE, how)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert process("enabled") == ["0", "1", "0"]
    assert process("stock") == ["0", "1", "1"]
    assert process("enabled") == ["1", "0", "0"]
    assert process("stock") == ["1", "0", "1"]
