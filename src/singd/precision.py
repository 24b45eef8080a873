"""In which dtype arithmetic is done."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import Any

import torch


@cache
def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where sums of squares are formed: float16 has too small a range for them, bfloat16 has not."""
    return torch.float32 if dtype == torch.float16 else dtype


@cache
def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where to sum many terms: float32 for half precision, whose sums would stall, or the dtype."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(*devices: torch.device) -> AbstractContextManager[Any]:
    """The context for arithmetic of our own on some devices, where the user may have autocast on."""
    contexts = ExitStack()
    for kind in {device.type for device in devices}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            contexts.enter_context(torch.autocast(kind, enabled=False))
    return contexts
