"""Exceptions at any line of a step: what Ctrl-C does, or memory that ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import singd

OPTIM = Path(torch.optim.__file__).parent
SOURCES = (
    str(Path(singd.__file__).parent),
    *(str(OPTIM / name) for name in ("sgd.py", "adam.py", "adamw.py")),
)
"""The library, and what of torch moves its parameters."""


def places(call: Callable[[], Any]) -> list[tuple[str, int]]:
    """The lines in `SOURCES` that a call begins, in their order: file and number."""
    found = []

    def line(frame, event, arg):
        if event == "line":
            found.append((frame.f_code.co_filename, frame.f_lineno))
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename.startswith(SOURCES) else None)
    try:
        call()
    finally:
        sys.settrace(before)
    return found


class Interrupted(BaseException):
    """As KeyboardInterrupt it is no Exception, so that no handler takes it for an error."""


def interrupted(call: Callable[[], Any], at: int) -> bool:
    """Run something that raises `Interrupted` where it would begin its `at`-th line in `SOURCES`.

    Returns:
        Whether there was such a line. If not, the call has ended.
    """
    left = at

    def line(frame, event, arg):
        nonlocal left
        if event == "line":
            if left == 0:
                sys.settrace(None)
                left = -1
                raise Interrupted(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            left -= 1
        return line

    def trace(frame, event, arg):
        return line if frame.f_code.co_filename.startswith(SOURCES) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    assert left >= 0, "the interruption was swallowed"
    return False
