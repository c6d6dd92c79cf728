"""A seeded fuzzer: every case follows from (seed, index) alone, so one command repeats it.

python -m tests.fuzz --cases 10000             # a long run
python -m tests.fuzz --seed 3 --case 41        # one case again
"""
