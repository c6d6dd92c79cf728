"""The command line, checked before anything is measured."""

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import document, layer_lists, sections
from bench.layer_lists import NETWORKS
from bench.sections.layers import PARTS
from bench.settings import DTYPES, Settings
from bench.sides import COMPETITORS, SIDES, default_sides, why_absent


@dataclass(frozen=True)
class Asked:
    """One command line, understood."""

    settings: Settings
    sections: tuple[str, ...]
    threads: int | None
    time_limit: float | None
    until: bool  # whether the limit is an instant, and what it leaves out is to be told by the exit code
    json: Path | None
    plot: Path | None
    baseline: Path | None
    notes: tuple[str, ...]


def parse(arguments: Sequence[str] | None, description: str | None = None) -> Asked:
    """Reads the arguments; exits with code 2 and a sentence if they make no sense."""
    parser = _parser(description)
    args = parser.parse_args(arguments)
    try:
        device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"argument --device: no such device: {args.device!r}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"argument --device: must be cpu or cuda, got {args.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device here")
    if args.baseline is not None:
        if not args.baseline.is_file():
            parser.error(f"argument --baseline: no such file: {args.baseline}")
        try:
            document.read(args.baseline)
        except document.NotThisSchema as error:
            parser.error(f"argument --baseline: {error}")
    for name, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"argument {name}: no such folder: {path.resolve().parent}")
    if args.all and args.section:
        parser.error("argument --all: every section is in it; leave out --section")
    everything = args.all or "all" in (args.section or ())
    names = sections.NAMES if everything else args.section or sections.DEFAULT
    asked = args.sides or (*default_sides(device), *(COMPETITORS if args.all else ()))
    absent = {name: why for name in asked if (why := why_absent(name, device))}
    present = [name for name in asked if name not in absent]
    references = {SIDES[name].reference for name in present}
    wanted = dict.fromkeys(["stock", *sorted(references), *present])
    settings = Settings(
        device=device,
        dtype=DTYPES[args.dtype],
        batch=args.batch,
        rounds=args.repeat or (5 if args.quick else 15),
        least_rounds=args.repeat or (2 if args.quick else 3),
        budget=0.2 if args.quick else 1.0,
        seed=args.seed,
        cold=not args.warm,
        quick=args.quick,
        thorough=everything or args.section is not None,
        everything=args.all,
        sides=tuple(wanted),
        parts=args.parts or (PARTS if args.all else ("step",)),
        layer_lists=args.layers or (("tiny",) if args.quick else NETWORKS if args.all else ("resnet50",)),
    )
    limit = args.time_limit if args.until is None else max(1e-3, args.until - time.monotonic())
    if limit is None:
        limit = 1050.0 if args.all else 90.0 if args.section is None and not args.repeat else 0.0
    notes = [f"left out: {name}: {why}" for name, why in absent.items()]
    for name in settings.sides:
        notes += [f"left out of {s}: {name}: {why}" for s in names if (why := _why_not(name, s, args.all))]
    until, files = args.until is not None, (args.json, args.plot, args.baseline)
    return Asked(settings, names, args.threads, limit or None, until, *files, tuple(notes))


def _why_not(side: str, section: str, everything: bool) -> str:
    return "" if section == "kernels" else SIDES[side].why_not(section, everything)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch's CPU threads within the block; None leaves them."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what")
    what.add_argument("--all", action="store_true", help="every section, layer list, part and competitor")
    what.add_argument("--section", type=_some((*sections.NAMES, "all")), help=f"of {', '.join(sections.NAMES)}; or all")
    what.add_argument("--layers", type=_some(layer_lists.NAMES), help=f"of {', '.join(layer_lists.NAMES)}")
    what.add_argument("--sides", type=_some(tuple(SIDES)), help=f"of {', '.join(SIDES)}; see docs/bench.md")
    what.add_argument("--parts", type=_some(PARTS), help=f"of a layer: {', '.join(PARTS)}; by default step")
    what.add_argument("--quick", action="store_true", help="small sizes and few rounds, for a first look")
    where = parser.add_argument_group("where")
    where.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    where.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    where.add_argument("--batch", type=_positive, help="images; by default what suits the device")
    where.add_argument("--threads", type=_positive, help="CPU threads; by default torch's")
    how = parser.add_argument_group("how")
    how.add_argument("--repeat", type=_positive, help="rounds, exactly; by default 3 to 15, as time allows")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--warm", action="store_true", help="on a GPU, leave the L2 cache warm")
    how.add_argument("--time-limit", type=float, help="seconds, 0 for none; by default 90, with --all 1050")
    how.add_argument("--until", type=float, metavar="INSTANT", help="in its place: time.monotonic() when all is over")
    to = parser.add_argument_group("output")
    to.add_argument("--json", type=Path, metavar="FILE", help="as bench/schema.json says, written after each case")
    to.add_argument("--plot", type=Path, metavar="DIR", help="draw PNGs; needs matplotlib")
    to.add_argument("--baseline", type=Path, metavar="FILE", help="an earlier --json to compare with")
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


class _some:
    """A comma-separated list of known names."""

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def __call__(self, text: str) -> tuple[str, ...]:
        names = tuple(part.strip() for part in text.split(","))
        for name in names:
            if name not in self.known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(self.known)}")
        return tuple(dict.fromkeys(names))
