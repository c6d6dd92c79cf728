"""A convolution or a Linear that learns does not keep what can be made again from what the graph keeps anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freezekit as fk
from bench.memory import bytes_kept
from tests.observe import MACHINE
from tests.smooth import SMOOTH

Layer = Callable[[Tensor], Tensor]


def rms_norm(x: Tensor) -> Tensor:
    """As LLaMA writes it, with a frozen weight."""
    weight = torch.arange(1, x.size(-1) + 1, dtype=x.dtype) / 7
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def group_norm(x: Tensor) -> Tensor:
    return F.group_norm(x, 2, *torch.randn(2, 8, generator=torch.Generator().manual_seed(2)).to(x.dtype))


def layer_norm(x: Tensor) -> Tensor:
    size = x.shape[-1:]
    return F.layer_norm(x, size, *torch.randn(2, *size, generator=torch.Generator().manual_seed(2)).to(x.dtype))


def batch_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, torch.linspace(1, 2, 8, dtype=x.dtype), training=True)


# What a layer that learns reads; the tensors of its size that stock keeps, and those that are kept while enabled.
BEFORE: dict[str, tuple[Layer, int, int]] = {
    **{name: (f, 2, 1) for name, f in SMOOTH.items()},
    "elu": (F.elu, 2, 1),
    "silu_": (lambda x: F.silu(x * 1, inplace=True), 2, 1),
    "layer norm": (layer_norm, 2, 1),
    "group norm": (group_norm, 2, 1),
    "batch norm": (batch_norm, 2, 1),
    "layer norm, gelu": (lambda x: F.gelu(layer_norm(x)), 3, 1),
    "group norm, silu": (lambda x: F.silu(group_norm(x)), 3, 1),
    "batch norm, silu": (lambda x: F.silu(batch_norm(x)), 3, 1),
    "rms norm": (rms_norm, 2, 1),
}


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "conv1d": (nn.Conv1d(8, 6, 3, padding=1), (2, 8, 32)),
        "conv2d": (nn.Conv2d(8, 6, 3, padding=1, stride=2), (2, 8, 12, 16)),
        "depthwise": (nn.Conv2d(8, 8, 3, groups=8, bias=False), (2, 8, 12, 16)),
        "conv3d": (nn.Conv3d(8, 4, (1, 3, 3)), (1, 8, 4, 5, 16)),
        "transposed": (nn.ConvTranspose2d(8, 4, 2, stride=2), (2, 8, 12, 16)),
        "linear": (nn.Linear(16, 12), (64, 8, 16)),
        "linear of rows": (nn.Linear(16, 12), (64, 16)),
        "linear without bias": (nn.Linear(16, 12, bias=False), (4, 8, 6, 16)),
    }


LAYERS = list(layers())


def case(name: str, layer_name: str, dtype: torch.dtype = torch.float32) -> tuple[Layer, nn.Module, Tensor]:
    """The call as a function of x, the layer that learns, and x."""
    layer, size = layers()[layer_name]
    if len(size) == 2 and name in ("group norm", "batch norm", "group norm, silu", "batch norm, silu"):
        size = (256, 8)
        layer = nn.Linear(8, 12)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    layer = layer.to(dtype)
    before = BEFORE[name][0]
    return lambda x: layer(before(x * 1)), layer, x


def results(call: Layer, layer: nn.Module, x: Tensor) -> list[Tensor]:
    y = call(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def assert_same(call: Layer, layer: nn.Module, x: Tensor) -> None:
    expected = results(call, layer, x)
    with fk.enabled():
        found = results(call, layer, x)
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("name", BEFORE)
def test_values_and_gradients(name: str, layer_name: str, dtype: torch.dtype) -> None:
    assert_same(*case(name, layer_name, dtype))


@pytest.mark.parametrize("layer_name", ["conv2d", "conv3d", "linear", "linear without bias"])
@pytest.mark.parametrize("name", BEFORE)
def test_what_is_kept(name: str, layer_name: str) -> None:
    call, _, x = case(name, layer_name)
    _, stock, enabled = BEFORE[name]
    rows = x.nbytes / 8  # statistics
    assert stock * x.nbytes <= bytes_kept(call, x) < stock * x.nbytes + 2 * rows
    with fk.enabled():
        assert enabled * x.nbytes <= bytes_kept(call, x) < enabled * x.nbytes + 4 * rows


@pytest.mark.parametrize("frozen", ["weight", "weight and bias"])
def test_a_frozen_layer_keeps_neither(frozen: str) -> None:
    call, layer, x = case("gelu", "linear")
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(frozen == "weight")
    with fk.enabled():
        assert x.nbytes <= bytes_kept(call, x) < 1.01 * x.nbytes


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["silu", "group norm", "batch norm", "group norm, silu", "batch norm, silu"])
def test_layouts_of_a_convolution(name: str, memory_format: torch.memory_format) -> None:
    call, layer, x = case(name, "conv2d")
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    assert_same(call, layer.to(memory_format=memory_format), x)


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[1:],
        lambda x: x[:, ::2],
        lambda x: x.reshape(8, 64, 16),
        lambda x: x.permute(1, 0, 2).contiguous(),
        lambda x: x.flatten(0, 1)[5:],
        lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1),
        lambda x: x.as_strided((64, 8, 16), (128, 0, 1)),
    ],
)
def test_moved_before_the_layer(move: Layer) -> None:
    """Only where all elements are read in order is it what the activation gave."""
    layer, size = layers()["linear"]
    assert_same(lambda x: layer(move(F.gelu(x * 1))), layer, torch.randn(size, requires_grad=True))


@pytest.mark.parametrize("name", SMOOTH)
def test_what_is_kept_in_channels_last(name: str) -> None:
    """Of more elements than a piece has: torch's GELU is another library's in NCHW, and the pieces are."""
    layer, f = nn.Conv2d(8, 4, 1), SMOOTH[name]
    x = torch.randn(2, 8, 48, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    call = lambda x: layer(f(x * 1))  # noqa: E731
    assert bytes_kept(call, x) // x.nbytes == 2
    with fk.enabled():
        assert bytes_kept(call, x) // x.nbytes == 1
    assert_same(call, layer, x)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "data": lambda t: t.data.mul_(2),
    "numpy": lambda t: t.detach().numpy().__imul__(2),
    "no_grad": torch.no_grad()(lambda t: t.mul_(2)),
    "one element": lambda t: t.data.view(-1)[-1:].neg_(),
}
Result = list[Tensor] | str


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("what", ["source", "read", "weight"])
@pytest.mark.parametrize("layer_name", ["conv2d", "linear", "linear without bias"])
@pytest.mark.parametrize("name", ["gelu", "silu_", "layer norm", "layer norm, gelu", "rms norm"])
def test_writes(name: str, layer_name: str, what: str, write: str) -> None:
    """Before the layer: stock's result. Behind it: stock's, that of what was computed, or an error."""

    def run(before: str = "", after: str = "", wanted: str = "all") -> Result:
        _, layer, x = case(name, layer_name)
        source = x * 1
        read = BEFORE[name][0](source)
        parts = {"source": source, "read": read, "weight": layer.weight}
        if before:
            WRITES[write](parts[before])
        y = layer(read)
        if after:
            WRITES[write](parts[after])
        asked = {"all": [x, *layer.parameters()], "layer": list(layer.parameters())}[wanted]
        try:
            return list(torch.autograd.grad(y.square().sum(), asked))
        except RuntimeError as error:
            return str(error).split(":")[0]

    def same(a: Result, b: Result) -> bool:
        if isinstance(a, str) or isinstance(b, str):
            return a == b
        return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))

    for wanted in ("all", "layer"):
        expected, untouched, stock = run(before=what, wanted=wanted), run(wanted=wanted), run(after=what, wanted=wanted)
        with fk.enabled():
            before, after = run(before=what, wanted=wanted), run(after=what, wanted=wanted)
        unseen = isinstance(before, str) and "autograd does not see" in before  # to what an activation's recipe reads
        assert same(before, expected) or (what == "source" and unseen)
        if what == "weight":
            assert same(after, stock)
        elif isinstance(after, str):
            said = "autograd does not see" in after or "modified by an inplace operation" in after
            assert said
            assert what == "source" or after == stock
        else:
            assert same(after, untouched) or same(after, stock)


@pytest.mark.parametrize("layer_name", ["conv2d", "transposed", "linear", "linear without bias"])
@pytest.mark.parametrize("name", BEFORE)
def test_situations(name: str, layer_name: str) -> None:
    """Double backward, retained graphs, parts of a graph, checkpoints, offloading, autocast, functional calls."""
    call, layer, x = case(name, layer_name)

    def twice(x: Tensor) -> Tensor:
        gradients = torch.autograd.grad(call(x).square().sum(), (x, layer.weight), create_graph=True)
        return sum(g.square().sum() for g in gradients) + call(x).sum()

    def retained(x: Tensor) -> Tensor:
        y = call(x)
        (dw,) = torch.autograd.grad(y.square().sum(), layer.weight, retain_graph=True)
        (dx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        return y * dw.sum() * dx.sum()

    def offloaded(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return call(x)

    def low(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(x)

    def other_weight(x: Tensor) -> Tensor:
        weight = layer.weight * 2
        read = BEFORE[name][0](x * 1)
        return torch.func.functional_call(layer, {"weight": weight}, (read,))

    for situation in (
        twice,
        retained,
        offloaded,
        low,
        other_weight,
        lambda x: checkpoint(call, x, use_reentrant=False),
        lambda x: checkpoint(call, x, use_reentrant=True),
    ):
        if situation is other_weight and layer.bias is None:
            continue
        if "True" in repr(getattr(situation, "__code__", None) and situation.__code__.co_consts):  # by .backward alone
            assert backward(situation, layer, x)
        else:
            assert_same(situation, layer, x)


def backward(call: Layer, layer: nn.Module, x: Tensor) -> bool:
    def step() -> list[Tensor]:
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        call(x).square().sum().backward()
        return [leaf.grad for leaf in (x, *layer.parameters()) if leaf.grad is not None]

    expected = step()
    with fk.enabled():
        return all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))


def test_hooks_on_inner_tensors() -> None:
    _, layer, x = case("gelu", "linear")

    def call(x: Tensor) -> Tensor:
        inner = F.gelu(x * 1)
        inner.register_hook(lambda grad: grad * 2)
        inner.retain_grad()
        y = layer(inner)
        y.sum().backward(retain_graph=True, inputs=[inner])
        assert inner.grad is not None
        return y * inner.grad.sum()

    assert_same(call, layer, x)


def test_others_hooks_on_what_is_saved_see_all_of_it() -> None:
    def seen() -> list[torch.Size]:
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            for name in BEFORE:
                for layer_name in ("conv2d", "linear", "linear without bias"):
                    call, _, x = case(name, layer_name)
                    call(x)
        return shapes

    stock = seen()
    with fk.enabled():
        assert seen() == stock


@pytest.mark.parametrize("layer_name", ["conv2d", "linear", "linear without bias"])
def test_the_graph_is_torch_s_own(layer_name: str) -> None:
    call, _, x = case("gelu", layer_name)

    def names(tensor: Any) -> list[str]:
        node, found = tensor.grad_fn, []
        while node:
            found.append(node.name())
            following = [n for n, _ in node.next_functions if n and "Accumulate" not in n.name()]
            node = following[0] if following else None
        return found

    stock = names(call(x))
    with fk.enabled():
        assert names(call(x)) == stock


def test_an_adapter_beside_a_frozen_layer() -> None:
    """As LoRA has it: several layers that learn read the same, and each has a recipe of its own."""
    torch.manual_seed(0)
    frozen = nn.Linear(64, 64).requires_grad_(False)
    down = nn.ModuleList(nn.Linear(64, 4, bias=False) for _ in range(3))
    up = nn.ModuleList(nn.Linear(4, 64, bias=False) for _ in range(3))
    norm = nn.LayerNorm(64).requires_grad_(False)

    def call(x: Tensor) -> Tensor:
        read = norm(x * 1)
        q, k, v = (frozen(read) + b(a(read)) for a, b in zip(down, up, strict=True))
        return q * 2 + k + v

    x = torch.randn(4, 16, 64, requires_grad=True)
    assert_same(call, nn.ModuleList([down, up]), x)
    between = 3 * x.nbytes / 16  # what an adapter's second layer reads
    assert bytes_kept(call, x) > 2 * x.nbytes + between
    with fk.enabled():
        assert bytes_kept(call, x) < 1.2 * x.nbytes + between  # with statistics, and copies of the norm's parameters


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("layer_name", ["conv2d", "linear"])
@pytest.mark.parametrize("name", [name for name in BEFORE if not name.startswith(("batch", "rms"))])
def test_explain_and_plan(name: str, layer_name: str, measure: bool) -> None:
    _, layer, x = case(name, layer_name)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Identity(), layer

        def forward(self, x: Tensor) -> Tensor:
            return self.last(BEFORE[name][0](self.first(x * 1)))

    model = Network()
    with fk.enabled():
        kept, told = bytes_kept(model, x), fk.explain(model, x, measure=measure)
        planned = {option.name: option.bytes_kept for option in fk.plan(model, x, machine=MACHINE)}
    assert 0 <= kept - told.bytes_kept <= 16
    assert told.bytes_kept in planned.values()
    assert any(row.name == "last" and row.made_from for row in told)


def test_compiled() -> None:
    for layer_name in ("conv2d", "linear"):
        call, layer, x = case("gelu", layer_name)
        expected = results(call, layer, x)
        torch._dynamo.reset()
        with fk.enabled():
            found = results(torch.compile(call, backend="aot_eager"), layer, x)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layer_name", ["conv2d", "linear", "linear without bias"])
def test_compiled_autograd(layer_name: str) -> None:
    call, layer, x = case("gelu", layer_name)
    expected = results(lambda x: call(x).square().sum(), layer, x)[1:]
    with fk.enabled():
        z = call(x).square().sum()
    from torch._dynamo import compiled_autograd

    dy = torch.randn((), generator=torch.Generator().manual_seed(3))
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        z.backward(dy)
    found = [x.grad, *(p.grad for p in layer.parameters())]
    torch.testing.assert_close(found, expected)


def test_small_operands_are_kept_as_in_torch(least_bytes: int) -> None:
    from freezekit import _C

    _C.chains.set_least_bytes(least_bytes)
    layer = nn.Linear(16, 4)
    for rows, is_kept in ((127, True), (128, False)):
        x = torch.randn(rows, 16, requires_grad=True)
        call = lambda x: layer(F.gelu(x * 1))  # noqa: E731
        with fk.enabled():
            assert bytes_kept(call, x) // x.nbytes == (2 if is_kept else 1)


NORMS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "layer norm": (layer_norm, (4, 1024)),
    "group norm": (group_norm, (4, 8, 2, 2)),
    "batch norm": (batch_norm, (4, 8, 2, 2)),
    "instance norm": (lambda x: F.instance_norm(x, weight=torch.linspace(1, 2, 8, dtype=x.dtype)), (4, 8, 2, 2)),
}


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_several_layers_behind_a_norm_share_its_copies(name: str, measure: bool) -> None:
    """As queries, keys and values do: each with copies of its own, they would keep more than stock."""
    norm, size = NORMS[name]
    torch.manual_seed(0)
    make = (lambda: nn.Linear(1024, 4)) if len(size) == 2 else (lambda: nn.Conv2d(8, 4, 1))
    layers = nn.ModuleList(make() for _ in range(5))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            read = norm(x * 1)
            return sum((layer(read) for layer in self.layers), torch.zeros(()))

    model, x = Network(), torch.randn(size, requires_grad=True)
    stock = bytes_kept(model, x)
    with fk.enabled():
        kept, told = bytes_kept(model, x), fk.explain(model, x, measure=measure)
    assert kept <= stock - x.nbytes / 2  # two numbers per channel, or two rows
    assert 0 <= kept - told.bytes_kept <= 16
    assert_same(model, layers, x)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("what", ["source", "read"])
def test_writes_between_two_layers_behind_a_norm(name: str, what: str) -> None:
    """The second layer tries the recipe that the first one has on what it is given itself."""
    norm, size = NORMS[name]
    torch.manual_seed(0)
    layer = nn.Linear(1024, 4) if len(size) == 2 else nn.Conv2d(8, 4, 1)
    x = torch.randn(size, requires_grad=True)

    def run() -> Result:
        source = x * 1
        read = norm(source)
        first = layer(read)
        (source if what == "source" else read).data.mul_(2)
        second = layer(read)
        try:
            return list(torch.autograd.grad((first + second).square().sum(), [x, *layer.parameters()]))
        except RuntimeError as error:
            return str(error)

    def expected() -> list[Tensor]:
        """Of what was computed; stock takes the first layer's input as it is later."""
        read = norm(x * 1)
        first, second = layer(read), layer(read * 2)
        dw, db = torch.autograd.grad((first + second).square().sum(), list(layer.parameters()))
        return [dw, db]

    with fk.enabled():
        found = run()
    if what == "source":
        assert isinstance(found, str)
        assert "autograd does not see" in found
    else:
        assert not isinstance(found, str)
        torch.testing.assert_close(found[1:], expected())
