"""Trains in child processes that are killed at random moments, and compares with training in one go.

Usage: kill_and_resume.py DIRECTORY KILLS SEED

The children are forked, so that each starts within some ms: only this process imports torch, and it never
computes anything with it.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # torch's optimizers import it when the first one is built
from train_with_checkpoints import main


def train(directory, steps, rng=None):
    """Train up to a step in a child; with a random generator, kill it after a few steps, at any moment."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)  # a line per step
        status = 1
        try:
            main(directory, steps)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as lines:
        if rng is None:
            lines.read()
        else:
            for _ in range(rng.randrange(1, 8)):
                lines.readline()
            time.sleep(rng.uniform(0, 0.01))  # a step with its checkpoint takes a few ms
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    expected = 0 if rng is None else -signal.SIGKILL
    assert os.waitstatus_to_exitcode(status) == expected


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


if __name__ == "__main__":
    directory, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    whole, pieces = directory / "whole", directory / "pieces"
    whole.mkdir(), pieces.mkdir()
    for _ in range(kills):
        train(pieces, sys.maxsize, rng)
    steps = torch.load(pieces / "checkpoint.pt", weights_only=True)["step"] + 3
    train(pieces, steps)
    train(whole, steps)
    a, b = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (whole, pieces))
    assert a["step"] == b["step"] == steps
    assert same(a, b), "a resumed run differs from an uninterrupted one"
    print(kills, steps)
