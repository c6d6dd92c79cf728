"""Whoever looks at the model, or at the operators that it runs, sees what stock shows."""

from __future__ import annotations

import copy
import pickle
import pickletools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk


class Net(nn.Module):
    """A frozen classifier with layers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            nn.ReLU6(),
            nn.Dropout(0.2),
            nn.AvgPool2d(2),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(F.leaky_relu(self.features(x)), 1).flatten(1))


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    made.features.requires_grad_(False)
    return made.eval()


X = torch.randn(2, 3, 16, 16)


def use(model: nn.Module) -> None:
    """A step of training, so that all that could leave a trace has run."""
    model(X.clone().requires_grad_()).sum().backward()


def same(look: Callable[[nn.Module], Any]) -> None:
    stock = net()
    use(stock)
    expected = look(stock)
    with fk.enabled():
        model = net()
        use(model)
        found = look(model)
    assert found == expected


def test_types_names_hooks_and_repr() -> None:
    def look(model: nn.Module) -> Any:
        return [(n, type(m), sorted(m.__dict__), repr(m)) for n, m in model.named_modules()]

    same(look)


def test_state_dict_pickle_and_deepcopy() -> None:
    def classes(data: bytes) -> set[str]:
        """What a pickle asks for when it is loaded."""
        return {str(argument) for op, argument, _ in pickletools.genops(data) if op.name in ("GLOBAL", "STACK_GLOBAL")}

    def look(model: nn.Module) -> Any:
        data = pickle.dumps(copy.deepcopy(model), protocol=0)
        loaded = pickle.loads(data)
        values = {name: value.tolist() for name, value in loaded.state_dict().items()}
        return classes(data), str(loaded), values, list(model.state_dict())

    same(look)


def test_fx() -> None:
    same(lambda model: torch.fx.symbolic_trace(model).code)
    same(lambda model: torch.fx.symbolic_trace(model)(X).tolist())


def test_feature_extraction_by_node() -> None:
    """As torchvision's create_feature_extractor works: trace, then cut the graph at a node."""

    def look(model: nn.Module) -> Any:
        graph = torch.fx.symbolic_trace(model)
        node = next(n for n in graph.graph.nodes if n.target == "features.3")
        for user in list(graph.graph.nodes)[::-1]:
            if user.op == "output":
                graph.graph.erase_node(user)
        graph.graph.output(node)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph(X).tolist()

    same(look)


def test_make_fx() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    same(lambda model: make_fx(model)(X).code)

    def joint(model: nn.Module) -> Any:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return make_fx(lambda x: torch.autograd.grad(F.relu(model(x)).sum(), parameters))(X).code

    same(joint)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_of_a_backward_pass(mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def look(model: nn.Module) -> Any:
        x = X.clone().requires_grad_()
        trace = make_fx(
            lambda x: torch.autograd.grad(model(x).sum(), x), tracing_mode=mode, _allow_non_fake_inputs=True
        )
        return trace(x).code

    same(look)


def test_jit() -> None:
    def kinds(traced: torch.jit.ScriptModule) -> list[str]:
        return [node.kind() for node in traced.inlined_graph.nodes()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        same(lambda model: str(torch.jit.script(model).code))
        same(lambda model: kinds(torch.jit.trace(model, X)))
        same(lambda model: kinds(torch.jit.trace(model, X.clone().requires_grad_())))
        same(lambda model: torch.jit.script(model)(X).tolist())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_export(strict: bool, grad: bool) -> None:
    def look(model: nn.Module) -> Any:
        with torch.set_grad_enabled(grad):
            program = torch.export.export(model, (X,), strict=strict)
            return str(program.graph), str(program.run_decompositions().graph), str(program.graph_signature)

    same(look)


def test_quantization() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        from torch.ao.quantization import QConfigMapping, get_default_qconfig
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        def look(model: nn.Module) -> Any:
            mapping = QConfigMapping().set_global(get_default_qconfig("fbgemm"))
            prepared = prepare_fx(model, mapping, (X,))
            prepared(X)
            quantized = convert_fx(prepared)
            return quantized.code, [str(type(m)) for m in quantized.modules()], quantized(X).tolist()

        same(look)


def test_flops_of_the_forward_pass() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def look(model: nn.Module) -> Any:
        with FlopCounterMode(display=False) as counter:
            model(X.clone().requires_grad_())
        return counter.get_flop_counts()

    same(look)


def test_functorch_and_forward_mode() -> None:
    def look(model: nn.Module) -> Any:
        parameters = dict(model.named_parameters())
        call = lambda p, x: torch.func.functional_call(model, p, x).square().sum()  # noqa: E731
        grads = torch.func.vmap(torch.func.grad(call), (None, 0))(parameters, X.unsqueeze(1))
        jvp = torch.func.jvp(lambda x: model(x), (X,), (torch.ones_like(X),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(X.clone().requires_grad_(), torch.ones_like(X))
            tangent = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
        return [g.tolist() for g in grads.values()], [t.tolist() for t in jvp], tangent.tolist()

    same(look)


class Tagged(Tensor):
    """A subclass that looks at every operator."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tagged:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        unwrap = lambda t: t.inner if isinstance(t, Tagged) else t  # noqa: E731
        wrap = lambda t: Tagged(t) if isinstance(t, Tensor) else t  # noqa: E731
        made = func(*torch.utils._pytree.tree_map(unwrap, args), **torch.utils._pytree.tree_map(unwrap, kwargs or {}))
        return torch.utils._pytree.tree_map(wrap, made)


def test_subclasses_see_torch_s_operators() -> None:
    def look(model: nn.Module) -> list[str]:
        Tagged.seen.clear()
        model(Tagged(X.clone().requires_grad_())).sum().backward()
        return list(Tagged.seen)

    same(look)


def test_selective_checkpointing_sees_torch_s_operators() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    seen: list[str] = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(str(op))
        return CheckpointPolicy.MUST_SAVE if "convolution" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    def look(model: nn.Module) -> list[str]:
        seen.clear()
        x = X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
        y.sum().backward()
        return list(seen)

    model = net()
    model.features[2] = nn.ReLU()  # selective checkpointing refuses in-place operators
    same(lambda _: look(model))
