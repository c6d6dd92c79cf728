"""Measured choices: taken where faster, never where wrong, kept and carried as text."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import freezekit as fk
import freezekit._C as _C
from freezekit.functional import conv2d
from freezekit.tuning import clear_choices, load_choices

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_choices() -> Iterator[None]:
    clear_choices()
    yield
    clear_choices()


def kernels(x: torch.Tensor, w: torch.Tensor) -> list[str]:
    """Operators that freezekit's kernels computed in one step."""
    _C.set_launch_log(True)
    try:
        conv2d(x, w, padding=1).sum().backward()
        return [row["operator"] for row in _C.take_launch_log()]
    finally:
        _C.set_launch_log(False)


def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)


def test_auto_takes_aten_and_measures_nothing_unasked() -> None:
    assert kernels(*leaves()) == []
    with fk.tuning.autotune() as tuned:  # on a CPU there is no native kernel to measure
        kernels(*leaves())
    assert tuned.measurements == [] or torch.cuda.is_available()


def test_each_problem_is_measured_once() -> None:
    x, w = leaves()
    with fk.tuning.autotune(candidate="emulated") as tuned:
        first = kernels(x, w)
        again = kernels(x, w)
    assert len(first) > len(again)
    assert [m.problem.split()[0] for m in tuned.measurements] == ["conv2d", "conv2d_dgrad", "conv2d_wgrad"]
    assert all(m.agree and m.aten_seconds > 0 and m.native_seconds > 0 for m in tuned.measurements)
    expected = [m.problem.split()[0] for m in tuned.measurements if m.backend == "native"]
    assert sorted(again) == sorted(expected)


@pytest.mark.parametrize(("native", "agree", "taken"), [(1e-6, True, True), (1.0, True, False), (1e-6, False, False)])
def test_the_faster_right_one_is_taken(native: float, agree: bool, taken: bool) -> None:
    x, w = leaves()
    with fk.tuning.autotune(candidate="emulated") as tuned:
        kernels(x, w)
        document = json.loads(tuned.to_json())
        for row in document["choices"]:
            row.update(native_seconds=native, aten_seconds=1e-3, agree=agree)
        load_choices(json.dumps(document))
        assert kernels(x, w) == (["conv2d", "conv2d_dgrad", "conv2d_wgrad"] if taken else [])
        assert {m.backend for m in tuned.measurements} == {"native" if taken else "aten"}
    assert kernels(x, w) == []  # outside the block the emulator is no candidate


def test_a_demanded_backend_is_not_tuned() -> None:
    with fk.tuning.autotune(candidate="emulated") as tuned, fk.backend("aten"):
        kernels(*leaves())
    assert tuned.measurements == []


def test_text_and_back() -> None:
    with fk.tuning.autotune(candidate="emulated") as tuned:
        kernels(*leaves())
    before, text = tuned.measurements, tuned.to_json()
    clear_choices()
    assert tuned.measurements == []
    load_choices(text)
    assert tuned.measurements == before


def exported() -> dict[str, Any]:
    with fk.tuning.autotune(candidate="emulated") as tuned:
        kernels(*leaves())
    text = tuned.to_json()
    clear_choices()
    return json.loads(text)


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}x", '{"choices": []}', '{"measured_with": {}, "choices": [{"problem": "x"}]}', "null", "[]"],
)
def test_corrupt_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"what autotune\.to_json\(\) gave"):
        load_choices(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [("aten_seconds", -1.0), ("native_seconds", float("nan")), ("aten_seconds", "1"), ("agree", 1), ("problem", 3)],
)
def test_a_choice_that_cannot_be_one_is_refused_and_nothing_is_loaded(field: str, value: object) -> None:
    document = exported()
    document["choices"][-1][field] = value
    with pytest.raises(ValueError, match=r"what autotune\.to_json\(\) gave"):
        load_choices(json.dumps(document))
    assert fk.tuning.autotune().measurements == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("torch", "2.10.0"), ("freezekit", "0.0.1"), ("device", "NVIDIA H100 80GB HBM3"), ("cudnn", 90100)],
)
def test_choices_from_elsewhere_are_refused_and_the_difference_is_named(field: str, value: object) -> None:
    document = exported()
    document["measured_with"][field] = value
    with pytest.raises(ValueError, match=rf"measured with {field} {value!r} \(here .*\): measure them again"):
        load_choices(json.dumps(document))
    del document["measured_with"][field]
    with pytest.raises(ValueError, match=rf"measured with {field} 'unknown'"):
        load_choices(json.dumps(document))
    assert fk.tuning.autotune().measurements == []


