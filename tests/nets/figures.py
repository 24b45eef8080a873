"""Runs the nets at length, and writes what they tried into the page "What is tested, and what is not".

Usage: figures.py EXAMPLES [SEED]

Nothing is written where anything failed: hypothesis prints the smallest failing example and how to repeat it.
Mend what it found, and keep the example as a test.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "_data" / "what_is_tested.json"
PAGE = ROOT / "docs" / "tested.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"

NETS = {
    "random layers": "four steps of a random layer: all kinds, sizes, structures, options and micro-batches",
    "lives of a model": "up to twelve events in the life of a random model: training, clipping, evaluation, "
    "freezing, new groups and options, copies, checkpoints, exceptions, `torch.compile`",
    "lives of a model, until they diverged": "of these, those whose numbers passed 10,000; compared until then",
    "interruptions of step": "an exception at each line of `step` in turn",
    "interruptions of backward": "an exception at each line of the hooks in turn",
    "interruptions of load_state_dict": "an exception at each line of `load_state_dict` in turn",
    "kills and resumptions": "a process killed at a random moment while it trains and saves, and resumed",
    "steps with flat memory": "steps of one run; memory after them is that after 200",
    "mutations": "errors of one line put into the mathematics on purpose; the nets notice each",
}


def table(figures: dict) -> str:
    """The figures as a table in Markdown."""
    drawn = f"{figures['examples']:,} examples were drawn for these, with seed {figures['seed']}.\n"
    lines = [drawn, "| what is done | tried | failed |", "|---|--:|--:|"]
    for net, words in NETS.items():
        lines.append(f"| {words} | {figures['tried'][net]:,} | {figures['failed']} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, figures: dict) -> str:
    """The page with these figures."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(figures) + END + rest.split(END)[1]


def run(examples: int, seed: int) -> dict:
    """Run all nets; their figures."""
    print(f"{examples} examples, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tried.jsonl"
        here = Path(__file__).parent
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(here),
            f"--ignore={here / 'test_figures.py'}",
        ]
        status = subprocess.run(
            [*command, f"--hypothesis-seed={seed}", "-p", "no:cacheprovider"],
            env={**os.environ, "SINGD_EXAMPLES": str(examples), "SINGD_FIGURES": str(path)},
            cwd=ROOT,
        ).returncode
        if status:
            raise SystemExit(f"The nets caught something with seed {seed}; no figures are written.")
        tried: Counter[str] = Counter(dict.fromkeys(NETS, 0))
        for line in path.read_text().splitlines():
            net, number = json.loads(line)
            tried[net] += number
    tried["lives of a model"] += tried["lives of a model, until they diverged"]
    return {"tried": dict(tried), "failed": 0, "examples": examples, "seed": seed}


if __name__ == "__main__":
    examples = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(2**32)
    figures = run(examples, seed)
    DATA.write_text(json.dumps(figures, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), figures))
    print(table(figures))
