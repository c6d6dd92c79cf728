"""Whatever a forward reaches stays as it was, by whichever way: functions, weak references, caches, global names."""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import random
import threading
import types
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import freezekit as fk
import tests.explanation
from freezekit._twin.surroundings import in_slots
from freezekit.auditing import audit
from tests.explanation import settings
from tests.explanation.test_explain import kept_on_data
from tests.explanation.test_nothing_changes import MACHINE, picture, same


class Net(nn.Module):
    """A convolution and a norm in train mode, whose statistics tell whether they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class ByDefault(Net):
    def __init__(self) -> None:
        super().__init__()
        self.run = lambda x, body=self.body, *, again=self.body[1]: again(body(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class ByClosures(Net):
    """Functions in lists, tuples, dictionaries and partials, one by its layer, and one with a variable that is None."""

    def __init__(self) -> None:
        super().__init__()
        body, act = self.body, None

        def run(x: Tensor, scale: float = 1) -> Tensor:
            return scale * (body(x) if act is None else act(body(x)))

        self.runs = [run, (run,), {"run": {"run": run}}, partial(run, scale=2), {body: run}, partial(F.relu)]

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth, fifth, last = self.runs
        return last(first(x) + second[0](x) + third["run"]["run"](x) + fourth(x) + fifth[self.body](x))


class Child(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x: Tensor) -> Tensor:
        return self.parent().body(x).sigmoid()


class ByWeakReference(Net):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x)


def patched() -> nn.Module:
    model = Net()
    before = model.forward
    model.forward = types.MethodType(lambda self, x: before(x).relu() + self.body[0](x), model)
    return model


class Extractor:
    """Keeps what layers put out, by hooks that hold it."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, Tensor] = {}
        for name, layer in model.named_modules():
            layer.register_forward_hook(self.hook(name))

    def hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self.found[name] = output

        return keep


EXTRACTORS: list[Extractor] = []
SEEN: list[Tensor] = []


def extracted() -> nn.Module:
    model = Net()
    EXTRACTORS[:] = [Extractor(model)]
    return model


def listed() -> nn.Module:
    model = Net()
    SEEN.clear()
    model.body.register_forward_hook(lambda module, args, output: SEEN.append(output))
    return model


class Renewed:
    """A hook whose copies are new ones, each with a function that holds it."""

    def __init__(self) -> None:
        self.calls = 0
        count = self.count
        self.look = lambda: count()

    def count(self) -> None:
        self.calls += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Renewed:
        return type(self)()

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.look()


class RenewedWithin(Renewed):
    """A new one in each copy, which no copying knows of: to copy those too would never end."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        if depth:
            count = type(self)(depth - 1).count
            self.look = lambda: count()


def renewed(kind: type[Renewed] = Renewed) -> nn.Module:
    model = Net()
    model.body.register_forward_pre_hook(kind())
    return model


@lru_cache
def grid(size: int) -> Tensor:
    return torch.meshgrid(torch.linspace(0, 1, size), torch.zeros(size), indexing="ij")[0][..., None].squeeze(-1)


ARRAYS: dict[int, Tensor] = {}


def array(like: Tensor) -> Tensor:
    """As StyleGAN's constants."""
    size = like.shape[-1]
    if size not in ARRAYS:
        ARRAYS[size] = torch.as_tensor(np.arange(size, dtype=np.float32)) + like.new_ones(size)
        ARRAYS[size][1:3] = 7
    return ARRAYS[size]


class Positions(Net):
    """Caches that the model does not hold, one that it holds, and its last output with all that it was made from."""

    cache: ClassVar[dict[int, Tensor]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.cached = lru_cache(maxsize=1)(self.place)

    def place(self, size: int) -> Tensor:
        return torch.arange(size, dtype=torch.float32).cumsum(0)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        size = y.shape[-1]
        here = self.cache.setdefault(size, torch.ones(size))
        self.last = y * grid(size).view(1, 1, size, size) * array(y) * here * self.cached(size)
        return self.last


class Values(Positions):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y[:, : int(y.detach().abs().sum().clamp(2, 2).item())]


STRANGER = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5))


