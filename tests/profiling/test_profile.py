"""The profiler on real code, on the CPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freezekit as fk
from freezekit.profiling import profile
from tests import fresh


def forum(frozen: bool, ours: bool) -> tuple[nn.Sequential, Tensor]:
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3)))
    net[1].requires_grad_(not frozen)
    return fk.convert(net) if ours else net, torch.randn(1, 3, 24, 24)


def record(net: nn.Module, x: Tensor) -> profile:
    with profile() as recorded:
        net(x).mean().backward()
    return recorded


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(("frozen", "wgrads"), [(False, 3), (True, 2)])
def test_counts_of_the_forum_example(ours: bool, frozen: bool, wgrads: int) -> None:
    recorded = record(*forum(frozen, ours))
    assert recorded.counts() == {"fprop": 3, "dgrad": 2, "wgrad": wgrads, "db": wgrads, "epilogue": 0}


def test_rows_of_one_phase_add_up_to_its_count() -> None:
    recorded = record(*forum(True, True))
    by_phase = {phase: 0 for phase in recorded.counts()}
    for row in recorded.kernels():
        for phase in row.phases:
            by_phase[phase] += row.instances
    assert by_phase == recorded.counts()


def test_no_time_counts_twice() -> None:
    with profile() as recorded:
        F.conv2d(torch.randn(4, 8, 32, 32), torch.randn(8, 8, 3, 3))
    table = recorded.kernels()
    assert [row.label for row in table if "conv" in row.name] == ["aten::conv2d [fprop]"]
    assert sum(row.time_percent for row in table) == pytest.approx(100)


def test_bias_only_training_is_seen() -> None:
    conv = fk.FreezableConv2d(3, 4, 3)
    conv.weight.requires_grad_(False)
    y = conv(torch.randn(1, 3, 8, 8, requires_grad=True))
    with profile() as recorded:
        y.sum().backward()
    assert recorded.counts() == {"fprop": 0, "dgrad": 1, "wgrad": 0, "db": 1, "epilogue": 0}


def test_a_subset_of_gradients_is_seen() -> None:
    conv = fk.FreezableConv2d(3, 4, 3)
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    y = conv(x).sum()
    with profile() as recorded:
        torch.autograd.grad(y, x)
    assert recorded.counts() == {"fprop": 0, "dgrad": 1, "wgrad": 0, "db": 0, "epilogue": 0}


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@pytest.mark.parametrize("frozen", [False, True])
def test_other_convolutions_are_told_apart_too(layer: type[nn.Module], frozen: bool) -> None:
    conv = fk.convert(layer(2, 3, 2))
    conv.weight.requires_grad_(not frozen)
    sizes = [4] * int(layer.__name__[-2])
    x = torch.randn(1, 2, *sizes, requires_grad=True)
    with profile() as recorded:
        conv(x).sum().backward()
    assert recorded.counts() == {"fprop": 1, "dgrad": 1, "wgrad": int(not frozen), "db": 1, "epilogue": 0}


def test_a_fused_block_computes_its_epilogue_with_its_convolution() -> None:
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net = fk.fuse(nn.Sequential(*block, nn.Conv2d(4, 4, 3), nn.ReLU()).eval().requires_grad_(False))
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    net(x)  # Folded weights are kept from the first call.
    with profile() as recorded:
        net(x).sum().backward()
    phases = {row.name: row.phases for row in recorded.kernels() if row.name.startswith("freezekit::")}
    assert phases == {
        "freezekit::frozen_conv2d": ("fprop", "epilogue"),
        "freezekit::frozen_conv2d_dgrad": ("dgrad", "epilogue"),
        "freezekit::gate": ("epilogue",),  # The last block's own mask: nobody downstream applies it.
    }
    assert recorded.counts() == {"fprop": 2, "dgrad": 2, "wgrad": 0, "db": 0, "epilogue": 5}


def test_diff_says_what_freezing_took_away() -> None:
    before, after = record(*forum(False, True)), record(*forum(True, True))
    lines = str(before.diff(after)).splitlines()
    assert lines[:4] == ["fprop 3 -> 3", "dgrad 2 -> 2", "wgrad 3 -> 2", "db 3 -> 2"]
    assert before.diff(after).to_dict()["phases"]["wgrad"] == [3, 2]


def test_json_and_chrome_trace(tmp_path: Path) -> None:
    recorded = record(*forum(True, True))
    data = json.loads(recorded.to_json())
    assert data["counts"]["wgrad"] == 2
    assert {"freezekit::conv2d", "freezekit::conv2d_dgrad", "freezekit::conv2d_wgrad"} <= {
        row["name"] for row in data["kernels"]
    }
    recorded.to_chrome_trace(tmp_path / "trace.json")
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "freezekit::conv2d_dgrad" in names


def test_an_exception_inside_passes_and_what_ran_is_kept() -> None:
    recorded = profile()

    def fail() -> None:
        with recorded:
            F.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3))
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert recorded.counts()["fprop"] == 1


def test_reading_too_early_and_reusing_are_errors() -> None:
    recorded = profile()
    for read in (recorded.kernels, recorded.counts, recorded.to_json):
        with pytest.raises(RuntimeError, match="after its `with` block"):
            read()
    with recorded:
        pass
    assert len(recorded.kernels()) == 0
    with pytest.raises(RuntimeError, match="make a new profile"):
        recorded.__enter__()


@pytest.mark.gpu
def test_kernels_on_a_gpu_have_their_own_names_and_phases() -> None:
    net, x = forum(True, True)
    recorded = record(net.cuda(), x.cuda())
    assert recorded.counts()["wgrad"] == 2
    names = {row.name for row in recorded.kernels()}
    assert not any(name.startswith(("aten::", "freezekit::")) for name in names)
    assert {"dgrad", "wgrad"} <= {phase for row in recorded.kernels() for phase in row.phases}


def test_a_second_recording_at_the_same_time_is_refused() -> None:
    """torch's profiler lost the outer events of two nested ones, and ended the process of two threads."""
    with profile() as outer:
        F.relu(torch.randn(4))
        with (
            pytest.raises(RuntimeError, match=r"^torch's profiler is recording already.*\n.*one profile\(\)"),
            profile(),
        ):
            pass
        with ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeError, match="one for all threads of the process"):
            thread.submit(profile().__enter__).result()
        F.relu(torch.randn(4))
    assert [(row.label, row.instances) for row in outer.kernels() if "relu" in row.name] == [("aten::relu", 2)]
    with torch.profiler.profile() as torchs:
        with pytest.raises(RuntimeError, match="is recording already"), profile():
            pass
        F.relu(torch.randn(4))
    assert "aten::relu" in {event.name for event in torchs.events()}
    with pytest.raises(ZeroDivisionError), profile():
        raise ZeroDivisionError
    with profile() as after:
        F.relu(torch.randn(4))
    assert after.kernels()


