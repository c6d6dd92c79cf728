"""Torch's settings hold for freezekit's kernels: tf32 by either of its switches, determinism, the current stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freezekit import _C
from freezekit.functional import conv2d
from tests.conftest import gpu, on


@pytest.fixture(params=["emulated", gpu])
def own(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device on which freezekit's kernels run."""
    with on(request.param):
        yield "cuda" if request.param == "native" else "cpu"


def kernels(run: Callable[[], object]) -> list[str]:
    """Names of the kernels that ran."""
    _C.set_launch_log(True)
    try:
        run()
        return [row["kernel"] for row in _C.take_launch_log()]
    finally:
        _C.set_launch_log(False)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    convolutions, recurrent = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
    yield
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = convolutions, recurrent
    torch.use_deterministic_algorithms(False)


def legacy(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed


def of_convolutions(allowed: bool) -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"


@pytest.mark.parametrize("allow", [legacy, of_convolutions])
def test_tf32_is_used_where_torch_allows_it(allow: Callable[[bool], None], own: str) -> None:
    """The second switch is set for convolutions alone, which torch 2.9 brought; recurrent networks keep theirs."""
    x, w = torch.randn(2, 16, 6, 6, device=own), torch.randn(16, 16, 3, 3, device=own)
    x, w = x.requires_grad_(), w.requires_grad_()

    def step() -> None:
        conv2d(x, w).sum().backward()

    for allowed in (True, False, True):
        allow(allowed)
        ran = kernels(step)
        assert len(ran) == 3
        assert all(name.startswith("implicit_gemm" if allowed else "direct") for name in ran), ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 16])
def test_gradients_repeat_bit_for_bit(groups: int, dtype: torch.dtype, own: str) -> None:
    """wgrad's slices are added in order, whatever torch's settings for determinism are."""
    x = torch.randn(4, 16, 20, 20, device=own).to(dtype).requires_grad_()
    w = torch.randn(16, 16 // groups, 3, 3, device=own).to(dtype).requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        y = conv2d(x, w, padding=1, groups=groups)
        return torch.autograd.grad(y, (x, w), torch.ones_like(y))

    first = gradients()
    torch.use_deterministic_algorithms(True)
    for again in (gradients(), gradients()):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"padding": 1, "stride": 2}, {"padding": 1, "groups": 16}], ids=str)
def test_a_cuda_graph_captures_a_step(settings: dict, dtype: torch.dtype) -> None:
    """fprop, dgrad with its W' and wgrad with its slices, on another stream, with memory of the graph's pool."""
    x = torch.randn(4, 16, 20, 20, device="cuda", dtype=dtype).requires_grad_()
    w = torch.randn(16, 16 // settings.get("groups", 1), 3, 3, device="cuda", dtype=dtype).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = conv2d(x, w, **settings, backend="native")
        return (y.detach(), *torch.autograd.grad(y, (x, w), torch.ones_like(y)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            x.normal_(), w.normal_()
        graph.replay()
        for replayed, eager in zip(captured, step(), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_work_is_queued_on_the_current_stream() -> None:
    """What the side stream makes late is what the kernel reads; on the default stream it would read zeros."""
    x, w = torch.zeros(8, 64, 56, 56, device="cuda"), torch.ones(64, 64, 3, 3, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.fill_(1)
        y = conv2d(x, w, backend="native")
    side.synchronize()
    assert torch.equal(y, torch.full_like(y, 9 * 64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "settings"),
    [
        ((64, 256), 56, 1, {}),
        ((128, 128), 28, 3, {"padding": 1}),
        ((256, 512), 14, 1, {"stride": 2}),
        ((3, 64), 64, 7, {"stride": 2, "padding": 3}),
        ((96, 96), 28, 5, {"padding": 2, "groups": 96}),
    ],
    ids=str,
)
@pytest.mark.parametrize("tf32", [False, True])
def test_layers_of_real_size(
    channels: tuple[int, int], size: int, kernel: int, settings: dict, dtype: torch.dtype, tf32: bool
) -> None:
    """Grids of many blocks, every tile that a device of many multiprocessors chooses; integers, so exactly."""
    legacy(tf32)
    groups = settings.get("groups", 1)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)

    x, w = integers(8, channels[0], size, size), integers(channels[1], channels[0] // groups, kernel, kernel)
    exact = [t.double().cpu().requires_grad_() for t in (x, w)]
    y = F.conv2d(*exact, **settings)
    dy = (torch.arange(y.numel()) % 3 - 1).double().view(y.shape)
    expected = (y, *torch.autograd.grad(y, exact, dy))
    leaves = [t.requires_grad_() for t in (x, w)]
    y = conv2d(*leaves, **settings, backend="native")
    for ours, right in zip((y, *torch.autograd.grad(y, leaves, dy.to("cuda", dtype))), expected, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours.double().cpu(), right.to(dtype).double())
