"""Makes checkpoints_of_format_N.pt for the N of this version, which every later version must read.

Run once per format, from the repository's root; with a word, for a later version that writes the same format:

    PYTHONPATH=src:tests:tests/models_and_loops python tests/data/make_checkpoint.py [WORD]

There are checkpoints of format 2 by the first version that wrote it, and by a later one. The one of format 1 was
made alike, with the published options only.
"""

import copy
import sys
from pathlib import Path

import torch
from small import Small, train

import singd
from singd.groups import FORMAT

HERE = Path(__file__).parent
STEPS, LATER = 3, 4

CASES = {
    "defaults": {},
    "published": {**singd.PUBLISHED, "lr": 0.05},
    "kfac": dict(rule="kfac", structures=("dense", "dense")),
    "ikfac": dict(rule="ikfac", structures=("hierarchical2_1", "triltoeplitz")),
    "shampoo": dict(rule="shampoo", structures=("dense", "dense")),
    "half": dict(
        preconditioner_dtype=torch.bfloat16, structures=("trilrank2first", "block2diagonal"), alpha1=0.5
    ),
}  # fmt: skip
"""Options with all kinds of state."""


def build(case, seed=0):
    torch.manual_seed(seed)
    model = Small()
    return model, singd.SINGD(model, **CASES[case])


def record(case):
    """A checkpoint after some steps, and the weights some steps later."""
    model, optimizer = build(case)
    train(model, optimizer, range(STEPS))
    saved = {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
    }
    train(model, optimizer, range(STEPS, STEPS + LATER))
    return {**saved, "later": dict(model.state_dict())}


if __name__ == "__main__":
    path = HERE / f"checkpoints_of_format_{'_'.join([str(FORMAT), *sys.argv[1:]])}.pt"
    if path.exists():
        raise SystemExit(f"{path.name} exists; the point of it is that it stays as it was made.")
    torch.save({case: record(case) for case in CASES}, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.1f} kB")
