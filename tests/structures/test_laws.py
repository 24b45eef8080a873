"""The laws that every registered structure obeys, on random members that are not symmetric."""

import functools

import pytest
import torch
from structure_cases import CASES, DTYPES, SIZES, STRUCTURES, member, tolerance

from singd import structure
from singd.rows import DenseRows
from singd.structures import StructuredMatrix

F64 = torch.float64
every_member = pytest.mark.parametrize(("name", "n"), CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def close(actual, expected, dtype=F64, scale=None):
    """Equal up to the rounding of ``dtype``, relative to the largest expected entry or to ``scale``."""
    actual, expected = actual.double(), expected.double()
    scale = expected.abs().max().item() if scale is None else scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance(dtype) * scale)


@functools.cache
def projector(name, n):
    """P by its definition, 1/2 P(N) = argmin over members M of ||(M + M^T) - N||, as an [n*n, n*n] matrix."""
    eye = structure(name)(n, dtype=F64)
    basis = torch.stack([eye.from_flat(e).dense() for e in torch.eye(eye.numel, dtype=F64)])
    symmetric = (basis + basis.mT).flatten(1)
    return 2 * basis.flatten(1).T @ torch.linalg.pinv(symmetric.T)


def P(name, N):
    return (projector(name, len(N)) @ N.flatten()).view_as(N)


@every_dtype
@every_member
def test_products_with_dense(name, n, dtype):
    A, X = member(name, n, dtype), torch.randn(n, 5).to(dtype)
    a, x = A.dense().double(), X.double()
    close(A @ X, a @ x, dtype)
    close(A.T @ X, a.T @ x, dtype)
    close(A.tmm(X), a.T @ x, dtype)
    for wide in (X, torch.randn(n, n + 3).to(dtype)):  # two routes
        w = wide.double()
        close(A.mm_AAt(wide), a @ (a.T @ w), dtype)
        close(A.mm_AtA(wide), a.T @ (a @ w), dtype)
        close(A.T.mm_AAt(wide), a.T @ (a @ w), dtype)
        close((A.preconditioner() or A).mm_AAt(wide), a @ (a.T @ w), dtype)
        close((A.T.preconditioner() or A.T).mm_AAt(wide), a.T @ (a @ w), dtype)
        for factor, expected in ((A, a @ (a.T @ w)), (A.T, a.T @ (a @ w))):
            for keeps in (factor, factor.preconditioner() or factor):
                close(keeps.mm_AAt_(wide.clone()), expected, dtype)
                close(keeps.mm_AAt_(wide.T.clone().T), expected, dtype)  # columns in a row
    with torch.no_grad():
        close(A @ X, a @ x, dtype)
        close(A.tmm(X.T.contiguous().T), a.T @ x, dtype)
    assert (A @ X).dtype == dtype


@every_dtype
@every_member
def test_closed_under_products_and_sums(name, n, dtype):
    A, B = member(name, n, dtype), member(name, n, dtype)
    a, b = A.dense().double(), B.dense().double()
    close((A @ B).dense(), a @ b, dtype)
    close((A.T @ B.T).dense(), a.T @ b.T, dtype)
    close((2 * A - B * 0.5 + A).dense(), 3 * a - 0.5 * b, dtype)
    half = torch.tensor(0.5)
    close((A * half).dense(), 0.5 * a, dtype)
    close(A.map(torch.clone).add_(B, alpha=2.0).dense(), a + 2 * b, dtype)
    close(A.map(torch.clone).add_(B, alpha=half).dense(), a + 0.5 * b, dtype)
    close(A.map(torch.clone).mul_(half).dense(), 0.5 * a, dtype)
    for alpha in (0.5, half):
        close(A.map(torch.clone).add_identity_(alpha).dense(), a + 0.5 * torch.eye(n), dtype)
    assert type(A @ B) is type(A + B) is type(A)
    assert (A @ B).dtype == (A * half).dtype == dtype


@every_dtype
@every_member
def test_identity_transpose_and_measures(name, n, dtype):
    A = member(name, n, dtype)
    a = A.dense().double()
    close(structure(name)(n, dtype=dtype).dense(), torch.eye(n), dtype)
    close(A.T.dense(), a.T, dtype)
    close(A.T.T.dense(), a, dtype)
    size = a.diagonal().abs().sum().item()  # the trace's terms may cancel
    close(A.trace(), a.trace(), dtype, size)
    close(A.average_trace(), a.trace() / n, dtype, size / n)
    close(A.norm(), a.norm(), dtype)
    close(A.max_abs(), a.abs().max(), dtype)
    assert A.n == n


@every_dtype
@every_member
def test_projections_by_their_definition(name, n, dtype):
    A, Y = member(name, n, dtype), torch.randn(n, 6).to(dtype)
    a, y = A.dense().double(), Y.double()
    close(A.project(Y).dense(), P(name, y @ y.T), dtype)
    assert A.project(Y).dtype == dtype
    close(A.gram().dense(), P(name, a.T @ a), dtype)
    close(A.cogram().dense(), P(name, a @ a.T), dtype)
    for m in (0, 3, 3 * n):  # fewer and more rows than columns take different routes
        R = torch.randn(m, n).to(dtype)
        r = R.double()
        close(A.project_congruence(DenseRows(R)).dense(), P(name, a.T @ r.T @ r @ a), dtype)
        close(A.project_cocongruence(DenseRows(R)).dense(), P(name, a @ r.T @ r @ a.T), dtype)


