"""The options beyond the published method, each with its law."""

import copy

import pytest
import torch
from models import model_and_batches, train
from rule_runs import FAST, PLAIN
from torch import nn

from singd import SINGD, registered_structures, rules, structure
from singd.rules import INPUT, OUTPUT, Curvature
from singd.rules.singd import step_size

OPTIONS = {
    "damping": 0.1, "lr_cov": 0.1, "alpha1": 0.5, "relative_damping": False, "fast_start": False,
    "scaled_start": False, "normalize_lr_cov": False,
}  # fmt: skip


def identities(name="dense", d_i=6, d_o=6, **kw):
    kw = {"dtype": torch.float64, **kw}
    return {INPUT: structure(name)(d_i, **kw), OUTPUT: structure(name)(d_o, **kw)}


# -- scaled_start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("u, g", [(1e-4, 1e-6), (2.0, 3.0), (1e5, 1e3), (1e8, 1e-8)])
@pytest.mark.parametrize(
    "name", ["dense", "diagonal", "block4diagonal", "triutoeplitz", "hierarchical3_2"]
)
@pytest.mark.parametrize("rule", ["singd", "ikfac", "shampoo"])
def test_scaled_identities_are_a_fixed_point_from_the_first_step_on(rule, name, u, g, relative):
    """U = u I and G = g I: K K^T (x) C C^T is their damped inverse at once, and no step moves it."""
    rule, eye = rules.find_rule(rule), identities(name)
    options = {**OPTIONS, "scaled_start": True, "relative_damping": relative}
    dW = (u * g * 6) ** 0.5 * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    factors = rule.start(eye)
    first = None
    for t in range(3):
        if rule.needs_rows:
            K, C = factors["K"].dense(), factors["C"].dense()
            traces = torch.tensor([u, g], dtype=torch.float64).unbind()
            seen = Curvature(
                eye[INPUT] * (u * K[0, 0] ** 2), eye[OUTPUT] * (g * C[0, 0] ** 2), *traces
            )
        else:
            seen = rule.gradient_curvature(factors, dW)
        factors = rule.update(factors, seen, options, t)
        first = first or factors
        for key, A in factors.items():
            torch.testing.assert_close(A.dense(), first[key].dense(), rtol=1e-9, atol=1e-9)
    A, B = (M.dense() @ M.dense().T for M in (factors["K"], factors["C"]))
    if rule.name == "ikfac":
        lambdas = (0.1 * u, 0.1 * g) if relative else (0.1, 0.1)
        expected = 1 / ((u + lambdas[0]) * (g + lambdas[1]))
    else:
        expected = 1 / (u * g * (1.1 if relative else 1) + (0 if relative else 0.1))
    torch.testing.assert_close(
        torch.kron(A, B) / expected, torch.eye(36).double(), rtol=0, atol=1e-6
    )
    assert max(factors["m_K"].dense().abs().max(), factors["m_C"].dense().abs().max()) < 1e-6


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("rule", ["singd", "ikfac", "kfac", "shampoo"])
def test_a_first_gradient_of_zeros_is_no_harm(rule, relative):
    """As of a network whose last layer starts at zero; and of one whose inputs are zero."""
    for still in (lambda model: nn.init.zeros_(model[4].weight), lambda model: None):
        model, batches = model_and_batches("mlp", steps=3)
        still(model)
        batches[0] = (batches[0][0] * 0, batches[0][1])
        options = dict(scaled_start=True, relative_damping=relative, match_rms=0.2, rule=rule)
        optimizer = SINGD(model, **{**PLAIN, **FAST, **options, "normalize_lr_cov": "spectral"})
        train(model, optimizer, batches)
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(
            A.dense().isfinite().all() for i in ("0", "2", "4") for A in optimizer.factors(i)
        )


# -- normalize_lr_cov="spectral" -------------------------------------------------------------------------


