"""Several processes on this machine, started by torchrun on the loopback interface."""

import pytest
import torch
from launch import torchrun


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)
def test_two_processes_equal_one():
    done = torchrun("equal_one_process.py", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 40


@pytest.mark.parametrize("processes", [2, 4])
def test_shared_out_factors_change_nothing_but_the_memory(processes):
    done = torchrun("shard_factors.py", processes)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, measured, counted = done.stdout.splitlines()
    assert int(counted.split()[0]) > 50
    print(measured)  # of factors, in bytes


@pytest.mark.parametrize("processes", [2, 4])
def test_fully_sharded_models_equal_one_process(processes):
    done = torchrun("fully_sharded.py", processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 15


def test_checkpoints_of_four_ranks_resume_on_two_and_one(tmp_path):
    saved = torchrun("sharded_checkpoint.py", 4, "save", tmp_path)
    assert saved.returncode == 0 and "saved" in saved.stdout, saved.stderr[-3000:]
    for ranks in (2, 1):
        done = torchrun("sharded_checkpoint.py", ranks, "resume", tmp_path)
        assert done.returncode == 0 and "resumed" in done.stdout, done.stderr[-3000:]


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    done = torchrun("failures.py", 2, "overflow")
    assert done.returncode == 0 and "as expected" in done.stdout, done.stderr[-3000:]


def test_a_scaler_needs_gradients_that_are_averaged_before_it_looks():
    done = torchrun("failures.py", 2, "unwrapped")
    assert done.returncode == 0 and "as expected" in done.stdout, done.stderr[-3000:]


def test_one_rank_that_asks_alone_for_shared_out_factors_gets_an_error():
    done = torchrun("failures.py", 2, "one_asks_alone")
    assert done.returncode == 0 and "as expected" in done.stdout, done.stderr[-3000:]


def test_a_killed_rank_ends_the_others_with_a_clear_error():
    done = torchrun("failures.py", 2, "killed")
    assert done.returncode != 0
    assert "after 2 steps: Rank 0 of 2 lost another process in SINGD.step" in done.stdout
