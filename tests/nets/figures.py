"""Runs the nets at length, and writes what they tried into the page "What is tested, and what is not".

Usage: figures.py EXAMPLES [SEED [NET ...]]

A net is a file, such as life for `test_life.py`; without names, all are run. What each has tried is kept under
`build/nets`, so that a run that was stopped, or one that found something, goes on where it was with the same seed.
The page is written once there are figures of all nets. Of a net that failed there are none: hypothesis prints the
smallest failing example and how to repeat it. Mend what it found, and keep the example as a test.
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
    "freezing, new groups and options, copies, checkpoints, exceptions (in `make fuzz` also `torch.compile`)",
    "lives of a model, until they diverged": "of these, those whose numbers passed 10,000; compared until then",
    "interruptions of step": "an exception at a line of `step`, torch's SGD and AdamW included (each 31st that "
    "runs; in `make fuzz` also each line of code, where it first and last runs)",
    "interruptions of backward": "the same in the hooks",
    "interruptions of load_state_dict": "the same in `load_state_dict`",
    "kills and resumptions": "a process killed at a random moment while it trains and saves, and resumed",
    "steps with flat memory": "steps of one run; memory after them is that after 200",
    "mutations": "errors of one line put into the mathematics on purpose; the nets notice each",
}


def table(figures: dict) -> str:
    """The figures as a table in Markdown."""
    drawn = f"{figures['examples']:,} examples were drawn for these, with seed {figures['seed']}.\n"
    if figures.get("shorter"):
        drawn += f"Not so: {', '.join(figures['shorter'])}; these are the figures of `make test`.\n"
    lines = [drawn, "| what is done | tried | failed |", "|---|--:|--:|"]
    for net, words in NETS.items():
        lines.append(f"| {words} | {figures['tried'][net]:,} | {figures['failed']} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, figures: dict) -> str:
    """The page with these figures."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(figures) + END + rest.split(END)[1]


FILES = ("life", "random_layers", "faults", "kills", "memory", "mutations")


def run(net: str, examples: int, seed: int, into: Path) -> bool:
    """Run a net, and keep what it has tried if nothing failed; whether so."""
    with tempfile.TemporaryDirectory() as directory:
        counts = Path(directory) / "tried.jsonl"
        command = [sys.executable, "-m", "pytest", str(Path(__file__).parent / f"test_{net}.py")]
        status = subprocess.run(
            [*command, f"--hypothesis-seed={seed}", "-p", "no:cacheprovider"],
            env={**os.environ, "SINGD_EXAMPLES": str(examples), "SINGD_FIGURES": str(counts)},
            cwd=ROOT,
        ).returncode
        if status == 0:
            tried: Counter[str] = Counter()
            for line in counts.read_text().splitlines():
                name, number = json.loads(line)
                tried[name] += number
            into.write_text(json.dumps(tried))
    return status == 0


def together(parts: list[dict], examples: int, seed: int) -> dict:
    """The figures of all nets."""
    tried: Counter[str] = Counter(dict.fromkeys(NETS, 0))
    for part in parts:
        tried.update(part)
    tried["lives of a model"] += tried["lives of a model, until they diverged"]
    return {"tried": dict(tried), "failed": 0, "examples": examples, "seed": seed}


if __name__ == "__main__":
    examples = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(2**32)
    kept = ROOT / "build" / "nets" / f"{examples}-{seed}"
    kept.mkdir(parents=True, exist_ok=True)
    print(f"{examples} examples, seed {seed}", flush=True)
    paths = {net: kept / f"{net}.json" for net in FILES}
    for net in sys.argv[3:] or FILES:
        if not paths[net].exists() and not run(net, examples, seed, paths[net]):
            print(f"The net {net!r} caught something with seed {seed}.", flush=True)
    missing = [net for net, path in paths.items() if not path.exists()]
    if missing:
        raise SystemExit(f"No page is written: there are no figures of {', '.join(missing)} yet.")
    figures = together([json.loads(p.read_text()) for p in paths.values()], examples, seed)
    DATA.write_text(json.dumps(figures, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), figures))
    print(table(figures))
