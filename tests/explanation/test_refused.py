"""What cannot be explained or planned says so, with what to do; and compiled functions stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freezekit as fk
from freezekit._twin import switches
from freezekit.auditing import audit
from freezekit.planning import Machine

MACHINE = Machine(flops=1e9, bandwidth=1e9)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def steps() -> dict[str, Callable[[Tensor], Any]]:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")

    def scaled(x: Tensor) -> None:
        scaler.scale(model(x).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    def plain(x: Tensor) -> None:
        model(x).sum().backward()
        optimizer.step()

    return {"scaled": scaled, "plain": plain}


@pytest.mark.parametrize("measure", [None, False, True])
def test_a_step_with_a_scaler_is_refused_with_what_to_give_instead(measure: bool | None) -> None:
    with pytest.raises(RuntimeError, match=r"No inf checks.*\nIt is a whole training step.*lambda x: loss"):
        fk.explain(steps()["scaled"], X, measure=measure)


@pytest.mark.parametrize(
    ("name", "says"), [("scaled", "is a whole training step"), ("plain", r"calls backward\(\) itself")]
)
def test_a_plan_of_a_whole_step_is_refused_with_what_to_give_instead(name: str, says: str) -> None:
    with pytest.raises(RuntimeError, match=f"\nIt {says}.*lambda x: loss"):
        fk.plan(steps()[name], X, machine=MACHINE)


class Meta(nn.Module):
    """Two layers whose forward runs a backward pass of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        loss = self.second(self.first(x)).mean()
        if self.how == "grad":
            return torch.autograd.grad(loss, self.second.weight)[0].sum() * loss
        loss.backward()
        if self.how == "update":
            return loss - self.first.weight.grad.sum()
        return loss.detach()


@pytest.mark.parametrize(
    ("how", "says"), [("backward", r"\nIt calls backward\(\) itself, .* freezes all"), ("grad", "")]
)
def test_a_plan_of_a_forward_that_runs_backward_itself_says_which_option_fails(how: str, says: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"^depth 2, 4 of 4 parameters frozen: .*does not require grad.*" + says
    ) as told:
        fk.plan(Meta(how), X, machine=MACHINE)
    assert "step" not in str(told.value)


