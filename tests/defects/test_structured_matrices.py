"""Structured matrices behave as matrices."""

import pytest
import torch

from singd import structure
from singd.structures import registered_structures

F64 = torch.float64
NAMES = sorted(registered_structures())


def random(name, n=7):
    A = structure(name)(n, dtype=F64)
    return A.from_flat(torch.randn(A.numel, dtype=F64))


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_times_a_vector_is_a_vector(name):
    A, v = random(name), torch.randn(7, dtype=F64)
    assert (A @ v).shape == (7,)
    torch.testing.assert_close(A @ v, A.dense() @ v)


@pytest.mark.parametrize("name", NAMES)
def test_sign_and_quotient(name):
    A = random(name)
    torch.testing.assert_close((-A).dense(), -A.dense())
    torch.testing.assert_close((A / 2).dense(), A.dense() / 2)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dense"])
def test_two_structures_do_not_mix(name):
    for product in (lambda A, B: A @ B, lambda A, B: A + B, lambda A, B: A - B):
        with pytest.raises(TypeError, match="structure"):
            product(random(name), random("dense"))