def test_a_recording_of_others_within_the_block_is_told_and_not_counted_as_nothing() -> None:
    inner = torch.profiler.profile
    with pytest.raises(RuntimeError, match=r"took its events; .*\n.*let one begin after"), profile() as outer, inner():
        F.relu(torch.randn(4))
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        outer.counts()
    with pytest.raises(ZeroDivisionError), profile(), inner():
        raise ZeroDivisionError
    with profile() as after:
        F.relu(torch.randn(4))
    assert after.kernels()


def test_a_recording_of_others_that_begins_within_the_block_and_ends_behind_it_is_told() -> None:
    inner, outer = torch.profiler.profile(), profile()
    with pytest.raises(RuntimeError, match="it loses its own if it ends"), outer:
        inner.start()
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        outer.kernels()
    with suppress(RuntimeError):  # which torch 2.11 raises itself
        inner.stop()
    with profile() as after:
        F.relu(torch.randn(4))
    assert "aten::relu" in {row.label for row in after.kernels()}


IN_A_THREAD = """
import threading, torch
from freezekit.profiling import profile
def record():
    try:
        with torch.profiler.profile():
            torch.ones(3) + 1
    except RuntimeError:  # torch 2.11 refuses to record there
        print("told")
try:
    with profile():
        thread = threading.Thread(target=record)
        thread.start()
        thread.join()
except RuntimeError as error:
    assert "took its events" in str(error)
    print("told")
"""


def test_a_recording_in_another_thread_within_the_block_is_told_and_does_not_end_the_process() -> None:
    done = fresh.run(IN_A_THREAD)  # torch cannot record in that thread any more
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["told"]), done.stderr


WARMING_UP = """
import torch
from freezekit.profiling import profile
schedule = torch.profiler.schedule(wait=1, warmup=1, active=1, repeat=2)
with torch.profiler.profile(schedule=schedule) as torchs:
    for step in range(7):
        try:
            with profile() as within:
                torch.ones(3) + 1
            print(step, bool(within.kernels()))
        except RuntimeError as error:
            assert str(error).startswith("torch's profiler is recording already")
        torchs.step()
with torch.profiler.profile(schedule=torch.profiler.schedule(wait=0, warmup=2, active=1)) as torchs:
    pass
with profile() as after:
    torch.ones(3) + 1
print("after", bool(after.kernels()))
"""


def test_a_recording_within_the_warm_up_of_another_is_refused_and_does_not_end_the_process() -> None:
    done = fresh.run(WARMING_UP)
    told = [line for line in done.stdout.splitlines() if "True" in line]
    assert (done.returncode, told) == (0, ["0 True", "3 True", "6 True", "after True"]), done.stderr


def dropped() -> None:
    profile().__enter__()


def generated() -> None:
    def steps() -> Iterator[int]:
        with profile():
            yield from range(3)

    next(steps())


def interrupted() -> None:
    with suppress(ZeroDivisionError):
        recorded = profile()
        recorded.__enter__()
        raise ZeroDivisionError


def ended_by_hand() -> None:
    with profile() as recorded:
        with pytest.raises(RuntimeError, match=r"ends by its __exit__\(None, None, None\)"), profile():
            pass
        recorded.__exit__(None, None, None)


@pytest.mark.parametrize("leave", [dropped, generated, interrupted, ended_by_hand])
def test_a_block_that_is_left_without_its_end_lets_others_record(leave: Callable[[], None]) -> None:
    leave()
    gc.collect()
    with profile() as after:
        F.relu(torch.randn(4))
    assert "aten::relu" in {row.label for row in after.kernels()}
    with torch.profiler.profile() as torchs:
        F.relu(torch.randn(4))
    assert "aten::relu" in {event.name for event in torchs.events()}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_wrong_argument_is_one_error() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        profile(nn.ReLU())
    gc.collect()
