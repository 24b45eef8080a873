"""Several processes on this machine, started by torchrun on the loopback interface."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).parent
PATH = os.pathsep.join(str(p) for p in (HERE.parent.parent / "src", HERE.parent))


def torchrun(script, processes, timeout=300):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": PATH,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command += [f"--nproc-per-node={processes}", str(HERE / script)]
    return subprocess.run(
        command, env=environment, timeout=timeout, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)
def test_two_processes_equal_one():
    done = torchrun("equal_one_process.py", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 40


@pytest.mark.parametrize("processes", [2, 4])
def test_fully_sharded_models_equal_one_process(processes):
    done = torchrun("fully_sharded.py", processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 15
