"""The optimizer equals the textbook algorithm, for every option and every structure, to 1e-10 in float64."""

import copy

import oracle
import pytest
import torch
from models import MODELS, model_and_batches, train
from published import SINGD
from torch import nn

from singd import registered_structures

FAST = dict(lr=0.05, lr_cov=0.2, T=1, damping=0.1)
OPTIONS = [
    dict(),
    dict(alpha1=0.0),
    dict(T=2),
    dict(momentum=0.0),
    dict(weight_decay=0.1),
    dict(kfac_like=True),
    dict(normalize_lr_cov=True, lr_cov=1.0),
    dict(lr_cov=lambda step: 0.3 / (1 + step)),
    dict(loss_average=None),
    dict(loss_average="batch+sequence"),
    dict(kfac_approx="reduce"),
    dict(kfac_approx="reduce", loss_average="batch+sequence", normalize_lr_cov=True),
    dict(damping=1e-3, lr_cov=0.05, structures=("block3diagonal", "diagonal")),
]


def both(name, options, steps=6):
    model, batches = model_and_batches(name, steps=steps)
    twin = copy.deepcopy(model)
    loss = nn.functional.cross_entropy
    if options.get("loss_average", "batch") is None:

        def loss(output, target):
            return nn.functional.cross_entropy(output, target, reduction="sum") / 10

    optimizer = SINGD(model, **options)
    train(model, optimizer, batches, loss)
    states = oracle.train(twin, batches, loss, **options)
    return model, optimizer, twin, states


def assert_same(model, optimizer, twin, states):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
    layers = dict(zip(twin.modules(), model.modules(), strict=True))
    for layer, state in states.items():
        factors = optimizer.factors(layers[layer])
        for key in factors._fields:
            torch.testing.assert_close(
                getattr(factors, key).dense(), state[key], rtol=0, atol=1e-10
            )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "defaults")
def test_options(name, options):
    run = both(name, {**FAST, **options})
    assert_same(*run)
    K = next(iter(run[3].values()))["K"]
    assert not torch.allclose(K, torch.eye(len(K)).to(K), atol=1e-3)  # the factors did move


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("structure", registered_structures())
def test_structures(name, structure):
    assert_same(*both(name, {**FAST, "structures": (structure, structure)}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("structures", [("hierarchical1_2", "triltoeplitz"), ("diagonal", "dense")])
def test_structures_mixed_per_side(name, structures):
    assert_same(*both(name, {**FAST, "structures": structures}))


def test_defaults_are_the_papers():
    model, batches = model_and_batches("mlp", steps=12)
    twin = copy.deepcopy(model)
    train(model, optimizer := SINGD(model), batches)
    assert_same(model, optimizer, twin, oracle.train(twin, batches, nn.functional.cross_entropy))
