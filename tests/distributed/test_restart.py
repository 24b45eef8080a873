"""A run that is killed and started again by torchrun ends as one that was never interrupted."""

import os
import signal
import socket
import subprocess
import sys
import uuid

import pytest
import torch
from launch import MARK, others_can_connect, still_there, torchrun
from torch.utils._pytree import keystr, tree_flatten_with_path


def leaves(state):
    """Everything in nested dictionaries, by its path."""
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(state)[0]}


@pytest.mark.parametrize(
    ("wrapper", "deaths"), [("ddp", ("backward", "saving")), ("fsdp", ("saving",))]
)
def test_a_killed_run_resumes_from_its_last_checkpoint_to_the_same_bits(wrapper, deaths, tmp_path):
    ends = {}
    for death in ("never", *deaths):
        folder = tmp_path / death
        folder.mkdir()
        done = torchrun("restart.py", 2, wrapper, death, folder, max_restarts=1)
        assert done.returncode == 0 and "finished" in done.stdout, done.stderr[-3000:]
        lives = ["life 0 starts at 0"] + ["life 1 starts at 4"] * (death != "never")
        assert [s for s in done.stdout.splitlines() if s.startswith("life")] == lives
        ends[death] = torch.load(folder / "end.pt")
    unbroken = leaves(ends.pop("never"))
    assert len(unbroken) > 20
    for end in map(leaves, ends.values()):
        assert end.keys() == unbroken.keys()
        for name, value in unbroken.items():
            torch.testing.assert_close(end[name], value, rtol=0, atol=0)


def test_the_search_for_processes_that_were_left_behind_finds_one():
    mark = uuid.uuid4().hex
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, env={**os.environ, MARK: mark}, stdin=subprocess.PIPE) as left:
        assert still_there(mark, patience=0.5) == [left.pid]
        left.send_signal(signal.SIGKILL)
    assert still_there(mark) == []


def test_nothing_listens_to_other_machines():
    done = torchrun("sockets.py", 2)
    assert done.returncode == 0 and "only this machine" in done.stdout, done.stderr[-3000:]


def test_the_search_for_open_sockets_finds_one():
    with socket.create_server(("0.0.0.0", 0)):
        assert others_can_connect([os.getpid()])
