"""Bad input: one clear sentence with the name, the value and the choices; nothing changes."""

import copy
import math

import pytest
import torch
from models import mlp, model_and_batches, train
from published import SINGD
from torch import nn

BAD = [
    (dict(lr=-1.0), ValueError, "lr must be a finite number >= 0, got -1.0."),
    (dict(lr=math.nan), ValueError, "lr must be a finite number >= 0, got nan."),
    (dict(lr="0.1"), TypeError, "lr must be a finite number >= 0, got '0.1'."),
    (dict(momentum=-0.1), ValueError, "momentum must be a finite number >= 0, got -0.1."),
    (dict(damping=-1e-3), ValueError, "damping must be a finite number >= 0, got -0.001."),
    (dict(damping=math.inf), ValueError, "damping must be a finite number >= 0, got inf."),
    (dict(alpha1=None), TypeError, "alpha1 must be a finite number >= 0, got None."),
    (dict(weight_decay=True), TypeError, "weight_decay must be a finite number >= 0, got True."),
    (dict(lr_cov=-0.1), ValueError, "lr_cov must be a finite number >= 0, got -0.1."),
    (dict(lr_cov="fast"), TypeError, "lr_cov must be a finite number >= 0, got 'fast'."),
    (dict(T=0), ValueError, "T must be an integer >= 1, got 0."),
    (dict(T=2.5), TypeError, "T must be an integer >= 1, got 2.5."),
    (
        dict(loss_average="mean"),
        ValueError,
        "loss_average must be one of None, 'batch', 'batch+sequence', got 'mean'.",
    ),
    (
        dict(kfac_approx="expan"),
        ValueError,
        "kfac_approx must be one of 'expand', 'reduce', got 'expan'.",
    ),
    (dict(kfac_like=1), TypeError, "kfac_like must be True or False, got 1."),
    (
        dict(normalize_lr_cov="no"),
        ValueError,
        "normalize_lr_cov must be one of False, True, 'spectral', got 'no'.",
    ),
    (
        dict(structures=("dense",)),
        ValueError,
        "structures must be a pair (for K, for C), got ('dense',).",
    ),
    (
        dict(structures="dense"),
        ValueError,
        "structures must be a pair (for K, for C), got 'dense'.",
    ),
    (
        dict(structures=("blok30", "dense")),
        ValueError,
        "Unknown structure 'blok30'; choose from dense, diagonal",
    ),
    (
        dict(preconditioner_dtype="bf16"),
        ValueError,
        "preconditioner_dtype must be None, a floating-point",
    ),
    (
        dict(preconditioner_dtype=torch.int32),
        ValueError,
        "preconditioner_dtype must be None, a floating-point",
    ),
    (
        dict(fallback="sgd"),
        TypeError,
        "fallback must be a dict of AdamW options or None, got 'sgd'.",
    ),
    (
        dict(fallback={"beta": 0.9}),
        ValueError,
        "Unknown fallback option 'beta'; choose from lr, betas, eps",
    ),
    (
        dict(fallback={"betas": 0.9}),
        ValueError,
        "betas must be a pair of numbers in [0, 1), got 0.9.",
    ),
    (
        dict(fallback={"betas": (0.9, 1.0)}),
        ValueError,
        "betas must be a number in [0, 1), got 1.0.",
    ),
]


@pytest.mark.parametrize(
    "options, error, sentence", BAD, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_options_are_checked_at_construction(options, error, sentence):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error) as raised:
        SINGD(model, **options)
    assert str(raised.value).startswith(sentence)
    assert "\n" not in str(raised.value)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("options, error, sentence", [b for b in BAD if "fallback" not in b[0]])
def test_options_are_checked_in_groups(options, error, sentence):
    model = mlp()
    optimizer = SINGD(model, params=model[0].parameters())
    with pytest.raises(error) as raised:
        optimizer.add_param_group({"params": model[2].parameters(), **options})
    assert str(raised.value).startswith(sentence)
    assert len(optimizer.param_groups) == 1
    assert not model[2]._forward_hooks


def test_a_parameter_of_another_model():
    stranger = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(
        ValueError, match=r"A parameter of shape \(3, 4\) isn't one of the model's."
    ):
        SINGD(mlp(), params=[stranger])


def test_no_model():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got"):
        SINGD([nn.Parameter(torch.zeros(1))])


def test_unsupported_parameters_without_a_fallback():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.warns(UserWarning, match="no supported layer: 1.weight, 1.bias"):
        optimizer = SINGD(model, fallback=None)
    assert [p.shape for g in optimizer.param_groups for p in g["params"]] == [(3, 3), (3,)]
    with pytest.raises(ValueError, match="can't precondition 1.weight, 1.bias, and fallback=None"):
        SINGD(model, params=model.parameters(), fallback=None)


def test_a_lazy_layer():
    with pytest.raises(
        ValueError, match="The lazy layer '0' has no sizes yet; call the model once"
    ):
        SINGD(nn.Sequential(nn.LazyLinear(3)))


def test_an_input_that_does_not_fit_is_the_layers_own_error_and_harmless():
    model, batches = model_and_batches("mlp", steps=2)
    optimizer = SINGD(model, T=1)
    train(model, optimizer, batches)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 99, dtype=torch.float64))
    after = optimizer.state_dict()["state"]
    assert all(
        torch.equal(torch.as_tensor(after[i][k]), torch.as_tensor(v))
        for i, s in before.items()
        for k, v in s.items()
    )


def test_a_bad_value_of_a_schedule_is_named_and_changes_nothing():
    model, batches = model_and_batches("mlp", steps=2)
    optimizer = SINGD(model, T=1, lr_cov=lambda step: 0.1 if step == 0 else -1.0)
    train(model, optimizer, batches[:1])
    before, weights = (
        copy.deepcopy(optimizer.state_dict()["state"]),
        copy.deepcopy(model.state_dict()),
    )
    with pytest.raises(ValueError, match=r"lr_cov\(1\) must be a finite number >= 0, got -1.0."):
        train(model, optimizer, batches[1:])
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(
        torch.equal(torch.as_tensor(after[i][k]), torch.as_tensor(v))
        for i, s in before.items()
        for k, v in s.items()
    )


def test_a_bad_value_of_a_later_groups_schedule_changes_no_earlier_group():
    model, batches = model_and_batches("mlp", steps=2)
    optimizer = SINGD(
        model,
        [
            {"params": model[0].parameters(), "lr_cov": 0.1},
            {"params": model[4].parameters(), "lr_cov": lambda step: -1.0 if step else 0.1},
        ],
        T=1,
    )
    train(model, optimizer, batches[:1])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=r"lr_cov\(1\) must be a finite number >= 0, got -1.0."):
        train(model, optimizer, batches[1:])
    after = optimizer.state_dict()["state"]
    assert all(
        torch.equal(torch.as_tensor(after[i][k]), torch.as_tensor(v))
        for i, s in before.items()
        for k, v in s.items()
    )


def test_layer_that_is_not_preconditioned():
    with pytest.raises(
        ValueError, match="SINGD doesn't precondition layer 'x'; choose from '0', '2', '4'."
    ):
        SINGD(mlp()).factors("x")
