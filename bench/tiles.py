"""Times every kernel and tile that can compute a layer: the data for `select`'s choice.

    python -m bench.tiles --json tiles.json                     a GPU: ResNet-50's layers, bf16, batch 128, cold L2
    python -m bench.tiles --device cpu --layers tiny --batch 1  emulated: shows that it runs, says nothing about any GPU

Each line is one layer and operator: the time of `select`'s choice, of the fastest kernel, and of ATen. All candidates
are timed interleaved. A candidate that computes other values than ATen, or fails, is a line of its own and is not
timed; the exit code is then 1, and 77 where `--until` left problems out. On sm_90 the kernels for sm_90a come last,
each layer beside ATen once more. With `--json` the file is whole after each line.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import document, layer_lists
from bench.environment import describe
from bench.layer_lists import LayerShape
from bench.settings import DTYPES, NOT_RUN
from bench.sides import cudnn_benchmark
from bench.timing import clock_for, interleave
from freezekit import _C
from freezekit._tf32 import allows_tf32
from freezekit.functional import conv2d, conv2d_dgrad, conv2d_wgrad

OPERATORS = ("conv2d", "conv2d_dgrad", "conv2d_wgrad")
# As csrc/kernels/api.h numbers them; a family that this build lacks refuses every problem.
FAMILIES = ("none", "direct", "implicit_gemm", "depthwise", "hopper")
MOST_CONFIGS = 8
# Half the digits of a dtype, relative to the largest value: another kernel's order of summation is far inside of it.
CLOSE = {torch.float32: 2e-3, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer; `split_k` slices of a wgrad."""

    family: str
    config: int
    split_k: int

    @property
    def name(self) -> str:
        """For keys and tables."""
        return f"{self.family}/{self.config}" + (f" split {self.split_k}" if self.split_k > 1 else "")


@dataclass(frozen=True)
class Timed:
    """A candidate's median seconds and quartiles. ATen is "aten"; `chosen` is what `select` takes."""

    layer: str
    shape: str
    operator: str
    candidate: str
    seconds: float
    low: float
    high: float
    chosen: bool


