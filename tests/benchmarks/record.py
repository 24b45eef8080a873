"""What every file of measurements says of the machine, and how its numbers are written."""

from __future__ import annotations

import os
import pathlib
import platform
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [l.split(":", 1)[1] for l in info.read_text().splitlines() if "model name" in l]
        model = names[0].strip() if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def rounded(value: Any) -> Any:
    """Four digits of every measured number: more would only make the file change."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
