"""How many examples the nets draw, and how many they drew."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hypothesis import Phase, settings

EXAMPLES = int(os.environ.get("SINGD_EXAMPLES", "300"))
"""Over all nets that draw; `make fuzz` asks for 10,000."""

FUZZ = EXAMPLES > 1000


def drawing(share: float, **options) -> settings:
    """Settings for a net that draws a share of all examples.

    In the tests the examples are the same each time, so that a change that breaks one is what broke it;
    `make fuzz` draws others each time, and prints the seed.
    """
    phases = [Phase.explicit, Phase.reuse, Phase.generate]
    if os.environ.get("SINGD_SHRINK") != "0":  # where it is enough to know that something fails
        phases.append(Phase.shrink)
    return settings(
        max_examples=max(1, round(share * EXAMPLES)),
        deadline=None,
        derandomize=not FUZZ,
        database=None,
        print_blob=True,
        phases=phases,
        **options,
    )


def tried(net: str, number: int = 1) -> None:
    """Count what a net has tried, in the file that SINGD_FIGURES names; see `figures.py`."""
    path = os.environ.get("SINGD_FIGURES")
    if path:
        with Path(path).open("a") as file:
            file.write(json.dumps([net, number]) + "\n")
