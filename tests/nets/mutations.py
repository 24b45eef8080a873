"""Errors of one line in the mathematics, which the nets must notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


class Mutation(NamedTuple):
    """One line of the library, as it is and as it would be wrong."""

    file: str
    right: str
    wrong: str


MUTATIONS = {
    "a transpose dropped": Mutation(
        "structures/dense.py",
        "return matmul(self.a.T, X)",
        "return matmul(self.a, X)",
    ),
    "a factor of two lost": Mutation(
        "rules/singd.py", "if normalize else 0.5", "if normalize else 1.0"
    ),
    "the factors' traces exchanged": Mutation(
        "rules/singd.py", "add_(H_K, half * tr_H_C)", "add_(H_K, half * tr_H_K)"
    ),
    "a product in the other order": Mutation("rules/singd.py", "(K @ m_K)", "(m_K @ K)"),
    "a momentum that does not decay": Mutation("rules/singd.py", "(m_C * alpha1)", "(m_C * 1.0)"),
    "the loss's average not undone": Mutation(
        "statistics.py", "self.H_C * terms", "self.H_C * one"
    ),
}


def apply(mutation: Mutation, directory: Path) -> None:
    """Copy the library with one line wrong."""
    shutil.copytree(ROOT / "src", directory / "src", ignore=shutil.ignore_patterns("__pycache__"))
    path = directory / "src" / "singd" / mutation.file
    text = path.read_text()
    assert text.count(mutation.right) == 1, f"{mutation.right!r} is not one line of {mutation.file}"
    path.write_text(text.replace(mutation.right, mutation.wrong))


def is_caught(directory: Path, examples: int) -> bool:
    """Whether the nets that draw notice the library in a directory."""
    tests = ROOT / "tests"
    places = [directory / "src", tests, HERE, tests / "models_and_loops", tests / "layers"]
    nets = [str(HERE / "test_random_layers.py"), str(HERE / "test_life.py")]
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        f"pythonpath={' '.join(map(str, places))}",
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SINGD_FIGURES")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *nets],
        env={**environment, "SINGD_EXAMPLES": str(examples), "SINGD_SHRINK": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if run.returncode not in (0, 1):  # no test ran
        raise RuntimeError(run.stdout + run.stderr)
    return run.returncode == 1
