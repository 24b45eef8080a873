"""KFAC: what its formula promises, and what the dtype of an inverse does to it."""

import math

import pytest
import torch
from models import model_and_batches, train
from rule_runs import FAST, PLAIN
from torch import nn

from singd import SINGD, rules, structure
from singd.rules import INPUT, OUTPUT, Curvature

OPTIONS = {"damping": 1e-3, "lr_cov": 0.1, "relative_damping": False, "fast_start": False}
STRUCTURES = ("dense", "diagonal", "block3diagonal", "block30diagonal")


def sides(name, d_i=7, d_o=5, dtype=torch.float64):
    """The identities of both sides."""
    return {INPUT: structure(name)(d_i, dtype=dtype), OUTPUT: structure(name)(d_o, dtype=dtype)}


def curvature(name, d_i=7, d_o=5, rows=20, scale=1.0, dtype=torch.float64):
    """Random second moments, projected."""
    eye = sides(name, d_i, d_o)
    A, B = (
        torch.randn(rows, d_i, dtype=torch.float64),
        scale * torch.randn(rows, d_o, dtype=torch.float64),
    )
    H_K, H_C = eye[INPUT].project(A.T / rows**0.5), eye[OUTPUT].project(B.T / rows**0.5)
    return Curvature(H_K.to(dtype=dtype), H_C.to(dtype=dtype))


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("pi", [True, False])
def test_the_running_average_counts_the_first_statistics_in_full(name, pi):
    rule, seen = rules.Kfac(pi), [curvature(name) for _ in range(4)]
    factors = rule.start(sides(name))
    assert torch.equal(factors["U_inv"].dense(), torch.eye(7).double())
    for t, one in enumerate(seen):
        old = {key: A.dense() for key, A in factors.items()}
        new = rule.update(factors, one, OPTIONS, t)
        assert all(
            torch.equal(A.dense(), old[key]) for key, A in factors.items()
        )  # none is changed
        factors = new
    weights = [0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    U = sum(w * one.H_K.dense() for w, one in zip(weights, seen, strict=True))
    G = sum(w * one.H_C.dense() for w, one in zip(weights, seen, strict=True))
    torch.testing.assert_close(factors["U"].dense(), U, rtol=0, atol=1e-14)
    pi = math.sqrt(U.trace() / 7 / (G.trace() / 5)) if pi else 1.0
    for key, A, shift in (("U_inv", U, pi * math.sqrt(1e-3)), ("G_inv", G, math.sqrt(1e-3) / pi)):
        damped = A + shift * torch.eye(len(A)).double()
        torch.testing.assert_close(
            factors[key].dense() @ damped, torch.eye(len(A)).double(), rtol=0, atol=1e-11
        )


@pytest.mark.parametrize("pi", [True, False])
def test_pi_makes_the_step_invariant_to_how_a_scale_is_split(pi):
    """U -> s U and G -> G / s is the same Kronecker product."""
    rule, one, dW = rules.Kfac(pi), curvature("dense"), torch.randn(5, 7, dtype=torch.float64)
    found = []
    for s in (1.0, 100.0):
        split = Curvature(one.H_K * s, one.H_C * (1 / s))
        factors = rule.update(rule.start(sides("dense")), split, OPTIONS, 0)
        found.append(rule.direction(rule.prepare(factors, False), dW))
    assert torch.allclose(*found, rtol=1e-10, atol=0) == pi


def test_it_is_the_exact_fisher_where_a_kronecker_product_is_exact():
    """One sample, one layer: the curvature is G (x) U, and N solves it but for the damping."""
    a, g = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    eye = sides("dense", 3, 2)
    one = Curvature(eye[INPUT].project(a[:, None]), eye[OUTPUT].project(g[:, None]))
    rule = rules.Kfac(pi=False)
    dW = g[:, None] * a  # the gradient lies in the only direction that has curvature
    errors = []
    for damping in (1e-6, 1e-8, 1e-10):
        factors = rule.update(rule.start(eye), one, {**OPTIONS, "damping": damping}, 0)
        N = rule.direction(rule.prepare(factors, False), dW)
        fisher = torch.kron(torch.outer(g, g), torch.outer(a, a))
        errors.append((fisher @ N.flatten() - dW.flatten()).abs().max().item())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inverses_are_taken_in_float32_whatever_the_factors_are(name, dtype):
    """Rank three in 40 dimensions, and a damping that outweighs the rounding of the factor itself."""
    rule, d = rules.Kfac(pi=False), 40
    one = curvature(name, d, d, rows=3, dtype=dtype)
    eye = {side: A.to(dtype=dtype) for side, A in sides(name, d, d).items()}
    factors = rule.update(rule.start(eye), one, {**OPTIONS, "damping": 1e-2}, 0)
    for key in ("U", "G"):
        inverse, A = factors[key + "_inv"], factors[key].dense().double()
        assert inverse.dtype == dtype and inverse.dense().isfinite().all()
        exact = torch.linalg.inv(A + 0.1 * torch.eye(d))  # of the factor as it is stored
        error = (inverse.dense().double() - exact).norm() / exact.norm()
        # the rounding of the result, and of float32 times the condition number
        assert error < torch.finfo(dtype).eps + 1e3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["dense", "block30diagonal"])
