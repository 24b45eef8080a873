"""Facts of the papers that the code must reproduce (sources: arXiv 2312.05705, 2302.09738, 2311.00636)."""

import copy
import math

import pytest
import torch
from models import SHAPES, model_and_batches
from published import SINGD
from torch import nn

from singd.rules.ikfac import ikfac_momentum
from singd.rules.singd import moved_factor, riemannian_momenta
from singd.structures import Dense

F64 = torch.float64


def random_factor(n):
    """A well-conditioned member that is not symmetric."""
    return torch.eye(n, dtype=F64) + 0.3 * torch.randn(n, n, dtype=F64)


def random_curvature(n):
    A = torch.randn(n, 2 * n, dtype=F64)
    return A @ A.T / (2 * n)


def momenta(K, C, U, G, **options):
    K, C = Dense(K), Dense(C)
    zero = [Dense(torch.zeros_like(M.dense())) for M in (K, C)]
    H = [Dense(M.dense().T @ S @ M.dense()) for M, S in ((K, U), (C, G))]
    if options.pop("kfac_like", False):
        return tuple(
            ikfac_momentum(F, H_F, options["damping"]) for F, H_F in zip((K, C), H, strict=True)
        )
    return riemannian_momenta(K, C, *zero, *H, **options)


# -- SINGD ---------------------------------------------------------------------------------------------


def test_momentum_is_the_riemannian_gradient_of_the_kl_objective():
    """K^T df/dK = 4 d_o m_K and C^T df/dC = 4 d_i m_C."""
    d_i, d_o, damping = 4, 3, 0.3
    K, C = random_factor(d_i).requires_grad_(), random_factor(d_o).requires_grad_()
    U, G = random_curvature(d_i), random_curvature(d_o)
    P_K, P_C = K @ K.T, C @ C.T
    curvature = torch.kron(G, U) + damping * torch.eye(d_i * d_o, dtype=F64)
    P = torch.kron(P_C, P_K)
    f = (P * curvature).sum() - torch.logdet(P)
    df_dK, df_dC = torch.autograd.grad(f, (K, C))
    m_K, m_C = momenta(K.detach(), C.detach(), U, G, damping=damping, alpha1=0.5)
    torch.testing.assert_close(K.T @ df_dK, 4 * d_o * m_K.dense())
    torch.testing.assert_close(C.T @ df_dC, 4 * d_i * m_C.dense())


@pytest.mark.parametrize("kfac_like", [False, True])
def test_invariance_to_moving_scale_between_the_factors(kfac_like):
    """U -> c U, G -> G / c changes nothing in SINGD; in IKFAC it does."""
    U, G, c = random_curvature(4), random_curvature(3), 10.0
    options = dict(damping=0.1, alpha1=0.5, kfac_like=kfac_like)
    K, C = random_factor(4), random_factor(3)
    m, scaled = momenta(K, C, U, G, **options), momenta(K, C, c * U, G / c, **options)
    same = all(
        torch.allclose(a.dense(), b.dense(), rtol=1e-12) for a, b in zip(m, scaled, strict=True)
    )
    assert same is not kfac_like


# -- IKFAC ---------------------------------------------------------------------------------------------


def test_ikfac_follows_kfac_to_second_order():
    """One step from K K^T = (S + damping I)^-1 ends within O(lr_cov^2) of the moving average's inverse."""
    n, damping = 5, 0.1
    S, U = random_curvature(n), random_curvature(n)
    I = torch.eye(n, dtype=F64)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q
    K = torch.linalg.cholesky(torch.linalg.inv(S + damping * I)) @ Q
    m_K, _ = momenta(K, K, U, U, damping=damping, alpha1=0.0, kfac_like=True)
    errors = []
    for lr_cov in (1e-2, 1e-3):
        new = moved_factor(Dense(K), m_K, beta_1=lr_cov).dense()
        kfac = torch.linalg.inv((1 - lr_cov) * S + lr_cov * U + damping * I)
        errors.append((new @ new.T - kfac).norm().item())
    assert math.log10(errors[0] / errors[1]) == pytest.approx(2, abs=0.05)


