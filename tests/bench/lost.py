"""Processes that are lost. They import nothing that takes time, torch least of all."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

READY = "ready"  # of bench.child, as a test says


def hang(pipe: Connection) -> None:
    pipe.send(READY)
    pipe.recv()
    time.sleep(600)


def crash(pipe: Connection) -> None:
    pipe.send(READY)
    pipe.recv()
    os._exit(7)


def crash_at_once(pipe: Connection) -> None:
    os._exit(8)
