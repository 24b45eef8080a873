"""Whose curvature: labels sampled from the model give the Fisher matrix, if the calls come in order."""

import warnings

import pytest
import torch
from models import model_and_batches
from rule_runs import FAST, PLAIN
from torch import nn
from torch.func import functional_call, jacrev, vmap

from singd import SINGD, sample_labels

OPTIONS = {**PLAIN, **FAST, "rule": "kfac"}  # after one step U and G are those of the batch
LAYERS = ("0", "2", "4")


def gaussian_loss(output, y):
    """-log N(y; output, 1), a mean over the batch."""
    return 0.5 * (output - y).square().sum(1).mean()


LOSSES = {"softmax": nn.functional.cross_entropy, "gaussian": gaussian_loss}


def exact_fisher(model, x, layer, likelihood):
    """J^T H J of one sample, with the Jacobian J of the outputs by the weights, by torch.func; [numel, numel]."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    name = f"{layer}.weight"

    def outputs(W):
        return functional_call(model, {**params, name: W}, (x[None],))[0]

    J = jacrev(outputs)(params[name]).flatten(1)
    p = outputs(params[name]).softmax(0)
    H = torch.diag(p) - torch.outer(p, p) if likelihood == "softmax" else torch.eye(len(p)).double()
    return J.T @ H @ J


def collected(model, x, y, likelihood):
    """G (x) U of every layer, without the bias, from one backward pass on given labels."""
    optimizer = SINGD(model, **{**OPTIONS, "lr": 0.0})
    LOSSES[likelihood](model(x), y).backward()
    optimizer.step()
    optimizer.detach()
    found = {}
    for layer in LAYERS:
        d_in = model[int(layer)].in_features
        factors = optimizer.factors(layer)
        found[layer] = torch.kron(factors.G.dense(), factors.U.dense()[:d_in, :d_in])
    return found


# -- it is the Fisher matrix -------------------------------------------------------------------------


def test_all_labels_by_their_probabilities_are_the_exact_fisher():
    """What sampling estimates, without sampling: one sample, where a Kronecker product is exact."""
    model, ((x, _), *_) = model_and_batches("mlp", batch=1)
    probabilities = model(x).detach().softmax(1)[0]
    parts = [
        (p, collected(model, x, torch.tensor([y]), "softmax")) for y, p in enumerate(probabilities)
    ]
    for layer in LAYERS:
        exact = exact_fisher(model, x[0], layer, "softmax")
        mean = sum(p * found[layer] for p, found in parts)
        torch.testing.assert_close(mean, exact, rtol=0, atol=1e-13)
        assert (
            parts[0][1][layer] - exact
        ).norm() > 0.1 * exact.norm()  # one label is another matrix


@pytest.mark.parametrize("likelihood", LOSSES)
def test_sampled_labels_are_unbiased(likelihood):
    """40,000 draws for one input in one batch: the error is that of chance, about 1 / sqrt(draws)."""
    model, ((x, _), *_) = model_and_batches("mlp", batch=1)
    errors = {}
    for draws in (400, 40_000):
        many = x.expand(draws, -1)
        y = sample_labels(model(many), likelihood, generator=torch.Generator().manual_seed(0))
        found = collected(model, many, y, likelihood)
        for layer in LAYERS:
            exact = exact_fisher(model, x[0], layer, likelihood)
            errors[draws, layer] = ((found[layer] - exact).norm() / exact.norm()).item()
    for layer in LAYERS:
        assert errors[40_000, layer] < 4 / 40_000**0.5
        assert errors[40_000, layer] < 0.5 * errors[400, layer]


@pytest.mark.parametrize("likelihood", LOSSES)
def test_over_a_batch_G_is_the_mean_of_the_exact_ones(likelihood):
    """KFAC's output factor: the Fisher matrix of the layer's outputs, averaged over inputs."""
    model, ((x, _), *_) = model_and_batches("mlp", batch=6)
    optimizer = SINGD(model, **{**OPTIONS, "lr": 0.0})
    many = x.repeat(5000, 1)
    y = sample_labels(model(many), likelihood, generator=torch.Generator().manual_seed(0))
    LOSSES[likelihood](model(many), y).backward()
    optimizer.step()
    tail = model[1:]
    J = vmap(jacrev(tail))(model[0](x).detach())  # of the outputs by those of the first layer
    p = model(x).detach().softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    H = H if likelihood == "softmax" else torch.eye(3).double().expand(6, 3, 3)
    exact = (J.mT @ H @ J).mean(0)
    assert (optimizer.factors("0").G.dense() - exact).norm() < 0.03 * exact.norm()


def test_labels_of_the_data_are_another_matrix():
    """The empirical Fisher of a model that is sure and wrong is far larger than the Fisher."""
    model, ((x, _), *_) = model_and_batches("mlp", batch=1)
    nn.init.zeros_(model[4].weight)
    with torch.no_grad():
        model[4].bias.copy_(torch.tensor([5.0, 0.0, 0.0]))
    exact = exact_fisher(model, x[0], "4", "softmax")
    empirical = collected(model, x, torch.tensor([2]), "softmax")["4"]
    assert empirical.norm() > 50 * exact.norm()


# -- the order of calls --------------------------------------------------------------------------------


def step(model, optimizer, x, y, clear=None, collect=False):
    """One step of the Monte-Carlo Fisher, as its page has it."""
    (clear or optimizer.zero_grad)()
    output = model(x)
    nn.functional.cross_entropy(output, sample_labels(output), reduction="mean").backward()
    (clear or optimizer.zero_grad)()
    with optimizer.collecting(collect):
        nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("cleared_by", ["optimizer", "model"])
def test_collecting_false_keeps_the_curvature_and_changes_the_gradient(cleared_by):
    """Factors are those of the sampled labels, the step is that of the data's."""
    model, ((x, y), *_) = model_and_batches("mlp", batch=8)
    optimizer = SINGD(model, **OPTIONS)
    clear = {"optimizer": optimizer.zero_grad, "model": model.zero_grad}[cleared_by]
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, x, y, clear)

    other, _ = model_and_batches("mlp", batch=8)
    torch.manual_seed(3)
    reference = SINGD(other, **{**OPTIONS, "lr": 0.0})
    output = other(x)
    nn.functional.cross_entropy(output, sample_labels(output)).backward()
    reference.step()
    for layer in LAYERS:
        for A, B in zip(optimizer.factors(layer), reference.factors(layer), strict=True):
            torch.testing.assert_close(A.dense(), B.dense(), rtol=0, atol=1e-14)
    other.zero_grad()
    nn.functional.cross_entropy(other(x), y).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cleared_by", ["optimizer", "model"])
