"""The command line of the fuzzer."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tests.fuzz.run import describe, run_case


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz freezekit against torch.")
    parser.add_argument("--seed", type=int, default=0, help="of the whole run")
    parser.add_argument("--cases", type=int, default=1000, help="how many cases to run")
    parser.add_argument("--case", type=int, help="run this one alone, and show it")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.case is not None:
        print(describe(options.seed, options.case))
    failed, passed_over, start = 0, 0, time.monotonic()
    indices = range(options.cases) if options.case is None else [options.case]
    for count, index in enumerate(indices, 1):
        outcome = run_case(options.seed, index)
        if outcome.passed_over:
            passed_over += 1
            print(f"passed over: {outcome.passed_over}")
        if outcome.failure:
            failed += 1
            print(outcome.failure, file=sys.stderr)
            if not options.keep_going:
                break
        if count % 500 == 0:
            print(f"{count} cases, {failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    print(
        f"{count} cases of seed {options.seed}: {failed or 'none'} failed, {passed_over or 'none'} passed over because "
        f"torch itself fails, {time.monotonic() - start:.1f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