def hopper_comes_last(device: torch.device) -> bool:
    """Whether the kernels for sm_90a run, behind all others: they have run on no GPU, and an error may stay.

    >>> hopper_comes_last(torch.device("cpu"))
    False
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


class TiledProblem:
    """A layer's tensors, channels_last, and the ways to compute one operator on them."""

    def __init__(self, layer: LayerShape, operator: str, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.layer, self.operator = layer, operator
        self.number = OPERATORS.index(operator)
        sizes = (
            (batch, layer.in_channels, layer.size, layer.size),
            (layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel),
            (batch, layer.out_channels, layer.output_size, layer.output_size),
        )
        self.x, self.w, self.y = (
            torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for size in sizes
        )
        self.geometry: tuple[Any, ...] = ((layer.stride,) * 2, (layer.padding,) * 2, (1, 1), layer.groups)
        self.outputs = [self.y, self.x, self.w]

    def aten(self) -> Tensor:
        """The operator by ATen."""
        if self.operator == "conv2d":
            return conv2d(self.x, self.w, None, *self.geometry, backend="aten")
        if self.operator == "conv2d_dgrad":
            return conv2d_dgrad(self.y, self.w, self.x.shape, *self.geometry, backend="aten")
        return conv2d_wgrad(self.y, self.x, self.w.shape, *self.geometry, backend="aten")

    def run(self, candidate: Candidate, out: Tensor) -> bool:
        """Computes into `out`; False if the candidate does not take the problem."""
        y, x, w = (out if i == self.number else tensor for i, tensor in enumerate((self.y, self.x, self.w)))
        how: Any = (*self.geometry, FAMILIES.index(candidate.family), candidate.config, candidate.split_k)
        return _C.tiles.launch(self.number, x, w, y, *how)

    def chosen(self) -> Candidate:
        """What `select` takes on this device."""
        target: dict[str, Any] = dict(sm=80, sm_count=4)  # what the emulator says it is
        if self.x.is_cuda:
            facts = torch.cuda.get_device_properties(self.x.device)
            target = dict(sm=10 * facts.major + facts.minor, sm_count=facts.multi_processor_count)
        target["allow_tf32"] = allows_tf32()
        dtype = str(self.x.dtype).removeprefix("torch.")
        picked = _C.select(self.operator, dtype, tuple(self.x.shape), tuple(self.w.shape), *self.geometry, **target)
        return Candidate(picked["family"], picked["config"], picked["split_k"])

    def candidates(self, last: bool = False) -> Iterator[Candidate]:
        """`select`'s, its other configs, those of the tensor-core families, and half and double its slices.

        Args:
            last: those for sm_90a alone, where they come last.
        """
        first = self.chosen()
        splits = sorted({max(1, first.split_k // 2), first.split_k, 2 * first.split_k}) if self.number == 2 else [1]
        out = torch.empty_like(self.outputs[self.number])
        # Hopper's instructions do nothing on other GPUs; the emulator has them.
        emulated = () if self.x.is_cuda or hopper_comes_last(self.x.device) else ("hopper",)
        for family in ("hopper",) if last else dict.fromkeys((first.family, "implicit_gemm", *emulated)):
            for config in range(MOST_CONFIGS):
                for split_k in splits:
                    candidate = Candidate(family, config, split_k)
                    with suppress(RuntimeError):  # of one that takes the problem and fails; `fault` tells
                        if not self.run(candidate, out):
                            continue
                    yield candidate


def fault(problem: TiledProblem, candidate: Candidate, expected: Tensor, out: Tensor) -> str:
    """What is wrong with what a candidate computes into `out`; nothing if it is right."""
    try:
        problem.run(candidate, out)
        error = ((out.double() - expected).abs().max() / expected.abs().max()).item()
    except RuntimeError as failed:
        return str(failed).partition("\n")[0]
    return "" if error <= CLOSE[out.dtype] else f"relative error {error:.2g}"


def measure(problem: TiledProblem, rounds: int, cold: bool, wrong: list[str], last: bool = False) -> list[Timed]:
    """All candidates that are right and ATen, interleaved; the others are added to `wrong` in words."""
    expected, found = problem.aten().double(), list(problem.candidates(last))
    steps: dict[str, Callable[[], object]] = {"aten": problem.aten}
    for candidate in found:
        out = torch.full_like(problem.outputs[problem.number], float("nan"))
        if text := fault(problem, candidate, expected, out):
            wrong.append(f"{candidate.name} on {problem.layer.name}, {problem.operator}: {text}")
        else:
            steps[candidate.name] = partial(problem.run, candidate, out)
    times = interleave(steps, clock=clock_for(problem.x.device, cold), rounds=rounds)
    first = problem.chosen().name
    return [
        Timed(problem.layer.name, problem.layer.shape, problem.operator, name, t.median, t.low, t.high, name == first)
        for name in steps
        for t in [times.time(name)]
    ]


def line(rows: Sequence[Timed]) -> str:
    """One problem: what is chosen, the fastest own kernel, ATen."""
    own = [row for row in rows if row.candidate != "aten"]
    aten = next(row for row in rows if row.candidate == "aten")
    if not own:
        return f"{aten.shape:32} {aten.operator:13} no kernel is right, aten {aten.seconds * 1e6:.1f} us"
    best = min(own, key=lambda row: row.seconds)
    chosen = next((row for row in own if row.chosen), best)
    facts = f"{chosen.candidate} {chosen.seconds * 1e6:.1f} us, best {best.candidate} {best.seconds * 1e6:.1f} us"
    return f"{rows[0].shape:32} {rows[0].operator:13} {facts}, aten {aten.seconds * 1e6:.1f} us"


def summary(rows: Sequence[Timed]) -> str:
    """Geometric mean over problems of the chosen one's time over the fastest's: what a better `select` would win."""
    problems: dict[tuple[str, str], list[Timed]] = {}
    for row in rows:
        if row.candidate != "aten":
            problems.setdefault((row.layer, row.operator), []).append(row)
    ratios = [
        row.seconds / min(other.seconds for other in found)
        for found in problems.values()
        for row in found
        if row.chosen
    ]
    mean = statistics.geometric_mean(ratios) if ratios else float("nan")
    return f"{len(problems)} problems; time of select's choice over the fastest, geometric mean: {mean:.3f}"


def main(arguments: list[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", choices=layer_lists.NAMES, default="resnet50")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm", action="store_true", help="on a GPU, leave the L2 cache warm")
    parser.add_argument("--until", type=float, metavar="INSTANT", help="time.monotonic() when all must have ended")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device here")
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    torch.manual_seed(0)
    environment, rows = describe(device, dtype), list[Timed]()
    print("\n".join(environment.lines()))
    if options.device == "cpu":
        print("emulated on a CPU: these times say nothing of any GPU")
    layers, turns = layer_lists.layers_of(options.layers), (False, True) if hopper_comes_last(device) else (False,)
    problems = [(layer, operator, last) for last in turns for layer in layers for operator in OPERATORS]
    wrong, longest, late, unwritten = list[str](), 0.0, "", ""
    with cudnn_benchmark():
        for done, (layer, operator, last) in enumerate(problems):
            start = time.monotonic()
            if options.until is not None and start + longest >= options.until:
                late = f"; out of time: {len(problems) - done} of {len(problems)} problems are left out"
                break
            told = len(wrong)
            found = list[Timed]()
            try:
                problem = TiledProblem(layer, operator, options.batch, device, dtype)
                found = measure(problem, options.rounds, not options.warm, wrong, last)
            except RuntimeError as failed:  # such as an error that the device keeps: what it costs is told
                wrong.append(f"{layer.name}, {operator}, nothing is timed: {str(failed).partition(chr(10))[0]}")
            rows += found
            said = [f"WRONG RESULT: {text}" for text in wrong[told:]]
            print(*said, *([line(found)] if found else []), sep="\n", flush=True)
            if options.json:
                content = {
                    "environment": asdict(environment),
                    "emulated": options.device == "cpu",
                    "rows": list(map(asdict, rows)),
                    "wrong": wrong,
                }
                unwritten = document.keep(content, options.json)
            longest = max(longest, time.monotonic() - start)
    print(summary(rows) + late)
    if unwritten:
        print(unwritten)
    return 1 if wrong or unwritten else NOT_RUN if late else 0


if __name__ == "__main__":
    sys.exit(main())
