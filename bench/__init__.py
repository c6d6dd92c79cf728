"""Benchmarks: the one place where claims about speed and memory come from. Start with ``python bench/compare.py``."""