@pytest.mark.parametrize("c", [1e-6, 1e-3, 1e3])
@every_member
def test_the_scale_of_the_rows_costs_no_accuracy(name, n, c):
    """Gradients are smaller than the factors by many orders: their statistics must not drown in rounding."""
    A, R, dtype = member(name, n), c * torch.randn(4 * n, n, dtype=F64), torch.float32
    a, r = A.dense(), R
    A, rows = A.to(dtype=dtype), DenseRows(R.to(dtype))
    close(A.project_congruence(rows).dense(), P(name, a.T @ r.T @ r @ a), dtype)
    close(A.project_cocongruence(rows).dense(), P(name, a @ r.T @ r @ a.T), dtype)


@every_member
def test_projection_is_linear_keeps_the_trace_and_the_identity(name, n):
    A = member(name, n)
    Y, Z = torch.randn(n, 4, dtype=F64), torch.randn(n, 3, dtype=F64)
    both = A.project(torch.cat([Y, 2 * Z], 1))
    close(both.dense(), (A.project(Y) + 4 * A.project(Z)).dense())
    close(A.project(Y).trace(), (Y @ Y.T).trace())
    close(A.project(torch.eye(n, dtype=F64)).dense(), torch.eye(n))


@every_member
def test_storage_round_trips(name, n):
    A = member(name, n)
    a = A.dense().clone()
    flat = A.flat().clone()
    assert flat.shape == (A.numel,)
    blueprint = structure(name)(n, dtype=F64, device="meta")
    view = blueprint.from_flat(flat)
    assert torch.equal(view.dense(), a)
    view.add_(view)  # through the views, into the vector
    assert torch.equal(flat, 2 * A.flat())
    with pytest.raises(ValueError, match=f"stores {A.numel} numbers, got a tensor of"):
        blueprint.from_flat(torch.zeros(A.numel + 1, dtype=F64))


@every_member
def test_dtype_moves(name, n):
    A = member(name, n)
    assert A.to(dtype=torch.float32).dtype == torch.float32
    assert A.to(dtype=F64) is A
    assert A.to(device="meta").device.type == "meta"


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_half_precision_traces_are_summed_in_float32(name, n):
    A = member(name, n, torch.bfloat16)
    assert A.trace().dtype == torch.float32


@every_member
def test_what_it_shows(name, n):
    A = member(name, n)
    assert f"n={n}" in repr(A) and "\n" not in repr(A)
    shown = A._repr_html_()
    assert f"{n} x {n}" in shown and f"{A.numel:,} numbers" in shown
    nonzero = int((A.dense() != 0).sum())
    if n <= 32:
        assert shown.count("<rect") == nonzero


def test_the_interface_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        StructuredMatrix()


@every_dtype
@every_member
def test_the_spectral_norm_is_found_from_below(name, n, dtype):
    A = member(name, n, dtype)
    exact = torch.linalg.matrix_norm(A.to(dtype=F64).dense(), 2).item()
    wide = torch.promote_types(dtype, torch.float32)
    for products, share in ((8, 0.85), (16, 0.95), (100, 0.99)):
        found = A.spectral_norm(products)
        assert found.dtype == wide and found.shape == ()
        least = 1 - 1e-5 if name == "diagonal" else share  # which is the largest number
        assert least * exact <= found.item() <= exact * (1 + 1e-5)
    tiny = A.to(dtype=wide) * 1e-30
    assert tiny.spectral_norm().item() == pytest.approx(1e-30 * A.spectral_norm().item(), rel=1e-4)
    assert (A * 0.0).spectral_norm().item() == 0.0
    assert A.to(device="meta").spectral_norm().device.type == "meta"


@every_member
def test_vectors_signs_and_quotients(name, n):
    A, v = member(name, n), torch.randn(n, dtype=F64)
    assert (A @ v).shape == (A.T @ v).shape == (n,)
    close(A @ v, A.dense() @ v)
    close(A.T @ v, A.dense().T @ v)
    close((-A).dense(), -A.dense())
    close((A / 2).dense(), A.dense() / 2)
    close((A / torch.tensor(4.0)).dense(), A.dense() / 4)


def test_other_structures_and_sizes_are_refused_in_one_sentence():
    for combine in (
        lambda A, B: A @ B,
        lambda A, B: A + B,
        lambda A, B: A - B,
    ):
        for one in STRUCTURES:
            for other in STRUCTURES:
                A, B = member(one, 40), member(other, 40)
                if one == other:
                    assert combine(A, B).n == 40
                    continue
                with pytest.raises(TypeError, match="not of one structure and size; combine") as e:
                    combine(A, B)
                assert "\n" not in str(e.value)
            with pytest.raises(TypeError, match="not of one structure and size"):
                combine(member(one, 7), member(one, 40))
            with pytest.raises(TypeError, match="cannot be combined with list"):
                combine(member(one, 7), [1.0])