def test_an_error_of_a_forward_that_takes_gradients_is_not_called_a_step() -> None:
    class Forces(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.autograd.grad(super().forward(x).detach().sum(), x)[0]

    with pytest.raises(RuntimeError, match="does not require grad") as told:
        fk.explain(Forces(4, 4), X.clone().requires_grad_())
    assert "step" not in str(told.value)


class Choosing(nn.Module):
    """Two layers, of which `torch.cond` runs one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def choose(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.first(x), lambda x: self.second(x), (x,))

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(x)


class ChoosingBehind(Choosing):
    def forward(self, x: Tensor) -> Tensor:
        return self.choose(self.second(x))


class ChoosingWithoutGradient(Choosing):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.choose(x)
        return self.first(x) * y


LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "explain": lambda model: fk.explain(model, X),
    "measured": lambda model: fk.explain(model, X, measure=True),
    "on meta": lambda model: fk.explain(model, X.to("meta")),
    "plan": lambda model: fk.plan(model, X, machine=MACHINE),
    "report": lambda model: fk.conversion.conversion_report(model, X),
}


@pytest.mark.parametrize("kind", [Choosing, ChoosingBehind])
@pytest.mark.parametrize("look", LOOKS)
def test_operators_that_take_functions_are_refused_where_they_would_lose_gradients(
    kind: type[nn.Module], look: str
) -> None:
    model = kind()
    with pytest.raises(RuntimeError, match=r"torch's cond loses gradients where.*\. Write .* in Python") as told:
        LOOKS[look](model)
    assert "measure" not in str(told.value)
    skipped = audit(model, inputs=X).skipped.values()
    assert any("torch's cond" in why for why in skipped)  # it called the output one that needs no gradient
    assert model(X).requires_grad  # a first call within a mode broke every later one


@pytest.mark.parametrize("measure", [None, True])
def test_operators_that_take_functions_are_explained_without_gradients(measure: bool | None) -> None:
    rows = {row.name: row for row in fk.explain(ChoosingWithoutGradient(), X, measure=measure)}
    assert rows["first" if X.sum() > 0 else "second"].flops == 2 * 3 * 4 * 4
    assert ("second" in rows) == bool(X.sum() <= 0)


@pytest.mark.parametrize("measure", [None, True])
def test_layers_in_inference_mode_compute_something(measure: bool | None) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                y = self.teacher(x)
            return self.student(x) * y.clone()

    rows = {row.name: row for row in fk.explain(Half(), X, measure=measure)}
    assert rows["teacher"].flops == rows["student"].flops == 2 * 3 * 4 * 4
    assert rows["teacher"].bytes_kept == 0


@pytest.mark.parametrize("look", [*(look for look in LOOKS if look != "on meta"), "audit"])
def test_what_is_compiled_later_is_compiled_later(look: str) -> None:
    """Torch leaves a function alone for good whose first call is within a mode."""
    compiled = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.inner = torch.compile(nn.Linear(4, 4), backend=backend)

        @torch.compile(backend=backend)
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sin()

    torch._dynamo.reset()
    model = nn.Sequential(Compiled(), torch.compile(nn.Linear(4, 4), backend=backend))
    {**LOOKS, "audit": lambda model: audit(model, inputs=X)}[look](model)
    assert not compiled
    model(X)
    assert len(compiled) == 2


SWITCHES: dict[str, Callable[[], object]] = {
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("cpu"),
    "gradients": lambda: torch.set_grad_enabled(False),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "autocast to": lambda: torch.set_autocast_dtype("cpu", torch.float16),
    "determinism": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "cudnn": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "products": lambda: torch.set_float32_matmul_precision("medium"),
    "precision": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    "attention": lambda: torch.backends.cuda.enable_math_sdp(False),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "denormals": lambda: torch.set_flush_denormal(True),
}


def _state() -> list[Any]:
    return [read() for read, _ in switches._switches()]


@pytest.mark.parametrize("look", ["explain", "measured", "audit"])
@pytest.mark.parametrize("name", SWITCHES)
def test_switches_of_torchs_are_put_back(name: str, look: str) -> None:
    class Switching(nn.Linear):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            SWITCHES[name]()
            if self.fails:
                raise KeyboardInterrupt
            return y

    before, model = _state(), Switching(4, 4)
    look_at = {**LOOKS, "audit": lambda model: audit(model, inputs=X)}[look]
    try:
        look_at(model)
        assert _state() == before
        model.fails = True
        with pytest.raises(KeyboardInterrupt):
            look_at(model)
        assert _state() == before
    finally:
        for (_, put), value in zip(switches._switches(), before):
            put(value)


def test_threads_that_explain_at_a_time() -> None:
    """Advice is from runs with freezekit enabled: those of one thread keep another's from being what they are alone."""
    nets = [nn.Sequential(nn.Conv2d(3, 4 + i, 3), nn.ReLU(), nn.Conv2d(4 + i, 2, 3), nn.SiLU()) for i in range(2)]
    x = torch.randn(2, 3, 9, 9)
    alone = [fk.explain(net, x).to_dict() for net in nets]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda net: [fk.explain(net, x).to_dict() for _ in range(8)], nets))
    assert found == [[one] * 8 for one in alone]
    assert not fk.is_enabled()


@pytest.mark.parametrize("measure", [None, True])
def test_explain_within_explain_is_refused(measure: bool | None) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(RuntimeError, match="which must not call any of them"):
        fk.explain(lambda x: (fk.explain(net, x), net(x))[1], x, measure=measure)
    assert fk.explain(net, x).bytes_kept > 0


def test_a_plan_of_a_forward_that_reads_gradients_says_which_option_fails() -> None:
    with pytest.raises(RuntimeError, match=r"^depth 1, 2 of 4 parameters frozen: 'NoneType'"):
        fk.plan(Meta("update"), X, machine=MACHINE)


class Exhausted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(next(iter(x[:0])))


@pytest.mark.parametrize("tool", ["explain", "plan", "plan, measured", "audit", "profile"])
def test_an_iterator_at_its_end_is_told_as_such(tool: str) -> None:
    """A generator that such an exception passes makes another of it."""
    model = Exhausted(4, 4)

    def profiled() -> None:
        with fk.profile():
            model(X)

    calls: dict[str, Callable[[], Any]] = {
        "explain": lambda: fk.explain(model, X),
        "plan": lambda: fk.plan(model, X, machine=MACHINE),
        "plan, measured": lambda: fk.plan(model, X, machine=MACHINE, measure=True),
        "audit": lambda: audit(model, inputs=X),
        "profile": profiled,
    }
    with pytest.raises(StopIteration):
        calls[tool]()
    with pytest.raises(RuntimeError, match="without data, where it fails: StopIteration. If"):
        fk.explain(model, X, measure=False)
