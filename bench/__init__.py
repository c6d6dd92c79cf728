"""Benchmarks: the one place where claims about speed and memory come from. Start with ``python bench/compare.py``."""

import os

# Both are read when torch loads. Otherwise the profiler's library prints a line at every start and stop, and the CPU
# allocator warns about blocks that are older than the profile, which bench.memory expects.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
