"""A Python module that holds state, for tests."""

from __future__ import annotations

from typing import Any

last: Any = None
calls: dict[str, int] = {"n": 0}