def curvatures(n):
    """Second moments that are hard on a factor: of ones, of one direction, of many scales, and random."""
    X = torch.randn(n, n, dtype=torch.float64)
    Q = torch.linalg.qr(X)[0]
    yield torch.ones(n, 1, dtype=torch.float64)
    yield 1e3 * torch.ones(n, 1, dtype=torch.float64)
    yield 1e3 * X[:, :1]
    yield Q * torch.logspace(-4, 4, n, dtype=torch.float64)
    yield X
    yield X * 0


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("name", registered_structures())
def test_a_spectral_step_cannot_take_a_factors_inverse(name, n):
    """The smallest singular value of I - beta m is 1/2, or little less as the norm is estimated."""
    rule, eye = rules.Singd(), identities(name, n, n)
    options = {**OPTIONS, "lr_cov": 1.0, "normalize_lr_cov": "spectral", "damping": 1e-3}
    factors = rule.start(eye)
    for t, Y in enumerate(Y for _ in range(3) for Y in curvatures(n)):
        H = {
            side: factors[key].project(factors[key].tmm(Y))
            for side, key in ((INPUT, "K"), (OUTPUT, "C"))
        }
        new = rule.update(factors, Curvature(H[INPUT], H[OUTPUT]), options, t)
        for key in ("K", "C"):
            m = new["m_" + key]
            beta = step_size(m, 1.0, "spectral")
            move = torch.eye(n).double() - beta * m.dense()
            torch.testing.assert_close(
                new[key].dense(), factors[key].dense() @ move, rtol=1e-9, atol=1e-12
            )
            assert torch.linalg.svdvals(move).min() > 0.4
            assert torch.linalg.svdvals(move).max() < 1.6
        factors = new


def test_the_published_normalisation_loses_the_inverse_where_the_spectral_one_does_not():
    """A rank-one matrix of ones has entries of 1, and a norm of n."""
    n, found = 30, {}
    for normalize in (True, "spectral"):
        rule, factors = rules.Singd(), rules.Singd().start(identities("dense", n, n))
        H = factors["K"].project(torch.ones(n, 1, dtype=torch.float64))
        options = {**OPTIONS, "lr_cov": 0.2, "normalize_lr_cov": normalize}
        K = rule.update(factors, Curvature(H, H), options, 0)["K"].dense()
        found[normalize] = torch.linalg.eigvalsh(K).min().item()
    assert found[True] < 0 < 0.4 < found["spectral"]


@pytest.mark.parametrize("rule", ["singd", "ikfac", "shampoo"])
def test_large_steps_on_the_factors_train_on(rule):
    """lr_cov = 1/2 on a loss that is thrown about by bad batches: no factor and no weight is ever not finite."""
    model, batches = model_and_batches("mlp", steps=60)
    options = dict(
        normalize_lr_cov="spectral", lr_cov=0.5, match_rms=0.2, momentum_on="gradient", rule=rule
    )
    optimizer = SINGD(model, **{**PLAIN, **FAST, **options, "lr": 0.01})
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        scale = 1000.0 if step % 7 == 3 else 1.0
        (nn.functional.cross_entropy(model(x * scale), y) * scale).backward()
        optimizer.step()
        for layer in ("0", "2", "4"):
            factors = optimizer.factors(layer)
            assert all(A.dense().isfinite().all() for A in factors)
            assert torch.linalg.matrix_rank(factors.K.dense(), rtol=1e-12) == factors.K.n
    assert all(p.isfinite().all() for p in model.parameters())


# -- fast_start --------------------------------------------------------------------------------------------


def test_fast_start_is_a_running_mean_at_first():
    rule, factors = rules.Kfac(), rules.Kfac().start(identities())
    options, seen = {**OPTIONS, "fast_start": True, "lr_cov": 0.05}, []
    for t in range(12):
        Y = torch.randn(6, 3, dtype=torch.float64)
        seen.append(factors["U"].project(Y))
        factors = rule.update(factors, Curvature(seen[-1], seen[-1]), options, t)
        mean = sum(A.dense() for A in seen) / len(seen)
        torch.testing.assert_close(factors["U"].dense(), mean, rtol=0, atol=1e-13)


@pytest.mark.parametrize("lr_cov", [0.01, 0.2, 0.7])
def test_fast_start_takes_steps_of_at_least_lr_cov(lr_cov):
    options = {**OPTIONS, "fast_start": True}
    betas = [rules.base.averaging(options, lr_cov, t) for t in range(300)]
    assert betas[0] == betas[1] == max(0.5, lr_cov)
    assert all(b == max(lr_cov, 1 / (t + 1)) for t, b in enumerate(betas) if t >= 1)
    options["fast_start"] = False
    assert rules.base.averaging(options, lr_cov, 0) == lr_cov


# -- relative_damping ----------------------------------------------------------------------------------------

RECIPE = dict(
    relative_damping=True, scaled_start=True, fast_start=True, normalize_lr_cov="spectral", match_rms=0.2,
    momentum_on="gradient", nesterov=True, damping=0.3, lr_cov=0.2, lr=0.01,
)  # fmt: skip


