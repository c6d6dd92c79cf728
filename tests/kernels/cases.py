"""Problems that between them have every stride, dilation, padding, group and ragged size."""

from __future__ import annotations

from .emulated import Problem

GEOMETRIES = [
    Problem(),
    Problem(n=1, c=3, k=5, h=5, w=5, r=1, s=1, pad=(0, 0)),
    Problem(n=3, c=16, k=40, r=1, s=1, pad=(0, 0), stride=(2, 2)),
    Problem(n=2, c=24, k=33, h=9, w=8, stride=(2, 2)),
    Problem(n=1, c=7, k=9, h=11, w=10, r=5, s=2, pad=(2, 0), stride=(1, 3)),
    Problem(n=1, c=8, k=8, h=13, w=12, pad=(2, 2), dilation=(2, 2), stride=(2, 1)),
    Problem(n=1, c=4, k=8, h=12, w=11, pad=(3, 1), dilation=(3, 2), stride=(3, 2)),
    Problem(n=1, c=5, k=6, h=12, w=12, pad=(2, 2), dilation=(2, 2), stride=(2, 2)),
    Problem(n=1, c=3, k=16, h=15, w=14, r=7, s=7, pad=(3, 3), stride=(2, 2)),
    Problem(n=2, c=6, k=4, h=4, w=3, r=4, s=3, pad=(0, 0)),
    Problem(n=2, c=3, k=3, h=3, w=3, r=1, s=1, pad=(2, 2), stride=(4, 5)),
    Problem(n=1, c=2, k=3, h=8, w=8, r=4, s=4, pad=(0, 0), stride=(4, 4)),
    Problem(n=2, c=12, k=6, h=6, w=6, groups=3),
    Problem(n=2, c=6, k=12, h=6, w=6, groups=6, stride=(2, 2)),
    Problem(n=1, c=80, k=72, h=4, w=5, groups=2, pad=(1, 0)),
    Problem(n=0, c=4, k=4),
    Problem(n=1, c=1, k=1, h=1, w=1, r=1, s=1, pad=(0, 0)),
    Problem(n=5, c=70, k=130, h=3, w=3, r=2, s=2, pad=(1, 1)),
]