class ByGlobalName(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = STRANGER(super().forward(x))
        STRANGER[0].seen = y
        STRANGER[2].eval()
        return y.relu()


class Drawing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.plain = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return (
            super().forward(x)
            * (np.random.rand() + self.own.random() + random.random())
            * torch.rand((), generator=self.plain)
        )


class Views(Net):
    """Views of parameters and buffers as plain attributes, and parameters that share their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pair", torch.rand(2, 3, 1, 1))
        self.scale, self.shift = self.pair
        self.more = nn.Conv2d(3, 3, 3)
        self.more.weight.data = self.body[0].weight.data
        self.part = self.more.weight.data[:, :1]

    def forward(self, x: Tensor) -> Tensor:
        return self.more(super().forward(x) * self.scale + self.shift) * self.part.sum()


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.plain = nn.Linear(8, 8), torch.eye(8).to_sparse()
        self.register_buffer("adjacent", torch.eye(8).to_sparse_csr())

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x[0, 0])
        return (self.adjacent @ y).sigmoid() + torch.sparse.mm(self.plain, y)


class Shared:
    """An attribute that is its own copy, as a cache or a configuration may be."""

    def __init__(self) -> None:
        self.count, self.mean = 0, torch.zeros(3)
        self.kept: dict[str, list[Tensor]] = {"all": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


STORE: dict[str, list[Tensor]] = {"all": []}
QUEUE: deque[Tensor] = deque()
LAST: Any = None
DRAWN = [torch.Generator(), random.Random(0), np.random.default_rng(0), np.random.RandomState(0)]


def store(output: Tensor) -> None:
    global LAST
    LAST = output
    STORE["all"].append(output)


class Keeping(Net):
    """Keeps what it computes in its class, by global names, in an object that holds it, and in one that it shares."""

    log: ClassVar[list[Tensor]] = []
    stats: ClassVar[dict[str, Tensor]] = {}
    count: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.shared = Shared()
        self.watcher = Watcher(self)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        Keeping.count += 1
        self.log.append(y.mean())
        self.stats["mean"] = self.stats.get("mean", torch.zeros(())) * 0.9 + y.mean()
        store(y)
        [QUEUE.append(part) for part in y]
        self.shared.count += 1
        self.shared.mean += y.detach().mean((0, 2, 3))
        self.shared.kept["all"].append(y)
        return y


class Watcher:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.by_name = model, {"body": deque()}
        model.body.register_forward_hook(lambda module, args, output: self.by_name["body"].append(output))

    def __deepcopy__(self, memo: dict[int, Any]) -> Watcher:
        return self


class DrawingElsewhere(Net):
    """From generators in a closure, and by a global name."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = generator = torch.Generator().manual_seed(0)
        self.noise = lambda y: torch.rand(y.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        one, two, three, four = DRAWN
        return y + self.noise(y) + torch.rand(y.shape, generator=one) * two.random() * three.random() * four.normal()


class Importing(Net):
    """Holds a module of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.functions = {"all": F}

    def forward(self, x: Tensor) -> Tensor:
        return self.functions["all"].relu(super().forward(x))


class DrawingByItself(Net):
    """From generators in an attribute, and in an object within an object."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.within = torch.Generator().manual_seed(1), Holder(Holder(torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.generator, self.within.held.held
        drawn = torch.empty_like(x).exponential_(generator=one) + torch.randn(x.shape, generator=two)
        return super().forward(x * torch.bernoulli(torch.full_like(x, 0.5), generator=one) + drawn)


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


class Slotted(Net):
    __slots__ = ("__known", "scale", "unset")

    def __init__(self) -> None:
        super().__init__()
        self.__known, self.scale = [2.0], lambda x: self.body[1](x)

    def forward(self, x: Tensor) -> Tensor:
        self.__known.append(2.0)
        return self.scale(super().forward(x)) * self.__known[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: kind for kind in (ByDefault, ByClosures, ByWeakReference, Positions, Values, ByGlobalName)},
    **{"patched": patched, "extracted": extracted, "listed": listed, "Drawing": Drawing, "Views": Views},
    **{kind.__name__: kind for kind in (Keeping, DrawingElsewhere, DrawingByItself, Slotted, Importing)},
    **{"renewed": renewed, "renewed within": partial(renewed, RenewedWithin)},
}


@pytest.fixture(autouse=True)
def empty_caches() -> Iterator[None]:
    def clear() -> None:
        grid.cache_clear()
        ARRAYS.clear()
        Positions.cache.clear()
        STORE["all"].clear()
        QUEUE.clear()
        Keeping.log.clear()
        Keeping.stats.clear()
        STRANGER.train().__dict__.pop("seen", None)

    clear()
    yield
    clear()


def outside() -> list[Any]:
    """All that the models reach and do not hold; caches aside."""
    state = np.random.get_state()
    found = [extractor.found.get("body") for extractor in EXTRACTORS]
    kept = [*STORE["all"], *QUEUE, LAST, *Keeping.log, *Keeping.stats.values(), Keeping.count]
    one, two, three, four = DRAWN
    drawn = [one.get_state(), two.getstate(), str(three.bit_generator.state), str(four.get_state())]
    return [*picture(STRANGER), *SEEN, *found, state[1].tolist(), state[2:], *kept, *drawn]


def of_objects(model: nn.Module) -> list[Any]:
    if isinstance(model, DrawingByItself):
        return [model.generator.get_state(), model.within.held.held.get_state()]
    if isinstance(model, Slotted):
        return [len(model._Slotted__known), model.scale]
    if not isinstance(model, Keeping):
        return []
    shared = model.shared
    return [shared.count, shared.mean.clone(), *shared.kept["all"], *model.watcher.by_name["body"]]


@pytest.mark.parametrize("measure", [None, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes(name: str, measure: bool | None) -> None:
    model, x = MODELS[name](), torch.randn(2, 3, 8, 8)
    model(torch.randn(2, 3, 9, 9))  # caches have something, for another size
    before, around, held = picture(model), outside(), of_objects(model)
    fk.explain(model, x, measure=measure)
    fk.plan(model, x, machine=MACHINE, measure=bool(measure))
    fk.conversion.conversion_report(model, x)
    fk.audit(model, inputs=x)
    assert all(same(a, b) for a, b in zip(before, picture(model), strict=True))
    assert all(same(a, b) for a, b in zip(around, outside(), strict=True))
    assert all(same(a, b) for a, b in zip(held, of_objects(model), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_afterwards_is_what_it_was(name: str) -> None:
    x, gradients = torch.randn(2, 3, 8, 8), []
    for explained in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        DRAWN[:] = [torch.Generator(), random.Random(0), np.random.default_rng(0), np.random.RandomState(0)]
        model = MODELS[name]()
        STRANGER.train()
        if explained:
            fk.explain(model, x)
        y = model(x)
        assert type(y) is Tensor
        y.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        grid.cache_clear()
        ARRAYS.clear()
        Positions.cache.clear()
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("name", [*MODELS, "Graph"])
def test_bytes_are_those_of_a_real_step(name: str) -> None:
    model, x = {**MODELS, "Graph": Graph}[name](), torch.randn(2, 3, 8, 8)
    explained = fk.explain(model, x)
    assert explained.measured == (name in ("Values", "Graph"))
    assert explained.bytes_kept == fk.explain(model, x, measure=True).bytes_kept
    if name == "Graph":
        return  # plain hooks do not see where a sparse tensor is
    if name == "ByGlobalName":
        model.stranger = STRANGER  # whose parameters are not counted either
    assert explained.bytes_kept == kept_on_data(model, x)


def test_what_is_its_own_copy_is_refused() -> None:
    class Shared(nn.Conv2d):
        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            return self

    model = nn.Sequential(nn.ReLU(), Shared(3, 3, 3))
    with pytest.raises(TypeError, match=r"Shared \(1\) is run on a copy, and is its own copy"):
        fk.explain(model, torch.randn(1, 3, 8, 8))
    assert type(model[1]) is Shared


def test_a_script_module_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), torch.jit.script(nn.ReLU()))
    with pytest.raises(TypeError, match=r"got a ScriptModule \('1'\)"):
        fk.explain(model, torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("where", [torch.inference_mode, torch.no_grad], ids=lambda where: where.__name__)
def test_the_mode_of_the_caller_does_not_matter(where: Callable[[], Any]) -> None:
    expected = fk.explain(Net(), torch.randn(2, 3, 8, 8)).bytes_kept
    for measure in (None, True):
        with where():
            assert fk.explain(Net(), torch.randn(2, 3, 8, 8), measure=measure).bytes_kept == expected
            assert fk.plan(Net(), torch.randn(2, 3, 8, 8), machine=MACHINE).options[0].bytes_kept == expected
            model, x = Net(), torch.randn(2, 3, 8, 8)
        assert fk.explain(model, x, measure=measure).bytes_kept == expected  # of tensors that were made there


def test_hooks_of_all_modules_are_run_and_what_they_write_is_put_back() -> None:
    calls, outputs = [0], {"all": []}

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        calls[0] += 1
        outputs["all"].append(output)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        fk.explain(Net(), torch.randn(2, 3, 8, 8))
    finally:
        handle.remove()
    assert calls == [0]
    assert outputs == {"all": []}


def test_what_cannot_be_copied_is_named_and_can_be_held_by_what_is_its_own_copy() -> None:
    class Drawing(Net):
        def __init__(self, numbers: Any) -> None:
            super().__init__()
            self.again, self.numbers = lambda: self.numbers, numbers

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * next(getattr(self.numbers, "held", self.numbers))

    shared, x = Shared(), torch.randn(2, 3, 8, 8)
    shared.held = itertools.repeat(2.0)
    with pytest.raises(
        TypeError, match=r"cannot be copied: hold '1.numbers' in an object whose __deepcopy__ returns.*generator"
    ):
        fk.explain(nn.Sequential(nn.ReLU(), Drawing(number for number in range(1))), x)
    assert fk.explain(Drawing(shared), x).measured is False


@pytest.mark.parametrize("kind", [threading.Lock, threading.RLock, threading.Event, threading.Condition])
@pytest.mark.parametrize("measure", [None, True])
def test_locks_are_copied_as_they_are_before_anybody_takes_them(kind: Any, measure: bool | None) -> None:
    class Locked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lock, self.own = kind(), threading.local()
            self.own.calls = []

        def forward(self, x: Tensor) -> Tensor:
            self.own.calls.append(1)
            with self.lock if hasattr(self.lock, "acquire") else nullcontext():
                return super().forward(x)

    model, x = Locked(), torch.randn(2, 3, 8, 8)
    with model.lock if hasattr(model.lock, "acquire") else nullcontext():
        assert fk.explain(model, x, measure=measure).bytes_kept == fk.explain(Net(), x).bytes_kept
    assert model.own.calls == []
    with pytest.raises(TypeError, match="pickle"):  # as everywhere else
        copy.copy(threading.Lock())


def test_a_forward_may_add_modules_and_take_parameters_away() -> None:
    class Growing(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.more = nn.Dropout()
            self.more.weight = nn.Parameter(torch.ones(3, 1, 1))
            del self.body[1].running_var
            self.body[1].register_buffer("running_var", torch.ones(3))
            del self.body[0].bias
            return self.more(y) * self.more.weight

    model = Growing()
    audit(model, torch.optim.SGD(model.parameters()), torch.randn(2, 3, 8, 8))
    fk.explain(model, torch.randn(2, 3, 8, 8))
    assert len(list(model.modules())) == len(list(Net().modules()))
    assert model.body[0].bias is not None


TABLES = Holder(Holder(None))


class Far(nn.Module):
    """Writes to what it reaches by two names and more, and keeps there what it makes."""

    def __init__(self) -> None:
        super().__init__()
        net = Net()
        for name, value in (("seen", torch.zeros(3)), ("large", torch.zeros(3)), ("square", torch.rand(2, 2))):
            net.register_buffer(name, value)
        net.register_buffer("set_anew", torch.zeros(3))
        self.conv, self.far = nn.Conv2d(3, 3, 3, padding=1), Shared()
        self.far.held = Holder(Holder(net))

    def forward(self, x: Tensor) -> Tensor:
        net = self.far.held.held.held
        with torch.no_grad():
            net.body[0].weight.clamp_(-0.01, 0.01)
            net.body[0].bias.data[1:] = 2
            net.seen.expand(2, 3)[0].add_(x.mean())
            net.large.resize_(10, 10).fill_(1)
            net.square.t_()
            net.set_anew.set_(torch.ones(3))
        if TABLES.held.held is None:
            TABLES.held.held = torch.from_numpy(np.arange(8.0)).div_(8)
        return net(self.conv(x)) * TABLES.held.held[2:].float()


def far_functions(far: Far) -> dict[str, Callable[[Tensor], Tensor]]:
    whole, conv = Holder(Holder(far.far.held.held.held)), far.conv
    return {
        "its module": far,
        "a closure": lambda x: whole.held.held(conv(x)),
        "a default": lambda x, whole=whole, *, again=whole: again.held.held(whole.held.held(conv(x))),
        "a list": lambda x, all=[[whole]]: all[0][0].held.held(conv(x)),
        "a partial": partial(lambda whole, conv, x: whole.held.held(conv(x)), whole, conv),
    }


@pytest.mark.parametrize("name", far_functions(Far()))
def test_what_is_reached_by_many_names_stays_as_it_was(name: str) -> None:
    far, x = Far(), torch.randn(2, 3, 8, 8)
    function = far_functions(far)[name]
    before = [*picture(far), *picture(far.far.held.held.held)]
    TABLES.held.held = None
    fk.explain(function, x, measure=True)
    fk.plan(function, x, machine=MACHINE, measure=True)
    if isinstance(function, nn.Module):
        fk.audit(function, inputs=x)
    after, net = [*picture(far), *picture(far.far.held.held.held)], far.far.held.held.held
    assert [net.large.shape, net.large.untyped_storage().nbytes() >= 12, net.square.is_contiguous()] == [
        (3,),
        True,
        True,
    ]
    assert all(same(a, b) for a, b in zip(before, after, strict=True))
    if name == "its module":  # what a run makes and keeps is what a step would
        assert TABLES.held.held.tolist() == [i / 8 for i in range(8)]


def test_a_wrapper_that_is_reached_by_many_names_stays_as_it_was() -> None:
    far, conv = Holder(Holder(TwoTensor(torch.zeros(3), torch.zeros(3)))), nn.Conv2d(3, 3, 3)
    fk.explain(lambda x: conv(x + 0 * len(far.held.held.add_(1))), torch.randn(2, 3, 8, 8), measure=True)
    assert far.held.held.a.tolist() == far.held.held.b.tolist() == [0, 0, 0]


def test_memory_that_is_only_to_be_read_is_not_written_to(tmp_path: Path) -> None:
    np.ones(3, np.float32).tofile(tmp_path / "scale")
    far, conv = Holder(Holder(np.memmap(tmp_path / "scale", np.float32, "r"))), nn.Conv2d(3, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, that it cannot be written to
        far.held.held = torch.from_numpy(far.held.held)
    assert fk.explain(lambda x: conv(x * far.held.held[:, None, None]), torch.randn(2, 3, 8, 8), measure=True).measured


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("torch.sparse_coo", lambda: torch.eye(8).to_sparse()),
        ("quantized", lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)),
        ("nested", lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning", "ignore:.*quant.*:UserWarning")
def test_a_tensor_that_has_no_stand_in_is_measured_or_named_with_the_cure(kind: str, make: Any) -> None:
    model, x = nn.Sequential(Net()), torch.randn(2, 3, 8, 8)
    model[0].held = make()
    assert fk.explain(model, x).measured
    with pytest.raises(RuntimeError, match=rf"a {kind} tensor has no known size without data \('0.held'\).*hold some"):
        fk.explain(model, x, measure=False)


class Lazy(OrderedDict[str, Any]):
    """Makes its items when it is asked for them, at any cost, as the tables of models in transformers do."""

    def items(self) -> Any:
        raise ImportError("a module for each item")

    values = keys = __iter__ = items  # type: ignore[assignment]


LAZY = Lazy(known=[1])


class Looking(Net):
    def forward(self, x: Tensor) -> Tensor:
        LAZY["known"].append(2)
        LAZY["new"] = 2
        return self.body(x)


@pytest.mark.parametrize("measure", [None, True])
def test_dictionaries_of_classes_of_their_own_are_read_as_dictionaries(measure: bool | None) -> None:
    model = Looking()
    fk.explain(model, torch.randn(1, 3, 6, 6), measure=measure)
    fk.audit(model, None, torch.randn(1, 3, 6, 6))
    assert list(OrderedDict.items(LAZY)) == [("known", [1])]


class Dropping(nn.Module):
    """Keeps some attributes out of pickles, one of which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.seen = [torch.zeros(1)]
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("seen", "lock")}

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.conv(x).relu()


@pytest.mark.parametrize("measure", [None, True])
def test_a_forward_may_read_what_its_class_keeps_from_pickles(measure: bool | None) -> None:
    model, x = Dropping(), torch.randn(1, 3, 8, 8)
    explained = fk.explain(model, x, measure=measure)
    assert [row.name for row in explained] == ["conv", ""]
    assert len(model.seen) == 1
    assert len(list(fk.plan(model, x, machine=MACHINE))) > 1


class Trainer:
    """Holds all of a training, in objects of other classes."""

    def __init__(self) -> None:
        self.model = Net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)

    def step(self, x: Tensor) -> Tensor:
        loss = self.model(x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss

    def state(self) -> list[Any]:
        states = (self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict())
        return [*(repr(state) for state in states), [p.grad for p in self.model.parameters()]]


@pytest.mark.parametrize("measure", [None, True])
def test_a_step_of_a_trainer_leaves_its_optimizer_and_gradients(measure: bool | None) -> None:
    trainer, x = Trainer(), torch.randn(2, 3, 8, 8)
    trainer.step(x)
    before, values = trainer.state(), [p.grad.clone() for p in trainer.model.parameters()]
    fk.explain(lambda x: trainer.step(x), x, measure=measure)
    after = trainer.state()
    assert after[:3] == before[:3]
    assert all(a is b for a, b in zip(after[3], before[3], strict=True))
    assert all(map(torch.equal, after[3], values))


SCALE = nn.Parameter(torch.ones(3))
TEACHER = Net()


class Setting(Net):
    """Sets gradients, storages and flags of what it names."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            SCALE.sum().backward()
        SCALE.data = torch.zeros(2)
        SCALE.requires_grad_(False)
        TEACHER.zero_grad()
        TEACHER.requires_grad_(False)
        return self.body(x)


@pytest.mark.parametrize("look", ["explain", "measure", "plan", "audit"])
def test_what_a_run_sets_on_parameters_that_it_names_is_put_back(look: str) -> None:
    model, x = Setting(), torch.randn(2, 3, 8, 8)
    TEACHER(x).sum().backward()
    grads, pointer = [p.grad for p in TEACHER.parameters()], SCALE.data_ptr()
    if look == "audit":
        fk.audit(model, None, x)
    elif look == "plan":
        fk.plan(model, x, machine=MACHINE)
    else:
        fk.explain(model, x, measure=look == "measure" or None)
    assert SCALE.grad is None
    assert SCALE.requires_grad
    assert SCALE.tolist() == [1, 1, 1]
    assert SCALE.data_ptr() == pointer
    assert all(p.requires_grad and p.grad is grad for p, grad in zip(TEACHER.parameters(), grads, strict=True))


def test_gradients_that_python_has_not_seen_are_put_back() -> None:
    far, conv, x = Holder(Holder(nn.Linear(4, 1))), nn.Conv2d(3, 3, 3), torch.randn(2, 3, 8, 8)
    far.held.held(torch.ones(2, 4)).sum().backward()

    def call(x: Tensor) -> Tensor:
        for p in far.held.held.parameters():
            p.grad.zero_()
        return conv(x)

    fk.explain(call, x, measure=True)
    assert far.held.held.weight.grad.tolist() == [[2, 2, 2, 2]]


@pytest.fixture
def frees_the_collector() -> Iterator[None]:
    """Afterwards what `collected_once` of tests/conftest.py froze is frozen again."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("frees_the_collector")
def test_what_python_no_longer_lists_is_put_back() -> None:
    far, conv, x = Holder(Holder(nn.BatchNorm2d(3))), nn.Conv2d(3, 3, 3), torch.randn(2, 3, 8, 8)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            far.held.held.weight.add_(1)
        return conv(far.held.held(x))

    gc.freeze()
    try:
        fk.explain(call, x, measure=True)
        assert gc.isenabled()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
    assert far.held.held.weight.tolist() == [1, 1, 1]
    assert far.held.held.running_mean.tolist() == [0, 0, 0]


@pytest.mark.usefixtures("frees_the_collector")
def test_what_is_frozen_between_two_looks_is_put_back() -> None:
    """What was frozen at one look is known at the next, unless the program froze again."""
    fars, conv, x = [], nn.Conv2d(3, 3, 3), torch.randn(2, 3, 8, 8)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            for far in fars:
                far.held.held.add_(1)
        return conv(x)

    def stay() -> bool:
        fk.explain(call, x, measure=True)
        return all(far.held.held.tolist() == [0, 0, 0] for far in fars)

    fars.append(Holder(Holder(torch.zeros(3))))
    gc.freeze()
    try:
        assert stay()
        fars.append(Holder(Holder(torch.zeros(3))))
        assert stay()
        gc.freeze()
        assert stay()
        fars[0].held.held.data = torch.zeros(3)
        fars[1].held.held = fars[1].held.held.clone()
        assert stay()
        gc.unfreeze()
        assert stay()
        gc.freeze()
        assert stay()
    finally:
        gc.unfreeze()
    assert stay()


@pytest.mark.usefixtures("frees_the_collector")
def test_copies_are_let_go_of_after_a_freeze_of_the_collector() -> None:
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    class Seen(Net):
        def forward(self, x: Tensor) -> Tensor:
            alive.add(self)
            return super().forward(x)

    model = Seen()
    gc.freeze()
    try:
        fk.explain(model, torch.randn(2, 3, 8, 8), measure=True)
        gc.collect()
        assert not alive
    finally:
        gc.unfreeze()


def halve(far: Far) -> None:
    far.far.held.held.held.square.mul_(0.5)


@pytest.mark.parametrize("look", ["explain", "plan", "audit"])
def test_tensors_are_looked_for_once(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    far, net, x = Far(), nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)), torch.randn(2, 3, 8, 8)
    net[0].register_forward_pre_hook(lambda *_: halve(far))
    before, times = far.far.held.held.held.square.clone(), []
    fk.explain(net, x, measure=True)  # what is frozen is known from here on
    monkeypatch.setattr(gc, "get_objects", lambda find=gc.get_objects: times.append(1) or find())
    if look == "explain":
        fk.explain(net, x, measure=True)
    elif look == "plan":
        fk.plan(net, x, machine=MACHINE, measure=True)
    else:
        fk.audit(net, torch.optim.SGD(net.parameters(), lr=1), x)
    assert times == [1]
    assert torch.equal(far.far.held.held.held.square, before)


@pytest.mark.parametrize("kind", ["meta", "escaped"])
def test_a_tensor_that_has_no_data_may_be_named(kind: str) -> None:
    named: list[Any] = [nn.Linear(4, 4, device="meta")]
    conv = nn.Conv2d(3, 3, 3)
    if kind == "escaped":  # from a transform of torch.func
        torch.vmap(lambda row: (named.append(row), row)[1])(torch.ones(2, 3))
    else:
        named[0].weight.grad = torch.empty(4, 4, device="meta")
    assert len(fk.explain(lambda x: conv(x) * len(named), torch.randn(2, 3, 8, 8))) == 2


NAMED = Net()
FEATURE: Any = torch.ones(3)


def note(*call: Any) -> None:
    global FEATURE
    FEATURE = call[-1]


def with_feature(x: Tensor) -> Tensor:
    return NAMED(x).sum() + torch.tanh(FEATURE).sum()


@pytest.mark.parametrize("measure", [False, True])
def test_a_function_reads_what_its_run_sets_by_a_global_name(measure: bool) -> None:
    handle, old = NAMED.body[0].register_forward_hook(note), FEATURE
    try:
        explained = fk.explain(with_feature, torch.randn(2, 3, 8, 8), measure=measure)
    finally:
        handle.remove()
    assert max(row.bytes_kept for row in explained if row.layer.endswith("tanh")) == 2 * 3 * 6 * 6 * 4
    assert FEATURE is old


def read_feature() -> Tensor:
    return torch.tanh(FEATURE)


class Reads:
    def feature(self) -> Tensor:
        return torch.tanh(FEATURE)


def by_function(x: Tensor) -> Tensor:
    global FEATURE
    FEATURE = NAMED(x)
    return read_feature()


def by_method(x: Tensor) -> Tensor:
    global FEATURE
    FEATURE = NAMED(x)
    return Reads().feature()


def from_inside(x: Tensor) -> Tensor:
    def run() -> list[Tensor]:
        global FEATURE
        FEATURE = NAMED(x)
        return [read_feature() for _ in range(1)]

    return run()[0]


class Sized:
    NAMED = 2.0


def by_an_attribute_of_that_name(x: Tensor) -> Tensor:
    global FEATURE
    FEATURE = NAMED(x) * Sized.NAMED
    return read_feature()


def deleted(x: Tensor) -> Tensor:
    global FEATURE
    y = NAMED(x)
    del FEATURE
    try:
        return y + read_feature()
    except NameError:
        return torch.tanh(y)


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("call", [by_function, by_method, from_inside, by_an_attribute_of_that_name, deleted])
def test_what_a_function_sets_by_a_global_name_is_read_by_others(
    call: Callable[[Tensor], Tensor], measure: bool
) -> None:
    old, names = FEATURE, set(globals())
    explained = fk.explain(call, torch.randn(2, 3, 8, 8), measure=measure)
    assert max(row.bytes_kept for row in explained if row.layer.endswith("tanh")) == 2 * 3 * 6 * 6 * 4
    assert FEATURE is old
    assert set(globals()) == names


def test_two_threads_may_explain_one_function() -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: fk.explain(with_feature, torch.randn(2, 3, 8, 8)).bytes_kept, range(8)))
    assert len(set(found)) == 1


COUNTS, BIG = np.zeros(4), np.zeros(3)
BIG.flags.writeable = False


class Slotted:
    __slots__ = ("empty", "last", "seen")

    def __init__(self) -> None:
        self.last: Any = None
        self.seen: list[int] = []


SLOTTED = Slotted()


class Marking(nn.Linear):
    """Writes to what no copy holds: an array, a Python module, an object without a dictionary."""

    fails: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        COUNTS[0] += 1 + BIG[0]
        COUNTS[1] = np.nan
        settings.last = x
        settings.made = x  # type: ignore[attr-defined]
        settings.calls["n"] += 1
        tests.explanation.settings.calls["more"] = 1
        SLOTTED.last = SLOTTED.empty = x
        SLOTTED.seen.append(1)
        if self.fails is not None:
            raise self.fails("in the middle")
        return super().forward(x)


def _marks() -> list[Any]:
    return [COUNTS.tobytes(), dict(vars(settings)), dict(settings.calls), in_slots(SLOTTED), list(SLOTTED.seen)]


@pytest.mark.parametrize("fails", [None, KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("look", ["explained", "measured", "audited", "reported"])
def test_arrays_python_modules_and_slots_are_put_back(look: str, fails: type[BaseException] | None) -> None:
    x, model, before = torch.randn(2, 4), Marking(4, 4), _marks()
    model.fails = fails
    with pytest.raises((KeyError, KeyboardInterrupt, RuntimeError)) if fails else nullcontext():
        {
            "explained": lambda: fk.explain(model, x),
            "measured": lambda: fk.explain(model, x, measure=True),
            "audited": lambda: audit(model, inputs=x),
            "reported": lambda: fk.conversion.conversion_report(model, x),
        }[look]()
    assert _marks() == before


def test_a_part_of_a_package_that_a_run_imports_stays_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python sets it on its package only once."""
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "__init__.py").write_text("")
    (tmp_path / "late" / "part.py").write_text("factor = 2.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    late = importlib.import_module("late")

    class Importing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            importlib.import_module("late.part")
            return super().forward(x) * late.part.factor

    model, x = Importing(4, 4), torch.randn(2, 4)
    fk.explain(model, x)
    model(x)


class Grids:
    def __init__(self) -> None:
        self.made: list[int] = []

    @cache  # noqa: B019
    def grid(self, size: int) -> Tensor:
        self.made.append(size)
        return torch.arange(size).float()


class Cached(Net):
    """Caches of methods, by the module and by an object of its own, and of the module's base class."""

    alive: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()

    def __init__(self) -> None:
        super().__init__()
        self.grids = Grids()

    @lru_cache(maxsize=2)  # noqa: B019
    def grid(self, size: int, scale: float = 1.0) -> Tensor:
        return self.grids.grid(size) * scale

    def forward(self, x: Tensor) -> Tensor:
        self.alive.add(self)
        y = super().forward(x)
        grid, count = self.grid(y.shape[-1], scale=2.0), len(self.grids.made)
        assert self.grid(y.shape[-1], scale=2.0) is grid, "the cache of a copy caches"
        assert self.grids.grid(y.shape[-1]) is self.grids.grid(y.shape[-1])
        assert len(self.grids.made) == count
        return y * grid


class CachedBelow(Cached):
    pass


@pytest.mark.parametrize("kind", [Cached, CachedBelow])
@pytest.mark.parametrize("look", ["explain", "measured", "plan", "measured plan", "audit"])
def test_caches_of_methods_hold_what_they_held(kind: type[Cached], look: str) -> None:
    for cached in (Cached.grid, Grids.grid):
        cached.cache_clear()
    Cached.alive.clear()
    model, x = kind(), torch.randn(2, 3, 8, 8)
    model(x)
    made = model.grid(6, scale=2.0), model.grids.grid(6)
    before = Cached.grid.cache_info(), Grids.grid.cache_info()
    looks = {
        "explain": lambda: fk.explain(model, x),
        "measured": lambda: fk.explain(model, x, measure=True),
        "plan": lambda: fk.plan(model, x, machine=MACHINE),
        "measured plan": lambda: fk.plan(model, x, machine=MACHINE, measure=True),
        "audit": lambda: audit(model, torch.optim.SGD(model.parameters()), x),
    }
    looks[look]()
    assert (Cached.grid.cache_info(), Grids.grid.cache_info()) == before
    assert model.grid(6, scale=2.0) is made[0]
    assert model.grids.grid(6) is made[1]
    assert "grid" not in vars(model)
    gc.collect()
    assert list(Cached.alive) == [model]


class Alike:
    """Its attributes are those of all others."""

    common: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self.__dict__ = self.common

    def __deepcopy__(self, memo: dict[int, Any]) -> Alike:
        return Alike()

    @cache  # noqa: B019
    def scale(self) -> float:
        assert "scale" not in self.common
        return 2.0


def test_attributes_that_a_copy_shares_get_no_method_of_the_copy() -> None:
    model = Net()
    model.alike = Alike()
    model.body.register_forward_hook(lambda module, args, y: y * model.alike.scale())
    assert fk.explain(model, torch.randn(2, 3, 8, 8)).bytes_kept > 0


def test_what_caches_of_equal_objects_hold_is_found_by_copies() -> None:
    class Settings:
        def __eq__(self, other: object) -> bool:
            return type(other) is type(self)

        def __hash__(self) -> int:
            return 0

        @cache  # noqa: B019
        def found(self) -> dict[str, float]:
            return {}

    class Set(Net):
        def __init__(self) -> None:
            super().__init__()
            self.settings = Settings()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.settings.found()["scale"]

    model = Set()
    model.settings.found()["scale"] = 2.0
    assert fk.explain(model, torch.randn(2, 3, 8, 8)).bytes_kept > 0