def test_ikfac_at_full_step_is_newton_schulz():
    K, U = random_factor(4), random_curvature(4)
    m_K, _ = momenta(K, K, U, U, damping=0.0, alpha1=0.0, kfac_like=True)
    newton_schulz = 0.5 * K @ (3 * torch.eye(4, dtype=F64) - K.T @ U @ K)
    torch.testing.assert_close(moved_factor(Dense(K), m_K, beta_1=1.0).dense(), newton_schulz)


@pytest.mark.parametrize("lr_cov", [0.1, 0.5])
@pytest.mark.parametrize("side", [0.98, 1.02])
def test_ikfac_in_one_dimension_diverges_beyond_its_limit(lr_cov, side):
    s = (1 + 4 / lr_cov) * side
    k = torch.ones(1, 1, dtype=F64)
    for _ in range(300):
        m, _ = momenta(
            k, k, torch.full((1, 1), s, dtype=F64), k, damping=0.0, alpha1=0.0, kfac_like=True
        )
        k = moved_factor(Dense(k), m, beta_1=lr_cov).dense()
        if not abs(k.item()) < 1e6:
            break
    assert (abs(k.item()) >= 1e6) == (side > 1) or not math.isfinite(k.item())
    if side < 1:
        assert k.item() ** 2 == pytest.approx(1 / s, rel=1e-6)


# -- KFAC's factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_are_exact_on_deep_linear_networks(approx):
    """U x G is the block of the Fisher of the square loss: per position (expand) or on the mean (reduce)."""
    B, S = 6, 4
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    optimizer = SINGD(
        model, lr=0.0, kfac_like=True, damping=0.0, loss_average=None, kfac_approx=approx
    )
    x = torch.randn(B, S, 3, dtype=F64)

    def network(weight, bias):
        y = model[1](nn.functional.linear(x, weight, bias))
        return (y if approx == "expand" else y.mean(1)).flatten()

    output = model[1](model[0](x))
    output = output if approx == "expand" else output.mean(1)
    for c in range(
        2
    ):  # the square loss's Hessian is I: one backward per output column sums g g^T over all
        output[..., c].sum().backward(retain_graph=True)
    optimizer.step()
    factors = optimizer.factors("0")
    U = 2 * factors.m_K.dense() + torch.eye(4, dtype=F64)  # m = (H - I) / 2 at K = C = I
    G = 2 * factors.m_C.dense() + torch.eye(4, dtype=F64)

    copies = [p.detach().clone() for p in (model[0].weight, model[0].bias)]
    J_w, J_b = torch.autograd.functional.jacobian(network, tuple(copies))
    J = torch.cat([J_w, J_b.unsqueeze(-1)], -1).flatten(1)
    torch.testing.assert_close(torch.kron(G, U), J.T @ J)


# -- micro-batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (2, 2, 2)])
@pytest.mark.parametrize("loss_average", [None, "batch", "batch+sequence"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kfac_like", [False, True])
def test_micro_batches_equal_one_batch(name, approx, loss_average, sizes, kfac_like):
    model, batches = model_and_batches(name, batch=6, steps=3)
    twin = copy.deepcopy(model)
    options = dict(
        lr=0.01,
        T=1,
        lr_cov=0.1,
        kfac_approx=approx,
        loss_average=loss_average,
        kfac_like=kfac_like,
        damping=0.1,
    )
    whole, parts = SINGD(model, **options), SINGD(twin, **options)
    for x, y in batches:
        whole.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        whole.step()
        parts.zero_grad()
        for x_part, y_part in zip(x.split(sizes), y.split(sizes), strict=True):
            (nn.functional.cross_entropy(twin(x_part), y_part) * len(x_part) / len(x)).backward()
        parts.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
