"""`auto` on a GPU, for convolutions, tested with a CPU that stands for one; and choices as text."""

from __future__ import annotations

import ctypes
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import freezekit as fk
from freezekit import _C, cli
from freezekit.functional import conv2d
from freezekit.tuning import choices, clear_choices, dump_choices, load_choices
from tests.proof.stand_in import FASTER, SLOWER, stand_in

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = ["conv2d", "conv2d_dgrad", "conv2d_wgrad"]


@pytest.fixture
def each_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users ask for it: the fastest way for every problem."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


def leaves(n: int = 1, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, size, size, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)


def kernels(x: torch.Tensor, w: torch.Tensor) -> list[str]:
    """Operators that freezekit's kernels computed in one step."""
    _C.set_launch_log(True)
    try:
        conv2d(x, w, padding=1).sum().backward()
        return [row["operator"] for row in _C.take_launch_log()]
    finally:
        _C.set_launch_log(False)


def test_a_cpu_decides_nothing(each_problem: None) -> None:
    assert kernels(*leaves()) == []
    assert choices() == []


@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.parametrize(("handicap", "taken"), [(FASTER, OPERATORS), (SLOWER, [])])
def test_the_first_call_decides(
    monkeypatch: pytest.MonkeyPatch, benchmark: bool, handicap: float, taken: list[str]
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    x, w = leaves()
    with stand_in(handicap):
        first, again = kernels(x, w), kernels(x, w)
        assert again == taken
        # Three times to compare, three times to time, and once for the user.
        assert len(first) == 18 + len(taken)
        assert [c.problem.split()[0] for c in choices()] == OPERATORS
        assert all(c.agree and c.aten_seconds > 0 for c in choices())
        assert {c.backend for c in choices()} == {"native" if taken else "aten"}
        assert all(("x=1,3,6,6" in c.problem) == benchmark for c in choices())
    assert kernels(x, w) == []


def test_sizes_share_a_class_unless_each_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in(FASTER):
        for size in range(12, 17):
            kernels(*leaves(size=size))
        few = len(choices())
        assert few <= 2 * len(OPERATORS) + 1  # a wgrad in slices is one of its own
        kernels(*leaves(n=64, size=16))
        assert len(choices()) > few  # far larger
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        for size in range(12, 17):
            kernels(*leaves(size=size))
        assert len([c for c in choices() if " x=" in c.problem]) == 5 * len(OPERATORS)


def test_a_class_is_of_one_kernel_dtype_layout_and_filter() -> None:
    x, w = (leaf.detach() for leaf in leaves())
    calls = [
        (x, w, {}),
        (x.double(), w.double(), {}),
        (x.to(memory_format=torch.channels_last), w, {}),
        (x, w, {"stride": 2}),
        (x, w, {"dilation": 2}),
        (x, w[:, :, :1, :1], {}),
        (torch.randn(1, 4, 6, 6), torch.randn(4, 2, 3, 3), {"groups": 2}),
    ]
    with stand_in(FASTER):
        for i, (a, b, settings) in enumerate(calls):
            conv2d(a, b, **settings)
            conv2d(a, b, **settings)
            assert len(choices()) == i + 1


def test_a_strided_dgrad_of_one_row_is_a_class_of_its_own() -> None:
    """It has one phase, as without a stride, which is other code; a forward pass has no phases."""
    geometry = (16, 16, 1, 1), (2, 2), (0, 0)
    for operator, classes in (("conv2d", 1), ("conv2d_dgrad", 2)):
        of = {_C.select(operator, "float32", (1, 16, rows, 9), *geometry)["class"] for rows in (1, 2)}
        assert len(of) == classes


def test_a_resnet_step_is_proven_in_the_launches_and_products_of_two() -> None:
    """Nothing is launched: the classes of a ResNet-50's convolutions at batch 128, and what proving them computes."""
    rows = [(3, 64, 7, 2, 224)]
    width, size = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, outer, stride = 64 << stage, 256 << stage, 1 if stage == 0 else 2
        for block in range(blocks):
            step = stride if block == 0 else 1
            rows += [(width, inner, 1, 1, size), (inner, inner, 3, step, size), (inner, outer, 1, 1, size // step)]
            if block == 0:
                rows.append((width, outer, 1, step, size))
            width, size = outer, size // step
    assert len(rows) == 53
    for dtype in ("bfloat16", "float32"):
        cost: dict[str, int] = {}
        total = 0
        for c, k, r, stride, size in rows:
            for operator in OPERATORS:
                selected = _C.select(
                    operator,
                    dtype,
                    (128, c, size, size),
                    (k, c, r, r),
                    (stride,) * 2,
                    (r // 2,) * 2,
                    channels_last=True,
                )
                products = 128 * c * k * r * r * (size // stride) ** 2
                cost.setdefault(selected["class"], products)
                total += products
        assert len(cost) <= 30
        # Six runs of either way: of two small parts and of the whole to compare, three to time.
        assert 12 * len(cost) <= 2 * len(rows) * len(OPERATORS)
        assert 8 * sum(cost.values()) <= 2 * total


@pytest.mark.parametrize(("native", "agree", "taken"), [(1e-6, True, True), (1.0, True, False), (1e-6, False, False)])
def test_loaded_choices_are_taken(each_problem: None, native: float, agree: bool, taken: bool) -> None:
    x, w = leaves()
    with stand_in():
        kernels(x, w)
        document = json.loads(dump_choices())
        for row in document["choices"]:
            row.update(native_seconds=native, aten_seconds=1e-3, agree=agree)
        clear_choices()
        load_choices(json.dumps(document))
        assert kernels(x, w) == (OPERATORS if taken else [])
        assert {c.backend for c in choices()} == {"native" if taken else "aten"}
        torch.backends.cudnn.benchmark = False  # the fixture puts it back; the very problem goes before its class
        assert kernels(x, w) == (OPERATORS if taken else [])
    load_choices(json.dumps(document))
    assert kernels(x, w) == []  # on a CPU there is nothing to choose from
    clear_choices()


@pytest.mark.parametrize("setting", ["algorithms", "cudnn"])
def test_determinism_takes_what_was_loaded_alone(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    x, w = leaves()
    with stand_in():
        kernels(x, w)
        exported = dump_choices()
        if setting == "cudnn":
            monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        else:
            torch.use_deterministic_algorithms(True)
        try:
            assert kernels(x, w) == []
            clear_choices()
            assert kernels(x, w) == []
            assert choices() == []
            load_choices(exported)
            assert kernels(x, w) == OPERATORS
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("benchmark", [False, True])
def test_determinism_takes_the_loaded_class_of_a_problem_that_was_measured(
    monkeypatch: pytest.MonkeyPatch, benchmark: bool
) -> None:
    x, w = leaves()
    with stand_in():
        kernels(x, w)
        of_classes = dump_choices()
        clear_choices()
        load_choices(of_classes)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        kernels(x, w)
        assert len(choices()) == 2 * len(OPERATORS)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        assert kernels(x, w) == OPERATORS


def test_explain_says_what_determinism_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = leaves()
    net = fk.convert(torch.nn.Conv2d(3, 4, 3, padding=1, bias=False))

    def shown() -> list[str]:
        return [text.split(": ", 1)[1] for text in next(iter(fk.explain(net, x))).kernel.split("; ")]

    with stand_in():
        kernels(x, w)
        assert all(text.startswith("direct_") for text in shown())
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        assert set(shown()) == {"aten (ATen, since results are to repeat and no choice was loaded)"}
        load_choices(dump_choices())
        assert all(text.startswith("direct_") for text in shown())


def test_explain_takes_no_class_where_each_problem_is_measured(each_problem: None) -> None:
    x, w = leaves()
    net = fk.convert(torch.nn.Conv2d(3, 4, 3, padding=1, bias=False))
    with stand_in():
        torch.backends.cudnn.benchmark = False  # the fixture puts it back
        kernels(x, w)
        assert "direct_" in next(iter(fk.explain(net, x))).kernel
        torch.backends.cudnn.benchmark = True
        assert "direct_" not in next(iter(fk.explain(net, x))).kernel


class Heap(ctypes.Structure):
    """What glibc's mallinfo2 gives."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", *"abcdef", "used", "free", "top")]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's mallinfo2")
def test_shapes_that_always_change_do_not_fill_the_memory() -> None:
    """Each is answered from what is known of its class, and the answers that a thread remembers are bounded."""
    info = ctypes.CDLL(None).mallinfo2
    info.restype = Heap
    w = torch.ones(1, 1, 1, 1, dtype=torch.float64)  # oneDNN, which remembers shapes too, has no such kernels

    def meet(rows: range) -> int:
        for h in rows:
            for width in range(100, 200):
                conv2d(torch.empty(1, 1, h, width, dtype=torch.float64), w)
        return int(info().used)

    with stand_in(SLOWER):
        before, known = meet(range(1, 51)), len(choices())
        after = meet(range(51, 151))
        assert len(choices()) <= known + 2
    assert after - before < 10_000 * 100, "bytes for each shape"


def test_a_demanded_backend_is_held_against_nothing() -> None:
    with stand_in(), fk.backend("aten"):
        assert kernels(*leaves()) == []
        assert choices() == []


def exported() -> dict[str, Any]:
    with stand_in():
        kernels(*leaves())
        return json.loads(dump_choices())


def test_text_and_back() -> None:
    document = exported()
    assert choices() == []
    load_choices(json.dumps(document))
    assert json.loads(dump_choices()) == document
    clear_choices()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{}x",
        '{"choices": []}',
        '{"measured_with": {}, "choices": [{"problem": "x"}]}',
        "null",
        "[]",
        "[" * 10**5,
    ],
    ids=lambda text: text[:40],
)
def test_corrupt_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"what dump_choices\(\) gave"):
        load_choices(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("aten_seconds", -1.0),
        ("native_seconds", float("nan")),
        ("aten_seconds", "1"),
        ("aten_seconds", 10**400),
        ("agree", 1),
        ("problem", 3),
        ("problem", "\ud800"),
        ("more", 1),
        ("note", None),
    ],
)
def test_a_choice_that_cannot_be_one_is_refused_and_nothing_is_loaded(field: str, value: object) -> None:
    document = exported()
    document["choices"][-1][field] = value
    with pytest.raises(ValueError, match=r"what dump_choices\(\) gave"):
        load_choices(json.dumps(document))
    assert choices() == []


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
    assert choices() == []


def test_real_times_decide_between_two_ways_on_this_cpu() -> None:
    """ATen takes every group of a float64 convolution by itself; the emulator crawls through a product of any size."""
    many_groups = torch.randn(1, 1024, 2, 2, dtype=torch.float64), torch.randn(1024, 1, 1, 1, dtype=torch.float64)
    large = torch.randn(1, 32, 8, 8), torch.randn(32, 32, 3, 3)
    with stand_in(handicap=1.0):
        conv2d(*many_groups, groups=1024)
        assert [c.backend for c in choices()] == ["native"]
        conv2d(*large)
        chosen = {("Double" in c.problem): c.backend for c in choices()}
    assert chosen == {True: "native", False: "aten"}


def test_threads_decide_and_look_up_at_once(each_problem: None) -> None:
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

    with stand_in():
        threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for problem in problems:
            conv2d(*problem)
        assert len(choices()) == len(problems)
    assert not wrong


def test_results_are_the_same_to_the_rounding_whoever_computes() -> None:
    x, w = leaves()
    with fk.backend("aten"):
        expected = conv2d(x, w, padding=1)
    with stand_in():
        for _ in range(2):
            torch.testing.assert_close(conv2d(x, w, padding=1), expected)
    assert torch.equal(conv2d(x, w, padding=1), expected)


def test_select_and_explain_tell_what_is_taken_and_why(each_problem: None) -> None:
    net = fk.convert(torch.nn.Conv2d(3, 4, 3, padding=1, bias=False))
    x = torch.randn(1, 3, 6, 6, requires_grad=True)

    def shown() -> str:
        return next(iter(fk.explain(net, x))).kernel

    assert shown() == "aten"
    with stand_in():
        net(x).sum().backward()
        seconds = {"conv2d": 1e-3, "conv2d_dgrad": 1e-6, "conv2d_wgrad": 1e-6}
        document = json.loads(dump_choices())
        for row in document["choices"]:
            operator = row["problem"].split()[0]
            row.update(aten_seconds=1e-4, native_seconds=seconds[operator], agree=operator != "conv2d_wgrad")
            row["note"] = "" if row["agree"] else "a value differs by 1 where 0.1 is allowed"
        load_choices(json.dumps(document))
        assert shown().split("; ") == [
            "conv2d: aten (measured: ATen 100 us, own kernel 1000 us)",
            "conv2d_dgrad: direct_dgrad_128x8 (measured: ATen 100 us, own kernel 1 us)",
            "conv2d_wgrad: aten (held against ATen, a value differs by 1 where 0.1 is allowed)",
        ]
    assert shown() == "aten"


def test_the_command_line_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "decides.py").write_text(
        "import freezekit as fk, torch\n"
        "def net():\n"
        "    net = fk.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()))\n"
        "    return net, torch.randn(1, 3, 6, 6, requires_grad=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["info", "--choices", "decides:net"]) == 0
    assert capsys.readouterr().out == "nothing was decided: freezekit's kernels met no GPU here\n"
    with stand_in():
        assert cli.main(["info", "--choices", "decides:net"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["activation", *OPERATORS]
        assert all(": native, ATen " in line and line.endswith(" us") for line in lines)
        assert cli.main(["info", "--choices", "decides:net", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["problem"] for row in rows] == [choice.problem for choice in choices()]


def test_medians_and_turns(tmp_path: Path) -> None:
    """The clock is a fake: one way is slow now and then, which a mean would see."""
    program = tmp_path / "medians"
    source = Path(__file__).with_name("medians.cpp")
    subprocess.run(["g++", "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
