"""What the laws run over: every registered structure and one that a user adds, sizes that don't divide, dtypes."""

import torch
from circulant import Circulant

from singd import register_structure, registered_structures, structure

register_structure("circulant", Circulant)
STRUCTURES = list(registered_structures())
SIZES = (1, 2, 3, 7, 31, 40)
CASES = [(name, n) for name in STRUCTURES for n in SIZES]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def member(name, n, dtype=torch.float64):
    """A random member, as asymmetric as the structure allows, of about unit norm in every size."""
    eye = structure(name)(n, dtype=torch.float64)
    return eye.map(lambda t: torch.randn_like(t) / n**0.5).to(dtype=dtype)


def tolerance(dtype):
    """What a product of three matrices of these sizes may lose: some units of rounding.

    In float64 the expected values are no better themselves, as they come from a pseudo-inverse.
    """
    return max(8 * torch.finfo(dtype).eps, 1e-13)
