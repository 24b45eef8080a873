"""No structure but dense forms anything of size d x d where d is large."""

import pytest
import torch
from structure_cases import STRUCTURES, member
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from singd.rows import DenseRows

D, M = 4096, 3


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            t.untyped_storage().nbytes() // t.element_size()
            for t in tree_leaves(out)
            if torch.is_tensor(t)
        ]
        self.numel = max([self.numel, *sizes])
        return out


# the circulant of a user has no gram of its own, and the base class's forms I
@pytest.mark.parametrize("name", [n for n in STRUCTURES if n not in ("dense", "circulant")])
def test_largest_tensor(name):
    A, B = member(name, D, torch.float32), member(name, D, torch.float32)
    X = torch.randn(D, M)
    with LargestTensor() as largest:
        A.mm(X), A.tmm(X), A.mm_AAt(X), A.project(X), A.project_congruence(DenseRows(X.T))
        A.compose(B), A.gram(), A.cogram(), A.trace(), A.norm(), A.flat(), (A + B * 2.0)
    assert largest.numel <= 64 * D < D * D


def test_the_measure_sees_a_dense_matrix():
    with LargestTensor() as largest:
        member("dense", 64).gram()
    assert largest.numel == 64 * 64
