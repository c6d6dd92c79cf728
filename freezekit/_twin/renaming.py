"""Code that knows some of its global names by others."""

import dis
import sys
from collections.abc import Mapping
from types import CodeType

_GLOBAL = ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL")
_FLAGGED = sys.version_info >= (3, 11)  # the lowest bit of LOAD_GLOBAL's argument says how it is called


def renamed(code: CodeType, names: Mapping[str, str]) -> CodeType:
    """The same code, where global names are those that ``names`` has for them, in the functions within it too.

    Raises:
        NotImplementedError: no instruction can hold the new name's index.

    >>> def f(x):
    ...     return scale * x.scale
    >>> g = type(f)(renamed(f.__code__, {"scale": "factor"}), {"factor": 3})
    >>> g(type("", (), {"scale": 2}))
    6
    """
    constants = tuple(renamed(part, names) if isinstance(part, CodeType) else part for part in code.co_consts)
    steps = [step for step in dis.get_instructions(code) if step.opcode in dis.hasname and step.argval in names]
    stored = {step.argval for step in steps if step.opname == "STORE_NAME"}  # a class body's own
    known, bytecode = list(code.co_names), bytearray(code.co_code)
    for name in dict.fromkeys(step.argval for step in steps):
        uses = [step for step in steps if step.argval == name]
        of_globals = [
            step for step in uses if step.opname in _GLOBAL or (step.opname == "LOAD_NAME" and name not in stored)
        ]
        if len(of_globals) == len(uses):
            known[known.index(name)] = names[name]
        elif of_globals:  # an attribute has that name as well
            known.append(names[name])
            for step in of_globals:
                _point_to(bytecode, step, len(known) - 1)
    return code.replace(co_consts=constants, co_names=tuple(known), co_code=bytes(bytecode))


def _point_to(bytecode: bytearray, step: dis.Instruction, index: int) -> None:
    """Has an instruction use the name of that index, in the one byte that it has for it."""
    flagged = _FLAGGED and step.opname == "LOAD_GLOBAL"
    argument = index << 1 | (step.arg or 0) & 1 if flagged else index
    if argument > 255 or (step.arg or 0) > 255:
        raise NotImplementedError(
            f"a function of more than 100 names has {step.argval!r} as a global name and as an attribute's"
        )
    bytecode[step.offset + 1] = argument
