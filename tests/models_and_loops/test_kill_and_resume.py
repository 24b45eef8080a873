"""A process killed at a random moment, while it trains and writes checkpoints, loses nothing but time."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
STEPS = 400


def start(directory):
    root = HERE.parent.parent
    paths = [str(root / "src"), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(HERE / "train_with_checkpoints.py"), str(directory), str(STEPS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        text=True,
    )


def run_and_kill(directory, rng):
    """The step that the process had reached when it was killed, at some moment of the next few steps."""
    process = start(directory)
    steps = rng.randrange(1, 40)
    for i, line in enumerate(process.stdout):
        if i == steps:
            time.sleep(rng.uniform(0, 0.01))  # a step with its checkpoint takes a few ms
            process.send_signal(signal.SIGKILL)
            reached = int(line)
            break
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGKILL
    return reached


def test_killed_and_resumed_is_uninterrupted(tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    whole.mkdir(), pieces.mkdir()
    uninterrupted = start(whole)
    rng = random.Random(time.time_ns())
    reached = [run_and_kill(pieces, rng) for _ in range(3)]
    assert 0 < reached[0] < reached[1] < reached[2] < STEPS
    for process in (uninterrupted, start(pieces)):
        process.communicate(timeout=120)
        assert process.returncode == 0
    a, b = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (whole, pieces))
    assert a["step"] == b["step"] == STEPS
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    for index, state in a["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][index][key])
            ), key
