"""The seam: rules by name and by object, rules of users, and refusals in one sentence."""

import copy
from types import MappingProxyType

import pytest
import torch
from models import assert_same, model_and_batches, train
from rule_runs import FAST, PLAIN
from torch import nn

from singd import PUBLISHED, SINGD, Rule, register_rule, rules
from singd.rules import find_rule, registered_rules


def run(**options):
    model, batches = model_and_batches("mlp", steps=4)
    optimizer = SINGD(model, **{**PLAIN, **FAST, **options})
    train(model, optimizer, batches)
    return model, optimizer


@pytest.mark.parametrize(
    "name, rule",
    [
        ("singd", rules.Singd),
        ("ikfac", rules.Ikfac),
        ("kfac", rules.Kfac),
        ("shampoo", rules.Shampoo),
    ],
)
def test_a_name_is_an_object(name, rule):
    assert type(find_rule(name)) is rule and find_rule(name).name == name
    assert_same(*run(rule=name), *run(rule=rule()))


def test_kfac_like_is_ikfac():
    assert_same(*run(rule="ikfac"), *run(kfac_like=True))
    assert_same(*run(rule="ikfac"), *run(kfac_like=True, rule="ikfac"))


@pytest.mark.parametrize("rule", ["kfac", "shampoo"])
def test_kfac_like_beside_another_rule_is_refused(rule):
    said = f"kfac_like=True means rule='ikfac', but rule is '{rule}'; give one of them."
    with pytest.raises(ValueError) as refused:
        SINGD(nn.Linear(2, 2), rule=rule, kfac_like=True)
    assert str(refused.value) == said


def test_unknown_rules_are_refused_with_the_choices():
    with pytest.raises(
        ValueError, match=r"^Unknown rule 'kfca'; choose from 'singd', 'ikfac', .*\.$"
    ):
        SINGD(nn.Linear(2, 2), rule="kfca")
    with pytest.raises(
        TypeError, match="rule must be a name or an object of a Rule class, got <class"
    ):
        SINGD(nn.Linear(2, 2), rule=rules.Kfac)
    with pytest.raises(ValueError, match="Unknown rule"):
        SINGD(nn.Linear(2, 2)).add_param_group({"params": [], "rule": "kfca"})


class Plain(Rule):
    """Gradient descent, as a rule that keeps nothing."""

    name = "plain"
    needs_rows = False

    def gradient_curvature(self, factors, dW):
        return rules.Curvature(None, None)

    def update(self, factors, curvature, options, updates):
        return {}

    def sides(self, factors):
        raise AssertionError("direction needs none")

    def prepare(self, factors, keep):
        return None

    def direction(self, prepared, dW, *, overwrite=False):
        return dW


def test_a_rule_that_keeps_nothing_is_sgd():
    model, batches = model_and_batches("mlp")
    twin = copy.deepcopy(model)
    train(model, optimizer := SINGD(model, lr=0.1, **{**PLAIN, "rule": Plain()}), batches)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)
    assert optimizer.factors("0") == ()


def test_register_rule():
    mine = rules.Kfac(pi=False)
    register_rule("kfac-without-pi", mine)
    register_rule("kfac-without-pi", mine)  # as a notebook's cell does that is run twice
    assert registered_rules()["kfac-without-pi"] is find_rule("kfac-without-pi") is mine
    assert_same(*run(rule="kfac-without-pi"), *run(rule=mine))
    with pytest.raises(ValueError, match="rule name 'kfac' is taken; choose another one"):
        register_rule("kfac", rules.Kfac(pi=False))
    with pytest.raises(TypeError, match="rule must be an object of a Rule class, got <class"):
        register_rule("other", rules.Kfac)
    registered_rules().clear()  # a copy
    assert "singd" in registered_rules()
    rules._REGISTRY.pop("kfac-without-pi")


@pytest.mark.parametrize(
    "structures",
    [("dense", "triutoeplitz"), ("hierarchical3_2", "dense"), ("triurank4first", "diagonal")],
)
def test_kfac_refuses_structures_that_have_no_inverse_of_their_own(structures):
    bad = next(s for s in structures if s not in ("dense", "diagonal"))
    said = (
        "The rule 'kfac' works with dense, diagonal and block-diagonal structures only, got the "
        f"structure '{bad}'."
    )
    with pytest.raises(ValueError) as refused:
        SINGD(nn.Linear(2, 2), rule="kfac", structures=structures)
    assert str(refused.value) == said
    optimizer = SINGD(nn.Linear(2, 2), rule="kfac", structures=("dense", "block4diagonal"))
    assert "block4diagonal" in repr(optimizer)


def test_published_is_the_published_method():
    assert isinstance(PUBLISHED, MappingProxyType)
    assert {k: PUBLISHED[k] for k in PLAIN if k in PUBLISHED} == {k: PLAIN[k] for k in PLAIN}
    rest = {k: v for k, v in PUBLISHED.items() if k not in PLAIN}
    assert (rest["rule"], rest["T"], rest["damping"], rest["lr_cov"]) == ("singd", 10, 1e-3, 1e-2)
    SINGD(nn.Linear(2, 2), **{**PUBLISHED, "lr": 0.1})
