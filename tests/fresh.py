"""Scripts in processes of their own, forked from one where torch is imported: that takes longer than most scripts."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# The parent runs nothing of a script, and the child all of it, to the end of its interpreter.
SERVE = """
def request():
    import importlib, json, os, sys
    importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        asked = json.loads(line)
        for number, path in enumerate([os.devnull, *asked["files"]]):
            file = os.open(path, os.O_RDWR | os.O_CREAT)
            os.dup2(file, number)
            os.close(file)
        os.chdir(asked["folder"])
        sys.argv[1:] = asked["arguments"]
        return asked["script"]

script = request()
del request
exec(compile(script or "", "<string>", "exec"))
"""


class Fresh:
    """Runs scripts where nothing is imported but ``module`` and what that imports."""

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        command = [sys.executable, "-c", SERVE, module]
        self._server = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, script: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)``."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as written:
            files = [f"{written}/stdout", f"{written}/stderr"]
            asked = {"script": script, "arguments": arguments, "files": files, "folder": str(folder or os.getcwd())}
            self._server.stdin.write(json.dumps(asked) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            said = [Path(file).read_text() for file in files]
        return subprocess.CompletedProcess([script, *arguments], code, *said)

    def close(self) -> None:
        self._server.communicate()


@functools.cache
def _torch_alone() -> Fresh:
    made = Fresh("torch", {})
    atexit.register(made.close)
    return made


def run(script: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own, where torch is imported and freezekit is not."""
    return _torch_alone().run(script, *arguments, folder=folder)
