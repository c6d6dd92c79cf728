"""What is otherwise where torch's modes look on, or without data, and is counted as it is in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import freezekit as fk
from freezekit._storages import storages_of
from freezekit.planning import Machine


def kept(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes that stock keeps of one forward, parameters aside."""
    own = {storage._cdata for parameter in model.parameters() for storage in storages_of(parameter)}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        found.update({storage._cdata: storage for storage in storages_of(tensor)})
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs)
    return sum(storage.nbytes() for key, storage in found.items() if key not in own)


class Recogniser(nn.Module):
    """Its loss is called as `call` says."""

    def __init__(self, call: str, lengths: tuple[Any, Any], reduction: str) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(5, 5), nn.CTCLoss(reduction=reduction)
        self.call, self.lengths, self.number = call, lengths, ["none", "mean", "sum"].index(reduction)

    def forward(self, x: Tensor) -> Tensor:
        logs, (a, b) = self.linear(x).log_softmax(2), self.lengths
        targets = torch.arange(12).reshape(3, 4) % 4 + 1
        if self.call == "torch":
            return torch.ctc_loss(logs, targets, a, b, 0, self.number)
        if self.call == "named":
            loss: Tensor = F.ctc_loss(logs, targets, target_lengths=b, input_lengths=a, reduction=self.loss.reduction)
            return loss
        return self.loss(logs, targets, a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("call", ["layer", "named", "torch"])
@pytest.mark.parametrize("kind", ["int64", "int32", "tuple"])
def test_ctc_loss_keeps_no_lengths(kind: str, call: str, reduction: str) -> None:
    lengths: Any = ((12, 12, 10), (4, 3, 2))
    if kind != "tuple":
        lengths = tuple(torch.tensor(one, dtype=getattr(torch, kind)) for one in lengths)
    model, x = Recogniser(call, lengths, reduction), torch.randn(12, 3, 5, requires_grad=True)
    assert fk.explain(model, x).bytes_kept == kept(model, x) > 0


def jagged(*size: int) -> Tensor:
    parts = [torch.randn(length, *size) for length in (2, 3)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, [2, 4]).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 2, 5]))).values().relu()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.LayerNorm(4), nn.Dropout(), nn.Linear(4, 2)), jagged(8)),
        (Attention(), jagged(8)),
        (Inside(), torch.randn(5, 8)),
    ],
    ids=["layers", "attention", "inside"],
)
def test_jagged_tensors_are_measured(model: nn.Module, x: Tensor) -> None:
    found = fk.explain(model, x)
    assert found.bytes_kept == kept(model, x) > 0
    assert found.measured
    sizes = 4 if isinstance(model, Attention) else 1
    assert sum(row.flops for row in found) == sizes * 2 * 5 * 8 * 8 or not isinstance(model, Attention | Inside)
    assert any(isinstance(size, str) for row in found for size in (*row.inputs, *row.outputs))
    found.to_json()
    assert fk.plan(model, x, machine=Machine(flops=1e9, bandwidth=1e9))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("inside", [False, True])
def test_a_nested_tensor_of_the_older_layout_is_refused_with_the_cure(inside: bool) -> None:
    linear = nn.Linear(4, 4)
    parts = [torch.zeros(2, 4), torch.zeros(3, 4)]
    model: Any = nn.Sequential(linear)
    given: Any = torch.nested.nested_tensor(parts)
    if inside:
        model, given = (lambda a, b: linear(torch.nested.as_nested_tensor([a, b]))), parts
    with pytest.raises(RuntimeError, match=r"takes or gives a nested tensor .* make it with layout=torch.jagged"):
        fk.explain(model, given)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.stack([self.linear(x).sigmoid() for x in inputs])


VIEWS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "one": lambda x: (x[:, 0],),
    "computed": lambda x: ((x * 1)[:, 0],),
    "two of one tensor": lambda x: (x[:, 0], x[:, 1]),
    "a leaf": lambda x: (x.detach()[:, 3].requires_grad_(),),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", VIEWS)
def test_an_input_that_is_a_view_keeps_all_that_it_is_a_view_of(name: str, device: str) -> None:
    model, (x, y) = Shared(), (torch.randn(2, 5, 16, requires_grad=True, device=place) for place in ("cpu", device))
    expected = kept(model, *VIEWS[name](x))
    for measure in (None, False, True) if device == "cpu" else (False,):
        assert fk.explain(model, VIEWS[name](y), measure=measure).bytes_kept == expected
