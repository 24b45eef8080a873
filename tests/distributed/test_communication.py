"""What several processes exchange, counted and compared with the sizes of the layers."""

import pytest
from launch import torchrun

from singd import registered_structures


@pytest.mark.parametrize("processes", [2, 4])
def test_a_step_exchanges_what_it_must_in_as_few_messages(processes):
    done = torchrun("counted.py", processes)
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, gathers, last = done.stdout.splitlines()
    assert last == "counted" and "gathers of" in gathers
    counted = {line.split()[0] for line in lines}
    assert len(counted) == len(lines) >= 12
    assert counted <= set(registered_structures())  # other tests of this process may add their own
