"""Results that a CPU keeps in a larger storage than they fill are counted as with data."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import freezekit as fk
from freezekit.explanation import larger

invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="needs expecttest")

# Importing it forbids to set torch.backends' flags in the whole process, which other tests do.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

ONE = nn.Identity()


def check(function: Any, *inputs: Any) -> None:
    without, with_data = (fk.explain(function, inputs, measure=measure).bytes_kept for measure in (False, True))
    assert without == with_data > 0


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_folds(batch: tuple[int, ...], kernel: int, stride: int) -> None:
    blocks = ((9 - kernel) // stride + 1) ** 2
    x = torch.randn(*batch, 3 * kernel**2, blocks, requires_grad=True)
    check(nn.Sequential(nn.Fold((9, 9), kernel, stride=stride), nn.Sigmoid()), x)


@pytest.mark.parametrize(
    ("mode", "last", "padding"), itertools.product(("sum", "mean", "max"), (False, True), (None, 1))
)
def test_bags(mode: str, last: bool, padding: int | None) -> None:
    bags = nn.EmbeddingBag(10, 4, mode=mode, include_last_offset=last, padding_idx=padding)
    check(bags, torch.arange(6), torch.tensor([0, 2, 4, 6] if last else [0, 2, 4]))


@pytest.mark.parametrize("periodic", [(), (False,)])
@pytest.mark.parametrize("kind", ["bartlett", "blackman", "hamming", "hann", "kaiser"])
def test_windows(kind: str, periodic: tuple[bool, ...]) -> None:
    def windowed(x: Tensor) -> Tensor:
        return ONE(x * getattr(torch, f"{kind}_window")(x.numel(), *periodic))

    check(windowed, torch.rand(1, requires_grad=True))
    for _ in range(2):  # the second comes from torch's cache of tensors without data
        check(windowed, torch.rand(9, requires_grad=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "loss",
    [F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.soft_margin_loss, F.l1_loss, F.kl_div],
    ids=lambda loss: loss.__name__,
)
def test_losses(loss: Any, reduction: str) -> None:
    """The loss itself is kept by what follows, where that reads its result."""
    x = torch.rand(5, 7, requires_grad=True)
    check(lambda x, y: ONE(loss(x, y, reduction=reduction).exp()), x, torch.rand(5, 7))


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss], ids=lambda loss: loss.__name__)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_losses_that_broadcast(loss: Any) -> None:
    check(lambda x, y: ONE(loss(x, y).exp()), torch.rand(5, 1, requires_grad=True), torch.rand(1, 7))


class Larger(TorchDispatchMode):
    """Notes the operators whose results with data have larger storages than without."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        without: Any = ()
        with suppress(Exception):  # an operator without a rule for tensors without data
            fake = FakeTensorMode()
            given = tree_map(lambda v: fake.from_tensor(v) if isinstance(v, Tensor) else v, (args, kwargs))
            with fake:
                without = func(*given[0], **given[1])
        result = func(*args, **kwargs)
        inputs = {t.untyped_storage()._cdata for t in _dense(args, kwargs)}
        if any(
            real.untyped_storage().nbytes() > one.untyped_storage().nbytes()
            for real, one in zip(_dense(result), _dense(without))
            if real.untyped_storage()._cdata not in inputs
        ):
            self.found.add(func.overloadpacket)
        return result


def _dense(*values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.layout is torch.strided]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_torchs_samples_know_no_other_such_operator() -> None:
    with Larger() as seen:
        for operator in invocations.op_db:
            if torch.float32 in operator.dtypes:
                with suppress(Exception):  # samples that torch skips on a CPU
                    for sample in itertools.islice(operator.sample_inputs("cpu", torch.float32), 12):
                        with suppress(Exception):
                            operator(sample.input, *sample.args, **sample.kwargs)
    assert len(seen.found) >= 5
    assert seen.found <= set(larger._ELEMENTS)
