"""Converted group norms and the smooth activations behind them keep one tensor, and are torch's to the bit."""

from __future__ import annotations

import copy
import pickle
import tempfile
import threading
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

KINDS: dict[str, Callable[[], nn.Module]] = {
    "SiLU": nn.SiLU,
    "SiLU in place": lambda: nn.SiLU(inplace=True),
    "GELU": nn.GELU,
    "GELU by tanh": lambda: nn.GELU("tanh"),
    "Hardswish": nn.Hardswish,
    "Hardswish in place": lambda: nn.Hardswish(inplace=True),
    "Mish": nn.Mish,
    "Mish in place": lambda: nn.Mish(inplace=True),
}
SIZE = (2, 8, 18, 16)


def chain(activation: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 8)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return nn.Sequential(norm, activation or nn.SiLU()).requires_grad_(False)


def pair(activation: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    stock = chain(activation)
    return stock, fk.convert(copy.deepcopy(stock))


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1), dtype=dtype)


def step(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the gradient of an input that is made within the graph."""
    leaf = x.detach().clone().requires_grad_()
    y = call(leaf * 1)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    assert leaf.grad is not None
    return y, leaf.grad


def as_it_is(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def assert_same(stock: nn.Module, ours: nn.Module, x: Tensor, around: Callable[..., Tensor] = as_it_is) -> None:
    expected = step(lambda x: around(stock, x), x)
    found = step(lambda x: around(ours, x), x)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def tensors_kept(model: nn.Module, x: Tensor) -> float:
    return bytes_kept(model, x.requires_grad_()) / x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_and_torch_s_bits(kind: str, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    stock, ours = (model.to(dtype) for model in pair(KINDS[kind]()))
    x = data(dtype=dtype).contiguous(memory_format=memory_format)
    assert_same(stock, ours, x)
    assert tensors_kept(stock, x) >= 2
    assert 1 <= tensors_kept(ours, x) < 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_behind_a_layer_norm(kind: str, dtype: torch.dtype) -> None:
    stock = nn.Sequential(nn.LayerNorm(SIZE[2:]), KINDS[kind]()).requires_grad_(False).to(dtype)
    ours = fk.convert(copy.deepcopy(stock))
    assert_same(stock, ours, data().to(dtype))
    assert tensors_kept(stock, data().to(dtype)) >= 2
    assert 1 <= tensors_kept(ours, data().to(dtype)) < 1.3  # with the parameters


def test_enabled_and_converted_is_one_chain_too() -> None:
    stock, ours = pair()
    with fk.enabled():
        assert 1 <= tensors_kept(ours, data()) < 1.1
        assert_same(stock, ours, data())


@pytest.mark.parametrize(
    "x",
    [
        data()[:, :, ::2],
        data().transpose(2, 3),
        data()[:, :, :1, :1].expand(SIZE),
        data()[:0],
        data().to(torch.bfloat16),
        data().to(torch.float16),
    ],
    ids=["strided", "transposed", "expanded", "empty", "bfloat16", "float16"],
)
def test_inputs_of_other_kinds(x: Tensor) -> None:
    stock, ours = (model.to(x.dtype) for model in pair())
    assert_same(stock, ours, x)


def in_place_on_the_output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mul_(2)


def in_place_between(model: Any, x: Tensor) -> Tensor:
    return model[1](model[0](x).add_(1))


def unseen_between(model: Any, x: Tensor) -> Tensor:
    y = model[0](x)
    y.data.mul_(2)
    return model[1](y)


def other_storage_between(model: Any, x: Tensor) -> Tensor:
    y = model[0](x)
    y.data = y.data.flip(3).clone()
    return model[1](y)


def alias(model: Any, x: Tensor) -> Tensor:
    """The norm's result is read by others, and the activation's is added to it."""
    y = model[0](x)
    return model[1](y.view(SIZE)) + model[1](y) * y


def tensor_hooks(model: Any, x: Tensor) -> Tensor:
    y = model[0](x)
    y.register_hook(lambda grad: grad * 2)
    z = model[1](y)
    z.register_hook(lambda grad: grad + 1)
    return z


def module_hooks(model: Any, x: Tensor) -> Tensor:
    handles = [layer.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 3,)) for layer in model]
    handles.append(model[0].register_forward_hook(lambda module, args, y: y * 2))
    y = model(x)
    for handle in handles:
        handle.remove()
    return y


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def checkpointed_anew(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=True)


def offloaded(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x)


def autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)


def on_a_default_device(model: nn.Module, x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return model(x)


def functional(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(model, {"0.weight": torch.full((8,), 2.0), "0.bias": torch.ones(8)}, (x,))


def moved_before_backward(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    model[0].bias.data.add_(1)
    return y


def toggled(model: nn.Module, x: Tensor) -> Tensor:
    model.requires_grad_(True)
    y = model(x)
    model.requires_grad_(False)
    return y + model(x)


def in_a_thread(model: nn.Module, x: Tensor) -> Tensor:
    """The forward pass: notes of norms are of a thread."""
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(model(x)))
    thread.start()
    thread.join()
    return found[0]


def norm_in_a_thread(model: Any, x: Tensor) -> Tensor:
    return model[1](in_a_thread(model[0], x))


def transformed(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: model(x).square().sum())(x.detach()) * x


def vmapped(model: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(model)(x[None])


def forward_mode(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]


def no_gradient(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        factor = model(x)
    return factor * x


def twice_differentiated(model: nn.Module, x: Tensor) -> Tensor:
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return dx.square()


def retained(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    return y * first


def copied(model: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(model)(x) + pickle.loads(pickle.dumps(model))(x)


def distributed(model: nn.Module, x: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(model.requires_grad_(True))
            return wrapped(x)
        finally:
            torch.distributed.destroy_process_group()


SITUATIONS = [
    in_place_on_the_output, in_place_between, unseen_between, other_storage_between, alias, tensor_hooks, module_hooks,
    checkpointed, checkpointed_anew, offloaded, autocast, on_a_default_device, functional, moved_before_backward,
    toggled, in_a_thread, norm_in_a_thread, transformed, vmapped, forward_mode, no_gradient, twice_differentiated,
    retained, copied, distributed,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["SiLU", "SiLU in place", "GELU"])
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_situations(situation: Callable[[Any, Tensor], Tensor], kind: str) -> None:
    stock, ours = pair(KINDS[kind]())
    try:
        step(lambda x: situation(stock, x), data())
    except RuntimeError as error:
        with pytest.raises(type(error)):
            step(lambda x: situation(ours, x), data())
        return
    assert_same(*pair(KINDS[kind]()), data(), situation)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda h: torch.no_grad()(h.mul_)(2),
    "data": lambda h: h.data.mul_(2),
    "numpy": lambda h: h.detach().numpy().__imul__(2),
    "freed": lambda h: h.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_the_norm_s_input_is_an_error(write: str) -> None:
    """And no wrong value. Stock has kept the operand, and gives the gradient that does not go through the norm."""
    _, ours = pair()
    h = data().requires_grad_() * 1
    y = ours[0](h)
    z = ours[1](y)
    WRITES[write](h)
    with pytest.raises(RuntimeError, match="one of the variables needed for gradient computation has been"):
        torch.autograd.grad(z.sum(), y)


def test_another_storage_of_the_norm_s_input_changes_nothing() -> None:
    found = []
    for model in pair():
        h = data().requires_grad_() * 1
        y = model[0](h)
        z = model[1](y)
        h.data = torch.zeros(3)
        found.append(torch.autograd.grad(z.sum(), y)[0])
    assert torch.equal(*found)


def test_torch_compile_and_export_see_torch_s_operators() -> None:
    stock, ours = pair()
    assert_same(stock, torch.compile(ours, backend="aot_eager", fullgraph=True), data())
    for strict in (False, True):
        graph = torch.export.export(ours, (data().requires_grad_(),), strict=strict).graph
        names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert names == ["aten.group_norm.default", "aten.silu.default"]


def test_modes_see_torch_s_functions() -> None:
    seen = []

    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    stock, ours = pair()
    x = data().requires_grad_()
    with Names():
        stock(x)
    expected = [name for name in seen if name != "__get__"]
    seen.clear()
    with Names():
        ours(x)
    assert [name for name in seen if name in expected] == expected


@pytest.mark.parametrize("measure", [False, True])
def test_explain_and_plan_count_the_chain(measure: bool) -> None:
    _, ours = pair()
    x = data().requires_grad_()
    kept = bytes_kept(ours, x)
    found = fk.explain(ours, x, measure=measure)
    assert found.bytes_kept == kept
    norm, activation = found
    assert norm.made_from == ()
    assert activation.made_from == ("0",)
    assert activation.bytes_kept == 2 * x[:, :, :1, :1].nbytes  # a scale and a shift for each channel of each image
    planned = {option.name: option.bytes_kept for option in fk.plan(ours, x, machine=MACHINE)}
    assert planned["input learns"] == kept


def test_a_report_names_functions_behind_a_converted_norm() -> None:
    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = chain()[0]

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.norm(x)) + F.gelu(x)

    (_, row) = fk.conversion.conversion_report(fk.convert(Calling()), data().requires_grad_())
    assert (row.layer, row.status) == ("F.silu", "call")
    assert "freezekit.functional.silu" in row.reason
