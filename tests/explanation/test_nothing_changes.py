"""`explain` and `plan` leave a model as it was, whatever its forward does, and measure what they cannot tell."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import freezekit as fk
from freezekit.freezing import is_held
from freezekit.planning import Machine
from tests.explanation.test_explain import kept_on_data

MACHINE = Machine(flops=1e9, bandwidth=1e9)


class Twice(nn.Module):
    """A layer that is also in a list, as in lpips and monai's DynUNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3)
        self.layers = nn.ModuleList([self.first, nn.Conv2d(3, 3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Caching(nn.Module):
    """Tensors as plain attributes, made in the first forward and made again for another size, as YOLO's anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.anchors, self.calls, self.seen = torch.empty(0), 0, {"sizes": []}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.anchors.shape != y.shape[-1:]:
            self.anchors = torch.arange(float(y.shape[-1]), device=y.device)
        self.calls += 1
        self.seen["sizes"].append(y.shape)
        self.last = y
        return y * self.anchors


class Normalization(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = torch.full((3, 1, 1), 0.45), torch.full((3, 1, 1), 0.22)
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mean) / self.std)


class Grid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([x, torch.linspace(0, 1, x.shape[-1]).expand(x.shape[0], 1, *x.shape[2:])], 1))


class Writing(nn.Module):
    """A forward that writes to its parameters, its input and its flags."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv.weight.clamp_(-0.01, 0.01)
            x.mul_(2)
        self.norm.weight.requires_grad_(False)
        return F.dropout(self.norm(self.conv(x)), random.random())


class Hooked(nn.Module):
    """A hook in a closure that collects activations, and a function that holds its model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, collected = nn.Conv2d(3, 3, 3), []
        self.conv.register_forward_hook(lambda module, args, output: collected.append(output))
        self.collected, self.run = collected, lambda x: self.conv(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Value(nn.Module):
    """A forward that reads a value, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y[:, : int(y.detach().abs().sum().clamp(2, 2).item())] ** 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*[x.flatten(2).transpose(1, 2)] * 3, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(3, 5, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(2).transpose(1, 2))[0]


def normed() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 3, 3)), nn.BatchNorm2d(3))


def pruned() -> nn.Module:
    model = nn.Sequential(prune.l1_unstructured(nn.Conv2d(3, 3, 3), "weight", 0.5))
    model(torch.randn(1, 3, 8, 8))  # its weight is now a plain tensor that was computed
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: kind for kind in (Twice, Caching, Normalization, Grid, Writing, Hooked, Value, Attention)},
    **{"Recurrent": Recurrent, "normed": normed, "pruned": pruned},
    "converted": lambda: fk.convert(Writing()),
    "compiled": lambda: torch.compile(Twice(), backend="eager"),
}


def picture(model: nn.Module) -> list[Any]:
    """All that a module can be asked for: every tensor, its identity, flags, attributes and hooks."""
    found: list[Any] = [torch.get_rng_state(), random.getstate()]
    for name, module in model.named_modules(remove_duplicate=False):
        found += [name, id(module), type(module), module.training]
        for attribute, value in vars(module).items():
            plain = value if isinstance(value, (int, float, str, bool, Tensor)) else repr(value)
            found += [attribute, id(value), plain.detach().clone() if isinstance(plain, Tensor) else plain]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found += [name, id(tensor), tensor.device, tensor.requires_grad, tensor.grad, tensor.detach().clone()]
    return found


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


@pytest.mark.parametrize("measure", [None, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes(name: str, measure: bool | None) -> None:
    model, x = MODELS[name](), torch.randn(2, 3, 8, 8)
    before, given = picture(model), x.clone()
    fk.explain(model, x, measure=measure)
    fk.plan(model, x, machine=MACHINE, measure=bool(measure))
    assert all(same(a, b) for a, b in zip(before, picture(model), strict=True))
    assert torch.equal(x, given)
    model(x)  # runs as before


@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("compiled", "Writing", "converted")])
def test_bytes_are_those_of_a_real_step(name: str, needs_dx: bool) -> None:
    model, x = MODELS[name](), torch.randn(2, 3, 8, 8, requires_grad=needs_dx)
    for _ in range(2):  # the second finds what the first one cached
        explained, measured = fk.explain(model, x), fk.explain(model, x, measure=True)
        assert explained.measured == (name in ("Value", "Recurrent"))
        assert explained.bytes_kept == measured.bytes_kept == kept_on_data(model, x)


@pytest.mark.parametrize("kind", [Value, Recurrent])
def test_what_cannot_be_told_without_data_says_how_to_measure_it(kind: type[nn.Module]) -> None:
    for measure, device in ((None, "meta"), (False, "cpu")):
        with pytest.raises(RuntimeError, match=rf"{kind.__name__} was run on tensors without data.*hold some"):
            fk.explain(kind(), torch.randn(2, 3, 8, 8, device=device), measure=measure)
    with pytest.raises(ValueError, match="must hold data"):
        fk.explain(kind(), torch.randn(2, 3, 8, 8, device="meta"), measure=True)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 4, 3), nn.Sequential(nn.ConvTranspose2d(4, 3, 3), nn.ReLU())

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


