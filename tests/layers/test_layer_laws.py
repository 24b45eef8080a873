"""Laws that hold for every kind of layer, whatever its options."""

from __future__ import annotations

import pytest
import torch
from layer_cases import CASES
from torch import Tensor, nn

from singd.layers import LayerKind, find_kind
from singd.rows import Rows

DOUBLE = torch.float64


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A layer after its backward: kind, layer, x, g, whether it has a bias."""
    layer, x, g = CASES[request.param].run()
    kind = find_kind(layer)
    assert kind is not None
    return kind, layer, x, g, getattr(layer, "bias", None) is not None


def input_rows(kind: LayerKind, layer: nn.Module, x: Tensor, g: Tensor, approx="expand") -> Rows:
    bias = getattr(layer, "bias", None) is not None
    return kind.input_rows(layer, x, approx=approx, bias=bias, dtype=DOUBLE, output_shape=g.shape)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def grad_matrix(kind: LayerKind, layer: nn.Module) -> Tensor:
    bias = getattr(layer, "bias", None)
    return kind.to_matrix(layer, layer.weight.grad, None if bias is None else bias.grad)


def test_the_gradient_is_the_sum_of_outer_products_of_rows(case):
    kind, layer, x, g, _ = case
    A = input_rows(kind, layer, x, g).matrix()
    G = kind.grad_rows(layer, g, x, approx="expand", dtype=DOUBLE).matrix()
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        close(G.T @ A, grad_matrix(kind, layer))
        return
    # Each group of channels is a convolution without groups, and the rows are the mean of theirs.
    axes = len(layer.kernel_size)
    G_groups, grads = G.chunk(groups, 1), grad_matrix(kind, layer).chunk(groups)
    A_groups = [
        input_rows(kind, ungrouped(layer), part, g).matrix() for part in x.chunk(groups, -axes - 1)
    ]
    for A_j, G_j, grad_j in zip(A_groups, G_groups, grads, strict=True):
        close(G_j.T @ A_j, grad_j)
    close(A, torch.stack(A_groups).mean(0))


def ungrouped(layer: nn.Module) -> nn.Module:
    names = ["kernel_size", "stride", "padding", "dilation", "padding_mode"]
    names += ["output_padding"] if "Transpose" in type(layer).__name__ else []
    options = {name: getattr(layer, name) for name in names}
    sizes = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    return type(layer)(*sizes, bias=layer.bias is not None, **options)


def test_sizes_and_counts(case):
    kind, layer, x, g, bias = case
    a = input_rows(kind, layer, x, g)
    G = kind.grad_rows(layer, g, x, approx="expand", dtype=DOUBLE)
    batch, shared = kind.positions(layer, x, g)
    assert kind.size(layer, bias) == (G.width, a.width)
    assert kind.size(layer, False) == (G.width, a.width - bias)
    assert a.count == G.count == batch * shared == g.numel() // G.width
    assert a.matrix().shape == (a.count, a.width)
    assert G.matrix().shape == (G.count, G.width)


def test_matrix_round_trip(case):
    kind, layer, _, _, bias = case
    weight, bias_grad = kind.from_matrix(layer, grad_matrix(kind, layer), bias)
    assert torch.equal(weight, layer.weight.grad)
    assert torch.equal(bias_grad, layer.bias.grad) if bias else bias_grad is None
    random = torch.randn(kind.size(layer, bias), dtype=DOUBLE)
    assert torch.equal(kind.to_matrix(layer, *kind.from_matrix(layer, random, bias)), random)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_every_answer_agrees_with_the_matrix(case, approx):
    kind, layer, x, g, _ = case
    G = kind.grad_rows(layer, g, x, approx=approx, dtype=DOUBLE)
    for rows in (input_rows(kind, layer, x, g, approx), G):
        A = rows.matrix()
        gram = A.T @ A
        close(rows.gram(), gram)
        close(rows.squares(), gram.diag())
        close(rows.sums(), A.sum(0))
        Y = torch.randn(rows.count, 3, dtype=DOUBLE)
        close(rows.tmm(Y), A.T @ Y)
        for start, stop in [(0, 1), (0, rows.width), (rows.width - 1, rows.width), (0, 0)]:
            close(rows.columns(start, stop), A[:, start:stop])
        Z = torch.randn(rows.width, 2, dtype=DOUBLE)
        close(rows.mm(Z), A @ Z)
        close(sum(part.gram() for part in rows.split()), gram)
        assert torch.equal(torch.cat([part.matrix() for part in rows.split()]), A)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 1000])
def test_diagonal_blocks(case, k):
    kind, layer, x, g, _ = case
    rows = input_rows(kind, layer, x, g)
    blocks, last = rows.block_gram(k)
    whole, rest = divmod(rows.width, k)
    assert blocks.shape == (whole, k, k)
    assert last.shape == (rest, rest)
    A = rows.matrix()
    close(torch.block_diag(*blocks, last), torch.block_diag(*[p.T @ p for p in A.split(k, 1)]))


def test_reduce_is_the_mean_of_inputs_and_the_sum_of_gradients(case):
    kind, layer, x, g, bias = case
    batch, shared = kind.positions(layer, x, g)
    A = input_rows(kind, layer, x, g).matrix()
    G = kind.grad_rows(layer, g, x, approx="expand", dtype=DOUBLE).matrix()
    A_reduced = input_rows(kind, layer, x, g, "reduce").matrix()
    G_reduced = kind.grad_rows(layer, g, x, approx="reduce", dtype=DOUBLE).matrix()
    if isinstance(layer, nn.Embedding):  # documented: the same as expand
        assert torch.equal(A_reduced, A) and torch.equal(G_reduced, G)
    elif shared == 0:  # no mean, so no rows; the sums are zero
        assert len(A_reduced) == 0 and not G_reduced.any()
    else:
        close(A_reduced, A.unflatten(0, (batch, shared)).mean(1))
        close(G_reduced, G.unflatten(0, (batch, shared)).sum(1))
        assert not bias or bool((A_reduced[:, -1] == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_in_the_dtype_asked_for(case, dtype):
    kind, layer, x, g, bias = case
    for approx in ("expand", "reduce"):
        a = kind.input_rows(layer, x, approx=approx, bias=bias, dtype=dtype, output_shape=g.shape)
        G = kind.grad_rows(layer, g, x, approx=approx, dtype=dtype)
        for rows in (a, G):
            A = rows.matrix()
            expected = (A.double().T @ A.double()).to(dtype)
            # A rounding error is relative to the columns' norms, not to the entry. A sum formed term
            # by term, as torch's convolutions do in tmm, errs like a random walk.
            unit = torch.finfo(dtype).eps * max([*expected.diag().tolist(), 0.0])
            walk = max(8, rows.count**0.5)
            for answer, value, units in (
                (rows.gram(), expected, 8),
                (rows.squares(), expected.diag(), 8),
                (rows.tmm(A), expected, walk),
            ):
                assert answer.dtype == A.dtype == dtype
                torch.testing.assert_close(answer, value, rtol=0, atol=units * unit)