def test_the_obvious_order_warns_once(cleared_by):
    model, batches = model_and_batches("mlp", batch=8)
    optimizer = SINGD(model, **OPTIONS)
    clear = {"optimizer": optimizer.zero_grad, "model": model.zero_grad}[cleared_by]

    def loop():
        for x, y in batches:
            step(model, optimizer, x, y, clear, collect=True)

    with pytest.warns(UserWarning, match=r"labels were cleared.*collecting\(False\)") as seen:
        loop()
    assert len(seen) == 1 and seen[0].filename == __file__


def test_statistics_add_up_where_nothing_is_cleared():
    """Both backward passes count then, as two micro-batches would; nobody is warned."""
    model, ((x, y), *_) = model_and_batches("mlp", batch=8)
    optimizer = SINGD(model, **{**OPTIONS, "lr": 0.0})
    nn.functional.cross_entropy(model(x), sample_labels(model(x))).backward()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.factors("0").U.dense()[-1, -1] == 1.0


def test_collecting_ends_with_its_block():
    model, ((x, y), *_) = model_and_batches("mlp", batch=8)
    optimizer = SINGD(model, **OPTIONS)

    def fails():
        with optimizer.collecting(False):
            with optimizer.collecting(True):
                nn.functional.cross_entropy(model(x), y).backward()
            assert len(optimizer._collector.statistics) == 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.factors("0").U.dense().any()


def test_without_any_statistics_the_factors_stay():
    model, ((x, y), *_) = model_and_batches("mlp", batch=8)
    optimizer = SINGD(model, **OPTIONS)
    with optimizer.collecting(False):
        nn.functional.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="its forward and backward were not seen") as seen:
        optimizer.step()
    assert {w.filename for w in seen} == {__file__}
    assert not optimizer.factors("0").U.dense().any()


ORDINARY = {
    "plain": lambda model, optimizer, x, y: None,
    "labels for a report": lambda model, optimizer, x, y: sample_labels(model(x)),
    "a backward that is thrown away": lambda model, optimizer, x, y: (
        nn.functional.cross_entropy(model(x), y).backward(),
        optimizer.zero_grad(),
    ),
}


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("before", ORDINARY)
def test_ordinary_loops_warn_of_nothing(before, T):
    model, batches = model_and_batches("mlp")
    optimizer = SINGD(model, **{**OPTIONS, "T": T})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in batches:
            ORDINARY[before](model, optimizer, x, y)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


def test_the_right_order_warns_of_nothing_at_any_T():
    for T in (1, 2, 5):
        model, batches = model_and_batches("mlp")
        optimizer = SINGD(model, **{**OPTIONS, "T": T})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for x, y in batches:
                step(model, optimizer, x, y)


# -- sample_labels ---------------------------------------------------------------------------------------


def test_classes_come_as_often_as_the_model_says():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    y = sample_labels(p.log().expand(20_000, 2, 4), generator=torch.Generator().manual_seed(0))
    assert y.shape == (20_000, 2) and y.dtype == torch.int64
    found = torch.bincount(y.flatten(), minlength=4) / 40_000
    assert ((found - p).abs() < 4 * (p * (1 - p) / 40_000).sqrt()).all()


@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_gaussian_targets_lie_around_the_outputs(variance):
    f = torch.randn(40_000, 2, dtype=torch.float64)
    y = sample_labels(f, "gaussian", variance=variance, generator=torch.Generator().manual_seed(0))
    assert y.shape == f.shape and y.dtype == f.dtype
    noise = y - f
    assert noise.mean().abs() < 4 * (variance / 80_000) ** 0.5
    assert abs(noise.var() / variance - 1) < 4 * (2 / 80_000) ** 0.5


@pytest.mark.parametrize("likelihood", LOSSES)
def test_a_generator_says_which_labels(likelihood):
    f = torch.randn(50, 10)
    a, b, c = (
        sample_labels(f, likelihood, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not a.requires_grad


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_leading_shape_and_dtype(shape, dtype):
    f = torch.randn(shape).to(dtype).requires_grad_()
    y = sample_labels(f)
    assert y.shape == shape[:-1] and y.dtype == torch.int64 and not y.requires_grad
    assert sample_labels(f, "gaussian").dtype == dtype


def test_errors():
    with pytest.raises(
        ValueError, match="^likelihood must be one of 'softmax', 'gaussian', got 'poisson'.$"
    ):
        sample_labels(torch.zeros(2, 3), "poisson")
    with pytest.raises(
        ValueError, match=r"^outputs must have classes in the last dimension, got shape \(\).$"
    ):
        sample_labels(torch.tensor(1.0))
    with pytest.raises(ValueError, match="^variance must be a finite number >= 0, got -1.0.$"):
        sample_labels(torch.zeros(2, 3), "gaussian", variance=-1.0)