class Pipeline:
    def __init__(self, vae: nn.Module) -> None:
        self.vae = vae

    def __call__(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


def decoded(net: Autoencoder, x: Tensor) -> Tensor:
    return net.decode(x)


def test_any_callable_over_a_model_is_explained() -> None:
    vae, z = Autoencoder(), torch.randn(1, 4, 6, 6)
    pipeline, nets = Pipeline(vae), {"vae": vae, "size": 8}
    expected = fk.explain(vae.decoder, z)
    assert expected.bytes_kept > 0
    for call, prefix in (
        (vae.decode, "decoder"),
        (partial(vae.decode), "decoder"),
        (lambda x: vae.decode(x), "vae.decoder"),
        (Pipeline(vae), "vae.decoder"),
        (Pipeline(vae).__call__, "vae.decoder"),
        (lambda x, *, net=vae: net.decode(x), "net.decoder"),
        (partial(decoded, vae), "net.decoder"),
        (lambda x: pipeline.vae.decode(x), "pipeline.vae.decoder"),
        (lambda x: nets["vae"].decode(x), "nets.vae.decoder"),
        (torch.enable_grad()(lambda x: vae.decode(x)), "vae.decoder"),
    ):
        explained = fk.explain(call, z)
        assert [row.name for row in explained] == [f"{prefix}.0", f"{prefix}.1"]
        assert explained.bytes_kept == expected.bytes_kept
        options = {option.name: option for option in fk.plan(call, z, machine=MACHINE)}
        assert options["depth 1"].frozen == (f"{prefix}.0.weight", f"{prefix}.0.bias")

    def within(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: run(x)

    for call, prefix in ((within(lambda x: vae.decode(x)), "vae.decoder"), (within(vae.decode), "run.decoder")):
        explained = fk.explain(call, z)
        assert [row.name for row in explained] == [f"{prefix}.0", f"{prefix}.1"]
        assert explained.bytes_kept == expected.bytes_kept
    other = Autoencoder()
    both = within(lambda x: vae.decode(x) + within(other.decode)(x))
    assert {row.name.partition(".")[0] for row in fk.explain(both, z) if row.name} == {"vae", "other"}
    own = fk.explain(lambda x: vae.decode(x).sigmoid(), z)  # a function's own calls count too
    assert own.bytes_kept == expected.bytes_kept + 3 * 8 * 8 * 4
    assert [(row.name, row.layer) for row in own][2:] == [("", "<lambda>: sigmoid")]
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, or a callable that runs one"):
        fk.explain(torch.relu, z)


NAMED = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid())


class Parts:
    def __init__(self) -> None:
        self.parts = {"unet": {"decoder": NAMED}}

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return NAMED(x)

    def of_object(self, x: Tensor) -> Tensor:
        return NAMED(x) + 0 * len(self.parts)

    def out_of_sight(self, x: Tensor) -> Tensor:
        return self.parts["unet"]["decoder"](x)


@pytest.mark.parametrize("measure", [None, True])
def test_a_method_may_name_a_module_that_its_object_does_not_hold(measure: bool | None) -> None:
    x = torch.randn(1, 3, 8, 8)
    expected = fk.explain(NAMED, x).bytes_kept
    for call in (Parts.of_class, Parts().of_class, Parts().of_object):
        explained = fk.explain(call, x, measure=measure)
        assert [row.name for row in explained][:2] == ["NAMED.0", "NAMED.1"]
        assert explained.bytes_kept == expected
    with pytest.raises(TypeError, match=r"got method Parts\.out_of_sight, which names no module.*Let a function name"):
        fk.explain(Parts().out_of_sight, x, measure=measure)
    module = Parts().parts["unet"]["decoder"]
    assert fk.explain(lambda x: module(x), x, measure=measure).bytes_kept == expected


def run_named(x: Tensor, again: int = 1) -> Tensor:
    return run_named(x, again - 1) if again else sum(NAMED(y) for y in [x])


@torch.enable_grad()
def decorated(x: Tensor) -> Tensor:
    return (lambda y: run_named(y))(x)


class Running:
    def of_object(self, x: Tensor) -> Tensor:
        return decorated(x)


@pytest.mark.parametrize("measure", [None, True])
@pytest.mark.parametrize("call", [run_named, decorated, partial(run_named, again=0), Running().of_object])
def test_a_function_may_run_a_module_by_a_function_that_it_names(call: Any, measure: bool | None) -> None:
    x = torch.randn(1, 3, 8, 8)
    explained = fk.explain(call, x, measure=measure)
    assert [row.name for row in explained][:2] == ["NAMED.0", "NAMED.1"]
    assert explained.bytes_kept == fk.explain(NAMED, x).bytes_kept
    other = nn.Conv2d(4, 4, 3)
    assert {row.name for row in fk.explain(lambda x: other(call(x)), x, measure=measure)} >= {"NAMED.0", "other"}


def mean_of(parts: list[nn.Module], x: Tensor) -> Tensor:
    return F.gelu(parts[1](x)) + 0 * parts[0].training


class Ensemble:
    def __init__(self, parts: list[nn.Module]) -> None:
        self.first, self.second = parts

    def mean(self, x: Tensor) -> Tensor:
        return mean_of([self.first, self.second], x)

    __call__ = mean


@pytest.mark.parametrize("measure", [None, True])
@pytest.mark.parametrize("wrap", [lambda layer: layer, nn.Sequential])
def test_what_a_function_calls_itself_is_no_modules(wrap: Callable[..., nn.Module], measure: bool | None) -> None:
    parts, x = [wrap(nn.Conv2d(3, 3, 3)) for _ in range(2)], torch.randn(2, 3, 8, 8)
    ensemble = Ensemble(parts)
    for call, name in (
        (lambda y: mean_of(parts, y), "<lambda>"),
        (partial(mean_of, parts), "mean_of"),
        (ensemble, "Ensemble"),
        (ensemble.mean, "mean"),
    ):
        layer, own, *more = fk.explain(call, x, measure=measure)
        assert (layer.layer, layer.bytes_kept) == ("Conv2d", x.nbytes)
        assert (own.name, own.layer, own.bytes_kept) == ("", f"{name}: gelu", 2 * 3 * 6 * 6 * 4)
        assert {(row.name, row.bytes_kept) for row in more} <= {("", 0)}


def test_modules_of_two_functions_by_one_name_are_both_explained() -> None:
    def named(net: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: net(x)

    first, second, x = named(nn.Conv2d(3, 4, 3)), named(nn.Conv2d(4, 5, 3)), torch.randn(1, 3, 8, 8)
    names = [row.name for row in fk.explain(lambda x: second(first(x)), x)]
    assert len(set(names)) == 2
    assert {name.rpartition(".")[2] for name in names} == {"net"}


def test_a_plan_that_measures_the_machine_draws_no_random_numbers() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8)
    before = torch.get_rng_state()
    fk.plan(model, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_budget_that_is_a_tensor_is_refused_without_its_elements() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8)
    with pytest.raises(TypeError, match=r"^memory must be a number, got a Tensor of shape \(1, 3, 8, 8\)$"):
        fk.plan(model, x, x)


def test_plan_plays_freeze_with_its_norms() -> None:
    model, x = (
        fk.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))),
        torch.randn(2, 3, 9, 9),
    )
    for option in fk.plan(model, x, machine=MACHINE):
        if option.name.startswith("depth"):
            frozen = copy.deepcopy(model)
            if option.frozen:
                fk.freeze(frozen, option.frozen, norm="freeze")
            assert option.bytes_kept == kept_on_data(frozen, x), option.name
    assert not is_held(model[1])


