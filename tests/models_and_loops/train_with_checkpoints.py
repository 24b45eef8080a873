"""A training process that may be killed at any moment: each checkpoint replaces the last one at once.

Usage: train_with_checkpoints.py DIRECTORY STEPS
"""

import os
import sys
from pathlib import Path

import torch
from small import build, train


def save(value, path):
    """Write beside the file, then rename: a reader finds the old or the new one, never a part."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def main(directory, steps):
    path = directory / "checkpoint.pt"
    model, optimizer = build()
    step = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    while step < steps:
        train(model, optimizer, [step])
        step += 1
        saved = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save(saved, path)
        print(step, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