def test_a_choice_holds_for_its_own_problem_alone() -> None:
    """Other sizes, layouts, dtypes and settings are other problems."""
    document = exported()
    for row in document["choices"]:
        row["native_seconds"], row["aten_seconds"] = 1e-6, 1.0
    load_choices(json.dumps(document))
    x, w = (leaf.detach() for leaf in leaves())

    def taken(x: torch.Tensor, w: torch.Tensor, **settings: int) -> int:
        _C.set_launch_log(True)
        try:
            conv2d(x, w, **settings)
            return len(_C.take_launch_log())
        finally:
            _C.set_launch_log(False)

    candidate = fk.tuning.autotune(candidate="emulated")
    candidate.__enter__()
    try:
        assert taken(x, w, padding=1) == 1
        known = len(candidate.measurements)
        others = [
            (x[:, :, :5], w, {"padding": 1}),
            (x.to(memory_format=torch.channels_last), w, {"padding": 1}),
            (x.double(), w.double(), {"padding": 1}),
            (x, w, {"padding": 1, "stride": 2}),
            (x, w, {"padding": 2}),
        ]
        for first, second, settings in others:
            taken(first, second, **settings)
        assert len(candidate.measurements) == known + len(others)
    finally:
        candidate.__exit__(None, None, None)


def test_real_times_decide_between_two_ways_on_this_cpu() -> None:
    """ATen takes every group of a float64 convolution by itself; the emulator crawls through a product of any size."""
    many_groups = torch.randn(1, 1024, 2, 2, dtype=torch.float64), torch.randn(1024, 1, 1, 1, dtype=torch.float64)
    large = torch.randn(1, 32, 8, 8), torch.randn(32, 32, 3, 3)
    with fk.tuning.autotune(candidate="emulated") as tuned:
        conv2d(*many_groups, groups=1024)
        assert [m.backend for m in tuned.measurements] == ["native"]
        conv2d(*large)
        chosen = {("groups=1024" in m.problem): m for m in tuned.measurements}
    assert {many: m.backend for many, m in chosen.items()} == {True: "native", False: "aten"}
    assert all(m.agree for m in tuned.measurements)


def test_threads_measure_and_look_up_at_once() -> None:
    problems = [(torch.randn(1, 2, n, n), torch.randn(2, 2, 3, 3)) for n in range(3, 8)]
    expected = [conv2d(*problem) for problem in problems]
    wrong: list[int] = []

    def work(turn: int) -> None:
        for i in range(40):
            which = (turn + i) % len(problems)
            if not torch.allclose(conv2d(*problems[which]), expected[which], atol=1e-4):
                wrong.append(which)
            if i % 13 == turn:
                clear_choices()

    with fk.tuning.autotune(candidate="emulated") as tuned:
        threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for problem in problems:
            conv2d(*problem)
    assert not wrong
    assert len(tuned.measurements) == len(problems)


def test_select_and_explain_tell_what_is_taken_and_why() -> None:
    net = fk.convert(torch.nn.Conv2d(3, 4, 3, padding=1, bias=False))
    x = torch.randn(1, 3, 6, 6, requires_grad=True)

    def shown() -> str:
        return next(iter(fk.explain(net, x))).kernel

    assert shown() == "aten"
    with fk.tuning.autotune(candidate="emulated") as tuned:
        net(x).sum().backward()
        seconds = {"conv2d": 1e-3, "conv2d_dgrad": 1e-6, "conv2d_wgrad": 1e-6}
        document = json.loads(tuned.to_json())
        for row in document["choices"]:
            operator = row["problem"].split()[0]
            row.update(aten_seconds=1e-4, native_seconds=seconds[operator], agree=operator != "conv2d_wgrad")
        load_choices(json.dumps(document))
        assert shown().split("; ") == [
            "conv2d: aten (measured: ATen 100 us, own kernel 1000 us)",
            "conv2d_dgrad: direct_dgrad_128x8 (measured: ATen 100 us, own kernel 1 us)",
            "conv2d_wgrad: aten (measured: ATen 100 us, own kernel 1 us, but the results differ)",
        ]
    assert shown() == "aten"  # outside the block the emulator is no candidate


def test_medians_and_turns(tmp_path: Path) -> None:
    """The clock is a fake: one way is slow now and then, which a mean would see."""
    program = tmp_path / "medians"
    source = Path(__file__).with_name("medians.cpp")
    subprocess.run(["g++", "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_an_unknown_candidate_is_named() -> None:
    with pytest.raises(ValueError, match="candidate must be 'native' or 'emulated', got 'cudnn'"):
        fk.tuning.autotune(candidate="cudnn")
