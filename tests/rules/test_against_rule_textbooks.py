"""Every rule equals its own textbook in float64, in every structure that it claims and with every option it reads.

The textbooks know nothing of the optimizer: dense matrices, masks, explicit inverses. See ``rule_textbook.py``.
"""

import pytest
from models import MODELS
from rule_runs import RULES, beside_the_textbook, structures_of

TOLERANCE = 1e-10
OPTIONS = [
    dict(T=3),
    dict(T=lambda step: 1 if step < 2 else 2),
    dict(momentum=0.0),
    dict(weight_decay=0.1),
    dict(loss_average=None),
    dict(loss_average="batch+sequence"),
    dict(kfac_approx="reduce"),
    dict(structures=("block3diagonal", "diagonal")),
    dict(momentum_on="gradient"),
    dict(momentum_on="gradient", nesterov=True, match_rms=0.2, weight_decay=0.01),
    dict(nesterov=True),
    dict(match_rms=0.2),
]
INVERSE_FREE = [
    dict(alpha1=0.0),
    dict(normalize_lr_cov=True, lr_cov=1.0),
    dict(scaled_start=True),
    dict(fast_start=True),
    dict(relative_damping=True),
    dict(
        scaled_start=True,
        fast_start=True,
        relative_damping=True,
        structures=("block2diagonal", "dense"),
        normalize_lr_cov=True,
        match_rms=0.2,
    ),
]


def label(options):
    return "-".join(options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", RULES)
def test_models(rule, name):
    assert beside_the_textbook(rule, name) < TOLERANCE


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@pytest.mark.parametrize("rule", RULES)
def test_options(rule, options):
    assert beside_the_textbook(rule, "shared", **options) < TOLERANCE


@pytest.mark.parametrize("options", INVERSE_FREE, ids=label)
@pytest.mark.parametrize("rule", ["singd", "ikfac", "shampoo"])
def test_options_of_factors_that_follow_an_inverse(rule, options):
    assert beside_the_textbook(rule, "mlp", **options) < TOLERANCE


STRUCTURES = [(r, s) for r in ("singd", "ikfac", "kfac", "shampoo") for s in structures_of(r)]


@pytest.mark.parametrize("rule, structure", STRUCTURES)
def test_structures(rule, structure):
    assert beside_the_textbook(rule, "cnn", structures=(structure, structure)) < TOLERANCE
