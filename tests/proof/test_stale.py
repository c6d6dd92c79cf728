"""Emulated kernels of an older tree are refused: what is called by their table would be something else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import freezekit as fk
from freezekit import _C, _extension

TABLE = 'extern "C" void* freezekit_kernel_table() { return nullptr; }'
ERROR = 'extern "C" const char* freezekit_last_error() { return ""; }'
BYTES = 'extern "C" unsigned long freezekit_kernel_table_bytes() { return 8; }'


@pytest.mark.parametrize(("more", "says"), [("", "lack freezekit_kernel_table_bytes"), (BYTES, "are older than this")])
def test_kernels_of_an_older_tree_are_refused(more: str, says: str, tmp_path: Path) -> None:
    source, library = tmp_path / "stale.cpp", tmp_path / "stale.so"
    source.write_text("\n".join([TABLE, ERROR, more]))
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    _C.set_emulator_path(str(library))
    try:
        with pytest.raises(RuntimeError, match=f"{says}.*rebuild"), fk.testing.emulated():
            fk.functional.relu(torch.ones(2, requires_grad=True))
    finally:
        _C.set_emulator_path(str(_extension.emulated_kernels()))