def test_a_factor_that_rounding_made_indefinite_has_no_inverse(name):
    """Cholesky leaves half-done numbers there, which would pass for an inverse."""
    one = curvature(name, 40, 40, rows=3, dtype=torch.bfloat16)
    assert torch.linalg.eigvalsh(one.H_K.dense().double()).min() < -1e-4
    eye = {side: A.to(dtype=torch.bfloat16) for side, A in sides(name, 40, 40).items()}
    factors = rules.Kfac(pi=False).update(
        rules.Kfac().start(eye), one, {**OPTIONS, "damping": 1e-10}, 0
    )
    assert factors["U_inv"].dense().isnan().any()


def test_the_optimizer_keeps_the_old_factors_then_and_says_so():
    torch.manual_seed(0)
    model = nn.Linear(60, 60)
    options = {**PLAIN, **FAST, "damping": 1e-12, "preconditioner_dtype": torch.bfloat16}
    optimizer = SINGD(model, rule="kfac", **options)
    model(torch.randn(3, 60)).square().mean().backward()
    with pytest.warns(
        UserWarning, match=r"factors of layer '' would not be finite .* wider factors"
    ) as seen:
        optimizer.step()
    assert seen[0].filename == __file__
    factors = optimizer.factors(model)
    assert torch.equal(factors.U_inv.dense().float(), torch.eye(61)) and not factors.U.dense().any()


def test_a_wider_factor_is_not_inverted_in_less():
    one, rule = curvature("dense"), rules.Kfac(inverse_dtype=torch.float32)
    exact = rules.Kfac(inverse_dtype=torch.float64)
    found = [r.update(r.start(sides("dense")), one, OPTIONS, 0)["U_inv"] for r in (rule, exact)]
    assert found[0].dtype == torch.float64 and torch.equal(found[0].dense(), found[1].dense())


@pytest.mark.parametrize("damping, positive", [(1e-8, False), (0.25, True)])
def test_an_inverse_in_bfloat16_has_negative_eigenvalues_where_the_damping_is_small(
    damping, positive
):
    """The honest switch: rounding moves eigenvalues by 2^-9 of the largest, which 1e-4 does not outweigh."""
    one = curvature("dense", 60, 60, rows=30, dtype=torch.float32)
    least = {}
    for dtype in (torch.bfloat16, torch.float32):
        rule = rules.Kfac(pi=False, inverse_dtype=dtype)
        start = rule.start(sides("dense", 60, 60, torch.float32))
        U_inv = rule.update(start, one, {**OPTIONS, "damping": damping}, 0)["U_inv"].dense()
        assert U_inv.isfinite().all()
        least[dtype] = torch.linalg.eigvalsh((U_inv + U_inv.T).double() / 2).min().item()
    assert (least[torch.bfloat16] > 0) == positive and least[torch.float32] > 0


@pytest.mark.parametrize("bad", [torch.int32, "float32", None])
def test_inverse_dtype_must_be_a_floating_point_dtype(bad):
    with pytest.raises(TypeError, match=r"inverse_dtype must be a floating-point torch.dtype, got"):
        rules.Kfac(inverse_dtype=bad)


def test_relative_damping_is_relative_to_both_average_traces():
    one, rule = curvature("dense", scale=3.0), rules.Kfac(pi=True)
    relative = rule.update(
        rule.start(sides("dense")), one, {**OPTIONS, "relative_damping": True}, 0
    )
    product = float(one.H_K.average_trace() * one.H_C.average_trace())
    absolute = rule.update(
        rule.start(sides("dense")), one, {**OPTIONS, "damping": 1e-3 * product}, 0
    )
    for key in rule.keeps:
        torch.testing.assert_close(relative[key].dense(), absolute[key].dense(), rtol=1e-12, atol=0)


def test_it_trains_a_network_whose_parameters_are_bfloat16():
    model, batches = model_and_batches("cnn", steps=20)
    model.bfloat16()
    batches = [(x.bfloat16(), y) for x, y in batches[:1] * 20]
    optimizer = SINGD(model, rule="kfac", **{**PLAIN, **FAST, "lr": 0.1})
    losses = train(
        model, optimizer, batches, lambda output, y: nn.functional.cross_entropy(output.float(), y)
    )
    assert losses[-1] < 0.5 * losses[0]
    assert {A.dtype for A in optimizer.factors("0")} == {torch.bfloat16}
