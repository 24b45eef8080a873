"""IKFAC follows KFAC's damped inverse without inverting: K K^T = (U + damping I)^-1, up to O(lr_cov^2) a step."""

import itertools

import pytest
import torch

from singd import rules, structure
from singd.rules import INPUT, OUTPUT, Curvature

DAMPING = 0.1
PLAIN = {
    "alpha1": 0.0,
    "relative_damping": False,
    "fast_start": False,
    "scaled_start": False,
    "normalize_lr_cov": False,
}


def spd(name, n):
    """A random positive definite member."""
    eye = structure(name)(n, dtype=torch.float64)
    return eye.project(torch.randn(n, 2 * n, dtype=torch.float64) / n**0.5).add_identity_(0.3)


def distance(name, beta):
    """Between the two after one step from the same point, in which K is no square root that is symmetric."""
    torch.manual_seed(0)
    d_i, d_o = 7, 5
    averages = {"U": spd(name, d_i), "G": spd(name, d_o)}
    new = Curvature(spd(name, d_i), spd(name, d_o))
    options = {**PLAIN, "lr_cov": beta}

    kfac, ikfac = rules.Kfac(pi=False), rules.Ikfac()
    eye = {
        INPUT: structure(name)(d_i, dtype=torch.float64),
        OUTPUT: structure(name)(d_o, dtype=torch.float64),
    }
    start = kfac.start(eye)
    # (KFAC without pi damps both factors by the square root)
    squared = {**options, "damping": DAMPING**2}
    moved = kfac.update({**start, **averages}, new, squared, updates=1)

    factors = ikfac.start(eye)
    for key, average in (("K", "U"), ("C", "G")):
        damped = averages[average].dense() + DAMPING * torch.eye(averages[average].n).double()
        root = torch.linalg.cholesky(torch.linalg.inv(damped))  # K K^T = (U + damping I)^-1
        factors[key] = from_dense(factors[key], root)
    H_K = from_dense(factors["K"], factors["K"].dense().T @ new.H_K.dense() @ factors["K"].dense())
    H_C = from_dense(factors["C"], factors["C"].dense().T @ new.H_C.dense() @ factors["C"].dense())
    followed = ikfac.update(
        factors, Curvature(H_K, H_C), {**options, "damping": DAMPING}, updates=1
    )

    pairs = [(followed["K"], moved["U_inv"]), (followed["C"], moved["G_inv"])]
    return max((A.dense() @ A.dense().T - B.dense()).abs().max().item() for A, B in pairs)


def from_dense(like, M):
    """The member of a dense, diagonal or block-diagonal structure with the entries of M."""
    place = torch.arange(like.numel, dtype=torch.float64) + 1
    where = like.from_flat(place).dense().round().long()
    flat = torch.zeros(like.numel, dtype=M.dtype)
    i, j = where.nonzero(as_tuple=True)
    flat[where[i, j] - 1] = M[i, j]
    return like.from_flat(flat)


@pytest.mark.parametrize("name", ["dense", "diagonal", "block3diagonal"])
def test_a_step_differs_from_kfacs_by_the_square_of_lr_cov(name):
    errors = [distance(name, beta) for beta in (1e-2, 1e-3, 1e-4)]
    assert 1e-5 < errors[0] < 0.1
    for large, small in itertools.pairwise(errors):
        assert 70 < large / small < 130


def test_a_run_stays_beside_kfac():
    """Over a thousand small steps on noisy curvature the errors do not add up."""
    torch.manual_seed(0)
    kfac, ikfac, name = rules.Kfac(pi=False), rules.Ikfac(), "dense"
    eye = {
        INPUT: structure(name)(6, dtype=torch.float64),
        OUTPUT: structure(name)(6, dtype=torch.float64),
    }
    options = {**PLAIN, "lr_cov": 1e-2}
    exact = {**kfac.start(eye), "U": eye[INPUT] * (1 - DAMPING), "G": eye[OUTPUT] * (1 - DAMPING)}
    factors = ikfac.start(eye)
    for t in range(1000):
        X = torch.randn(6, 12, dtype=torch.float64) * torch.logspace(-1, 0.5, 6)[:, None] / 12**0.5
        U = eye[INPUT].project(X)
        exact = kfac.update(exact, Curvature(U, U), {**options, "damping": DAMPING**2}, t + 1)
        K = factors["K"].dense()
        H = from_dense(factors["K"], K.T @ U.dense() @ K)
        factors = ikfac.update(factors, Curvature(H, H), {**options, "damping": DAMPING}, t)
    K, inverse = factors["K"].dense(), exact["U_inv"].dense()
    assert (K @ K.T - inverse).norm() / inverse.norm() < 0.05