def test_advice_is_only_for_what_saves() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.LayerNorm(8), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(F.layer_norm(self.norm(x), (8,)), 0.5, self.training)
            return self.conv(F.relu(self.conv(x)))  # what ReLU keeps a convolution that learns keeps too

    model, x = Functions().eval(), torch.randn(2, 3, 8, 8, requires_grad=True)
    for row in fk.explain(model, x):
        if row.name != "conv":
            assert row.advice == "" or row.advice.startswith("freeze"), row
        assert "layer_norm" not in row.advice
    library = fk.explain(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), torch.randn(2, 3, 8))
    assert not any("fk.functional" in row.advice for row in library)  # its forward is not the reader's to edit


class Centred(nn.Module):
    """A forward that prepares its input in place, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.conv = torch.full((3, 1, 1), 0.45), nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.sub_(self.mean))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "given": lambda: torch.randn(2, 3, 8, 8),
    "computed": lambda: torch.randn(2, 3, 8, 8, requires_grad=True) * 1,
    "a view": lambda: torch.randn(2, 3, 9, 9)[:, :, 1:],
}


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("name", INPUTS)
def test_a_forward_may_write_to_its_input(name: str, measure: bool) -> None:
    x, model = INPUTS[name](), Centred()
    given = x.detach().clone()
    assert fk.explain(model, x, measure=measure).bytes_kept == x.untyped_storage().nbytes()
    options = {option.name: option for option in fk.plan(model, x, machine=MACHINE, measure=measure)}
    assert options["input learns"].bytes_kept == x.untyped_storage().nbytes()
    assert options["input learns"].backward_flops > 0
    if measure:
        assert all(option.bytes_kept == option.measured_bytes for option in options.values())
    assert torch.equal(x, given)


def test_a_leaf_that_learns_is_not_to_be_written_to_as_in_a_real_step() -> None:
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        fk.explain(Centred(), torch.randn(2, 3, 8, 8, requires_grad=True))


def test_a_model_that_does_not_run_converted_is_explained_without_that_advice() -> None:
    class Particular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if str(self.conv).startswith("Freezable"):
                raise KeyError("not a Conv2d")
            return self.conv(x).relu()

    with pytest.warns(UserWarning, match="no advice from a run of the model converted.*not a Conv2d"):
        rows = fk.explain(Particular(), torch.randn(2, 3, 8, 8, requires_grad=True)).rows
    assert [row.layer for row in rows] == ["Conv2d", "Particular: relu"]
    assert rows[0].advice.endswith("FLOP")  # no bytes are known to be saved