@pytest.mark.parametrize(
    "dtype, rounding", [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=str
)
@pytest.mark.parametrize("rule", ["singd", "ikfac", "kfac", "shampoo"])
def test_a_loss_times_a_constant_gives_the_same_run(rule, dtype, rounding):
    ends = {}
    for c in (1.0, 1e-6, 1e-3, 1e3, 1e6):
        model, batches = model_and_batches("cnn", steps=10)
        model.to(dtype)
        optimizer = SINGD(model, **{**PLAIN, **RECIPE, "T": 2, "rule": rule})
        train(
            model, optimizer, [(x.to(dtype), y) for x, y in batches],
            lambda output, y, c=c: c * nn.functional.cross_entropy(output, y),
        )  # fmt: skip
        ends[c] = nn.utils.parameters_to_vector(model.parameters()).detach()
    for end in ends.values():
        assert (end - ends[1.0]).abs().max() < rounding


def test_without_it_the_same_constant_changes_the_run():
    ends = []
    for c in (1.0, 1e3):
        model, batches = model_and_batches("mlp", steps=10)
        optimizer = SINGD(model, **{**PLAIN, **RECIPE, "T": 2, "relative_damping": False})
        train(
            model,
            optimizer,
            batches,
            lambda output, y, c=c: c * nn.functional.cross_entropy(output, y),
        )
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert (ends[0] - ends[1]).abs().max() > 1e-3


# -- momentum_on, nesterov, match_rms --------------------------------------------------------------------------


@pytest.mark.parametrize("match_rms", [None, 0.2])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum_on", ["gradient", "direction"])
def test_momentum_and_size_on_a_preconditioner_that_stays_i(momentum_on, nesterov, match_rms):
    """lr_cov = 0: the direction is the gradient, and ten lines say the rest."""
    model, batches = model_and_batches("mlp")
    twin = copy.deepcopy(model)
    options = dict(
        momentum_on=momentum_on, nesterov=nesterov, match_rms=match_rms, lr=0.1, lr_cov=0.0
    )
    optimizer = SINGD(model, **{**PLAIN, **FAST, **options, "weight_decay": 0.05})
    train(model, optimizer, batches)
    kept = {}
    for x, y in batches:
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(twin(x), y), list(twin.parameters())
        )
        for p, g in zip(twin.parameters(), grads, strict=True):
            if momentum_on == "gradient":
                kept[p] = kept[p] * 0.9 + g * 0.1 if p in kept else g
                g = kept[p] * 0.9 + g * 0.1 if nesterov else kept[p]
            g = g * (match_rms / g.square().mean().sqrt()) if match_rms else g
            g = g + 0.05 * p.detach()
            if momentum_on == "direction":
                kept[p] = kept[p] * 0.9 + g if p in kept else g
                g = kept[p] * 0.9 + g if nesterov else kept[p]
            p.data -= 0.1 * g
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rule", ["singd", "ikfac", "kfac", "shampoo"])
def test_a_matched_direction_has_its_size_in_every_parameter(rule):
    model, batches = model_and_batches("cnn", steps=3)
    options = dict(match_rms=0.2, momentum_on="gradient", rule=rule, lr=0.1)
    optimizer = SINGD(model, **{**PLAIN, **FAST, **options})
    for one in batches:
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, [one])
        for p, q in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(
                (p - q).square().mean().sqrt().item(), 0.02, rtol=1e-9, atol=0
            )


# -- T as a function ---------------------------------------------------------------------------------------------


def test_T_as_a_function_of_the_step():
    model, batches = model_and_batches("mlp", steps=12)
    optimizer = SINGD(model, **{**PLAIN, **FAST, "T": lambda step: 1 if step < 3 else 4})
    updated = []
    for step, one in enumerate(batches):
        train(model, optimizer, [one])
        if optimizer.stats()["0"]["age"] == 0:
            updated.append(step)
    assert updated == [0, 1, 2, 6, 10]
    assert optimizer.state[model[0].weight]["updates"] == 5


def test_a_schedule_of_T_goes_on_after_a_checkpoint():
    model, batches = model_and_batches("mlp", steps=9)
    options = {**PLAIN, **FAST, "T": lambda step: 1 + step // 3}
    optimizer = SINGD(model, **options)
    train(model, optimizer, batches[:5])
    twin = copy.deepcopy(model)
    other = SINGD(twin, **options)
    saved = optimizer.state_dict()
    assert "T" not in saved["param_groups"][0]
    other.load_state_dict(saved)
    train(model, optimizer, batches[5:])
    train(twin, other, batches[5:])
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "bad, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_a_bad_value_of_T_is_named_with_its_step(bad, error):
    model, batches = model_and_batches("mlp", steps=3)
    optimizer = SINGD(model, **{**PLAIN, **FAST, "T": lambda step: 1 if step < 2 else bad})
    train(model, optimizer, batches[:2])
    with pytest.raises(error, match=rf"^T\(2\) must be an integer >= 1, got {bad}\.$"):
        train(model, optimizer, batches[2:])
