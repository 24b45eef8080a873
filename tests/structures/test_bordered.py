"""Diagonal matrices with dense rows, by every route, and their numbers as checkpoints of format 1 stored them."""

from pathlib import Path

import pytest
import torch
from make_old_layouts import KEYS, LATER, LAYERS, STEPS, build, train, weights
from structure_cases import STRUCTURES, member

from singd import kernels, structure
from singd.rows import DenseRows
from singd.structures import (
    Bordered,
    StructuredMatrix,
    Transposed,
    from_recursive_layout,
)

F64 = torch.float64
DATA = Path(__file__).parent.parent / "data"
BORDERED = [n for n in STRUCTURES if n.startswith(("trilrank", "triurank", "hierarchical"))]
SAVED = torch.load(DATA / "factors_of_format_1.pt", weights_only=True)


def results(A, B, X, rows):
    return {
        "mm_AAt": A.mm_AAt(X),
        "mm_AtA": A.mm_AtA(X),
        "kept": (A.preconditioner() or A).mm_AAt(X),
        "kept, in place": (A.preconditioner() or A).mm_AAt_(X.clone()),
        "project_congruence": A.project_congruence(rows).dense(),
        "project_cocongruence": A.project_cocongruence(rows).dense(),
        "gram": A.gram().dense(),
        "cogram": A.cogram().dense(),
        "compose": (A @ B).dense(),
    }


@pytest.mark.parametrize("m", [0, 1, 6, 50])
@pytest.mark.parametrize("n", [1, 2, 5, 9, 23, 67])
@pytest.mark.parametrize("name", BORDERED)
def test_all_routes_agree_with_dense_matrices(name, n, m):
    A, B = member(name, n), member(name, n)
    a, b = A.dense(), B.dense()
    X, rows = torch.randn(n, m, dtype=F64), DenseRows(torch.randn(m, n, dtype=F64))
    S, unit = rows.gram(), torch.eye(n, dtype=F64)
    projected = {
        "project_congruence": a.T @ S @ a,
        "project_cocongruence": a @ S @ a.T,
        "gram": a.T @ a,
        "cogram": a @ a.T,
    }
    # a Gram matrix is its eigenvectors times their scales, so that `project` says what P is
    expected = {}
    for what, N in projected.items():
        values, vectors = torch.linalg.eigh(N)
        expected[what] = A.project(vectors * values.clamp(min=0).sqrt()).dense()
    expected["mm_AAt"] = expected["kept"] = expected["kept, in place"] = a @ (a.T @ X)
    expected["mm_AtA"], expected["compose"] = a.T @ (a @ X), a @ b
    for which in ("fast", "plain"):
        with kernels.use(which):
            found = results(A, B, X, rows)
        for what, value in found.items():
            torch.testing.assert_close(value, expected[what], rtol=0, atol=1e-11, msg=what)
    inner = A.of if isinstance(A, Transposed) else A
    for what in ("project_congruence", "project_cocongruence"):  # elsewhere than on a CPU
        torch.testing.assert_close(
            getattr(StructuredMatrix, what)(inner, rows).dense(),
            getattr(inner, what)(rows).dense(),
            rtol=0,
            atol=1e-11,
        )
    torch.testing.assert_close(A.T.dense() @ unit, a.T)


@pytest.mark.parametrize("name", BORDERED)
def test_every_stored_number_is_an_entry(name):
    for n in (1, 2, 5, 9, 40):
        A = structure(name)(n, dtype=F64).map(lambda t: torch.arange(1.0, 1 + len(t), dtype=F64))
        entries = A.dense().flatten()
        assert torch.equal(entries[entries != 0].sort().values, A.flat())


def test_sizes_are_static():
    A = structure("hierarchical3_2")(9)
    assert (A * 2.0).size == A.map(torch.clone).size == A.from_flat(A.flat()).size == 9
    assert A.flat().data_ptr() == A.numbers.data_ptr()
    on_meta = structure("hierarchical3_2")(9, device="meta", dtype=torch.bfloat16)
    assert on_meta.gram().compose(on_meta).numel == A.numel == 9 - 5 + 3 * 9 + 2 * 6
    assert on_meta.project_congruence(DenseRows(torch.empty(4, 9, device="meta"))).n == 9


def test_keeping_a_preconditioner_leaves_the_factor_alone():
    for name in BORDERED:
        A, X = member(name, 23), torch.randn(23, 4, dtype=F64)
        before, kept = A.flat().clone(), A.preconditioner()
        if kept is not None:
            assert torch.equal(kept.mm_AAt(X), kept.mm_AAt(X))
            kept.mm_AAt_(X)
        assert torch.equal(A.flat(), before)


# -- checkpoints of format 1 ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVED)
def test_old_factors_are_read_to_the_bit(name):
    saved, make = SAVED[name], structure(name.split(",")[0])
    state = saved["optimizer"]["state"]
    dense = iter(saved["dense"].split([n * n for n in SIZES]))
    for index in range(len(LAYERS)):
        factors = state[2 * index]
        for key, n in zip(KEYS, SIZES[4 * index :], strict=False):
            blueprint = make(n, device="meta")
            flat = from_recursive_layout(blueprint, factors[key])
            assert flat.dtype == factors[key].dtype and flat.shape == factors[key].shape
            assert torch.equal(blueprint.from_flat(flat).dense(), next(dense).view(n, n))


SIZES = [8, 5, 8, 5, 3, 3, 3, 3, 13, 3, 13, 3]  # of K, C, m_K and m_C of each layer


@pytest.mark.parametrize("name", SAVED)
def test_old_checkpoints_go_on_training(name):
    saved = SAVED[name]
    half = name.endswith("bfloat16")
    options = dict(dtype=torch.float32, preconditioner_dtype=torch.bfloat16) if half else {}
    model, optimizer = build(name.split(",")[0], **options)
    torch.nn.utils.vector_to_parameters(saved["model"], model.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(STEPS, STEPS + LATER))
    # the same products in another order: not the same bits
    tolerance = 1e-3 if half else 1e-12
    torch.testing.assert_close(weights(model), saved["later"], rtol=0, atol=tolerance)
    assert optimizer.state_dict()["param_groups"][0]["format"] > 1


def test_factors_inside_other_structures_are_converted_too():
    inner = member("hierarchical3_2", 9)
    outer = Transposed(Transposed(inner))
    flat = torch.arange(float(inner.numel))
    assert torch.equal(from_recursive_layout(outer, flat), from_recursive_layout(inner, flat))
    assert isinstance(inner, Bordered)
    dense = torch.randn(4)
    assert from_recursive_layout(structure("dense")(2), dense) is dense
