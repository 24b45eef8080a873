"""The least work known: floating-point operations of the cheapest route for one iteration of SINGD.

Counted are multiplications and additions (2 for each term of a product) of what SINGD adds to SGD: the
statistics and the step of both factors at updates, one natural gradient at every step. Sums over n or d
numbers beside products of matrices are left out. A symmetric result costs half of a product.

The natural gradient starts from the gradient as torch hands it over. With fewer rows than inputs and outputs
it would be cheaper to precondition the rows, but then every step would have to gather them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import nn
from workloads import Workload

from singd.structures import structure
from singd.structures.registry import FAMILIES


@dataclass(frozen=True)
class Side:
    """What one factor sees in one iteration: ``rows`` rows of ``d`` numbers.

    Attributes:
        d: The factor's size.
        rows: How many rows the statistics sum over.
        gram: Operations of the dense A^T A by the cheapest route.
        diagonal: Operations of its diagonal.
        columns: How many vectors the natural gradient multiplies with K K^T.
    """

    d: int
    rows: int
    gram: float
    diagonal: float
    columns: int


def sides(workload: Workload) -> list[Side]:
    """Both sides of every layer, with the rows that one batch gives them."""
    model, (x, _), found = workload.model(), workload.batch(), []

    def watch(layer: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        d_o, d_i = layer.weight.shape[0], layer.weight[0].numel() + 1
        if isinstance(layer, nn.Conv2d):
            rows = out.numel() // d_o
            # a shift of both windows shares its products with all others: a sixth for 3 x 3 at stride 1
            overlap = 3 if layer.stride[0] == 1 and layer.kernel_size[0] == 3 else 1
            gram, squares = rows * d_i**2 / overlap, 2 * args[0].numel()
        else:
            rows = args[0].numel() // (d_i - 1)
            gram, squares = rows * d_i**2, 2 * rows * d_i
        found.append(Side(d_i, rows, gram, squares, d_o))
        found.append(Side(d_o, rows, rows * d_o**2, 2 * rows * d_o, d_i))

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(watch)
    with torch.no_grad():
        model(x)
    return found


def _dense(s: Side) -> tuple[float, float, float]:
    rows_first = 3 * s.rows * s.d**2  # K^T A^T, then half of its product with itself
    gram_first = s.gram + 3 * s.d**3  # A^T A, S K, half of K^T (S K)
    update = min(rows_first, gram_first) + s.d**3 + 2 * s.d**3  # K^T K, K m_K
    return update, s.d**3, 2 * s.d**2 * s.columns  # K K^T, and with it


def _diagonal(s: Side) -> tuple[float, float, float]:
    return s.diagonal + 10 * s.d, s.d, s.d * s.columns


def _block(s: Side, k: int) -> tuple[float, float, float]:
    update = s.rows * s.d * k + (3 + 1 + 2) * s.d * k**2
    return update, s.d * k**2, 2 * s.d * k * s.columns


def _hierarchical(s: Side, k: int) -> tuple[float, float, float]:
    """One corner or two, k numbers in all: borders of k rows or columns, and a diagonal."""
    apply = 2 * (k + 1) * s.d  # to one vector
    project = 2 * (k + 1) * s.d
    return s.rows * (apply + project) + 6 * s.d * k**2, 0.0, 2 * apply * s.columns


def _toeplitz(s: Side) -> tuple[float, float, float]:
    length = 2 * s.d
    transform = 2.5 * length * math.log2(length)  # of real numbers
    by_fft, by_matrix = 2 * transform + 3 * length, s.d * (s.d + 1)
    power = transform + 1.5 * length  # of the projection
    apply = min(by_fft, by_matrix)
    return s.rows * (apply + power) + 12 * transform, 0.0, 2 * apply * s.columns


def operations(workload: Workload, name: str, T: int) -> float:
    """Floating-point operations of one iteration, on average over the period.

    Raises:
        ValueError: For a structure whose cheapest route is not written down here.
    """
    structure(name)  # a clear error for unknown names
    sizes = [int(k) for k in _sizes(name)]
    total = 0.0
    for s in sides(workload):
        if name == "dense":
            update, product, gradient = _dense(s)
        elif name == "diagonal":
            update, product, gradient = _diagonal(s)
        elif name.startswith("block"):
            update, product, gradient = _block(s, min(sizes[0], s.d))
        elif name.startswith("hierarchical"):
            update, product, gradient = _hierarchical(s, min(sum(sizes), s.d))
        elif name.endswith("toeplitz"):
            update, product, gradient = _toeplitz(s)
        else:
            raise ValueError(f"No floor is known for {name!r}.")
        apply = gradient + product / T  # K K^T first, or K^T and then K
        total += update / T + (min(apply, 2 * gradient) if product else apply)
    return total


def _sizes(name: str) -> tuple[str, ...]:

    for family in FAMILIES:
        match = re.fullmatch(family.pattern.replace("{}", r"(\d+)"), name)
        if match:
            return match.groups()
    return ()
