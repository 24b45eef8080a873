"""Checkpoints: torch's hooks see all of them, and what cannot be trained on is refused as a whole."""

import copy
import functools
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
from published import FAST, PUBLISHED
from torch import nn

from singd import SINGD
from singd.rules import Kfac, Singd
from singd.structures import BlockDiagonal, Dense, Diagonal

F64 = torch.float64
ROOT = pathlib.Path(__file__).parents[2]


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4)).to(F64)


def run(model, optimizer, steps=2):
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 4, dtype=F64)).square().mean().backward()
        optimizer.step()


def trained(model=None, **options):
    torch.manual_seed(0)
    model = model or mlp()
    optimizer = SINGD(model, **{**FAST, **options})
    run(model, optimizer)
    return model, optimizer


def dense(optimizer, name):
    return [f.dense() for f in optimizer.factors(name)]


# -- torch's hooks -----------------------------------------------------------------------------------


def test_hooks_see_the_factors():
    _, optimizer = trained()
    seen = {}

    def before(optimizer, state_dict):
        seen["before"] = set(state_dict["state"][0])

    def after(optimizer):
        first = optimizer.param_groups[0]["params"][0]
        seen["after"] = {k: torch.as_tensor(v).clone() for k, v in optimizer.state[first].items()}

    model = mlp()
    other = SINGD(model, **FAST)
    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(after)
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    assert {"K", "C", "m_K", "m_C"} <= seen["before"]
    for key, value in saved["state"][0].items():
        assert torch.equal(seen["after"][key], torch.as_tensor(value)), key


def test_a_hook_that_changes_a_factor_is_heard():
    _, optimizer = trained()

    def double(optimizer, state_dict):
        state = {
            i: {k: 2 * v if k == "K" else v for k, v in entry.items()}
            for i, entry in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    other = SINGD(mlp(), **FAST)
    other.register_load_state_dict_pre_hook(double)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(dense(other, "0")[0], 2 * dense(optimizer, "0")[0])


def by_name(optimizer, state_dict):
    """Match parameters by name, as the example in torch's documentation of these hooks does."""
    saved, mine = state_dict["param_groups"], optimizer.state_dict()["param_groups"]
    index_of = {n: i for g in saved for n, i in zip(g["param_names"], g["params"], strict=True)}
    state = {
        i: state_dict["state"][index_of[n]]
        for g in mine
        for n, i in zip(g["param_names"], g["params"], strict=True)
    }
    groups = [
        {**s, "params": g["params"], "param_names": g["param_names"]}
        for s, g in zip(saved, mine, strict=True)
    ]
    return {"state": state, "param_groups": groups}


def test_a_hook_that_matches_parameters_by_name():
    model = mlp()
    _, optimizer = trained(model, params=list(model[:3].named_parameters()))
    twin = mlp()
    other = SINGD(twin, list(reversed(list(twin[:3].named_parameters()))), **FAST)
    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    for name in ("0", "2"):
        for a, b in zip(dense(optimizer, name), dense(other, name), strict=True):
            assert torch.equal(a, b)


# -- what is refused ---------------------------------------------------------------------------------


def with_state(key, change, of=0):
    def apply(saved):
        saved["state"][of][key] = change(saved["state"][of][key])

    return apply


NORM = 4
"""The place of a parameter that AdamW trains, behind two layers."""


def without(key, of):
    return lambda saved: saved["state"][of].pop(key)


def with_option(name, value):
    def apply(saved):
        saved["param_groups"][0][name] = value

    return apply


WRONG = {
    "a factor of integers": with_state("K", lambda K: K.long()),
    "a complex factor": with_state("K", lambda K: K.to(torch.complex128)),
    "a factor of another shape": with_state("K", lambda K: K.view(5, 5)),
    "a factor that is no tensor": with_state("K", lambda K: K.tolist()),
    "a factor with a nan": with_state("m_C", lambda m: m.clone().fill_(torch.nan)),
    "a factor with an inf": with_state("C", lambda C: C.clone().fill_(torch.inf)),
    "a factor without data": with_state("K", lambda K: K.to("meta")),
    "a momentum without data": with_state("momentum_buffer", lambda m: m.to("meta")),
    "a sparse factor": with_state("K", lambda K: K.to_sparse()),
    "a step that is no count": with_state("step", lambda step: -3),
    "a step that is text": with_state("step", lambda step: "three"),
    "a step that is a switch": with_state("step", lambda step: True),
    "AdamW's step that is nan": with_state("step", lambda step: step * torch.nan, NORM),
    "AdamW's step that is no count": with_state("step", lambda step: step * 0 - 1, NORM),
    "AdamW's step that is two": with_state("step", lambda step: torch.stack([step, step]), NORM),
    "AdamW's step without data": with_state("step", lambda step: step.to("meta"), NORM),
    "AdamW's step that is nothing": with_state("step", lambda step: None, NORM),
    "AdamW's step that is lost": without("step", NORM),
    "an average without the other": without("exp_avg_sq", NORM),
    "the other average alone": without("exp_avg", NORM),
    "a sparse average": with_state("exp_avg", lambda t: t.to_sparse(), NORM),
    "an unknown option": with_option("dampening_of_old", 0.1),
    "an option that cannot be": with_option("T", 0),
    "a format that is no number": with_option("format", "new"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_that_cannot_be_trained_on_is_refused_as_a_whole(name):
    _, optimizer = trained()
    saved = optimizer.state_dict()
    WRONG[name](saved)
    model, other = trained(lr=0.05)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError) as raised:
        other.load_state_dict(saved)
    assert "\n" not in str(raised.value)
    after = other.state_dict()
    assert str(after) == str(before)
    run(model, other)


def test_adamws_steps_of_another_optimizer_are_read():
    """torch keeps them as tensors, and older versions of it as numbers."""
    _, optimizer = trained()
    for kind in (
        torch.as_tensor,
        float,
        int,
        lambda step: step.reshape(1),
        lambda step: step.double(),
    ):
        saved = optimizer.state_dict()
        with_state("step", kind, NORM)(saved)
        model, other = trained()
        other.load_state_dict(saved)
        run(model, other)


def test_a_complex_parameter_resumes():
    """AdamW trains it, with averages that are complex too."""

    def build():
        torch.manual_seed(0)
        model = nn.ParameterList([torch.randn(2, 2, dtype=torch.complex128)])
        return model, SINGD(model, **FAST)

    def step(model, optimizer):
        optimizer.zero_grad()
        model[0].abs().square().sum().backward()
        optimizer.step()

    (model, optimizer), (twin, other) = build(), build()
    step(model, optimizer)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    step(model, optimizer)
    step(twin, other)
    assert torch.equal(model[0], twin[0])
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"] * torch.nan
    with pytest.raises(ValueError, match="exp_avg"):
        other.load_state_dict(saved)


def test_a_default_device_is_not_where_the_steps_are_counted():
    """Of what AdamW keeps, only the averages are on the parameter's device."""
    model = mlp()
    optimizer = SINGD(model, **FAST)
    with torch.device("meta"):
        optimizer.zero_grad()
        model(torch.ones(8, 4, dtype=F64, device="cpu")).square().mean().backward()
        optimizer.step()
    trained()[1].load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("bad", [{}, {"state": {}}, [], None], ids=str)
def test_what_is_no_checkpoint_is_refused(bad):
    _, optimizer = trained()
    with pytest.raises((TypeError, ValueError), match="state_dict|checkpoint"):
        optimizer.load_state_dict(bad)


# -- structures without a name -----------------------------------------------------------------------


def blocks(n, k, **kw):
    return BlockDiagonal.eye(n, k=k, **kw)


RESUME = """
import functools, sys, torch
from torch import nn
from singd import SINGD
from singd.rules import Kfac, Singd
from singd.structures import BlockDiagonal
def blocks(n, k, **kw):
    return BlockDiagonal.eye(n, k=k, **kw)
model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4)).double()
optimizer = SINGD(model, structures=(functools.partial(blocks, k=2), "dense"))
saved = torch.load(sys.argv[1], weights_only=True)
optimizer.load_state_dict(saved["optimizer"])
assert torch.equal(optimizer.factors("0").K.dense(), saved["K"])
"""


def test_a_partial_resumes_in_a_new_process(tmp_path):
    _, optimizer = trained(structures=(functools.partial(blocks, k=2), "dense"))
    path = tmp_path / "checkpoint.pt"
    torch.save({"optimizer": optimizer.state_dict(), "K": dense(optimizer, "0")[0]}, path)
    subprocess.run(
        [sys.executable, "-c", RESUME, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=True,
    )


def test_a_partial_does_not_load_into_another_one():
    _, optimizer = trained(structures=(functools.partial(blocks, k=2), "dense"))
    _, other = trained(structures=(functools.partial(blocks, k=1), "dense"))
    with pytest.raises(ValueError, match="structures"):
        other.load_state_dict(optimizer.state_dict())


def test_a_lambda_is_refused_because_nobody_could_tell_it_from_another_one():
    for make in (lambda n, **kw: Dense.eye(n, **kw), lambda n, **kw: Diagonal.eye(n, **kw)):
        with pytest.raises(ValueError, match="register_structure"):
            SINGD(mlp(), **{**FAST, "structures": (make, "dense")})


# -- found by the net of lives ------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_group_that_a_copy_was_given_is_in_a_checkpoint_that_loads(copied):
    """torch adds an option of its own to the defaults of every copy, which our checkpoints would not know."""

    def build():
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        return model, SINGD(model, model[0].parameters(), **PUBLISHED)

    model, optimizer = copied(build())
    optimizer.add_param_group({"params": model[1].parameters()})
    model, other = build()
    other.add_param_group({"params": model[1].parameters()})
    other.load_state_dict(optimizer.state_dict())


class Slow(Singd):
    """A user's rule with an argument that must be given."""

    name = "slow"

    def __init__(self, factor):
        self.factor = factor


@pytest.mark.parametrize(
    ("saved", "own"),
    [(Kfac(), Kfac(pi=False)), (Kfac(pi=False), Kfac()), ("kfac", Kfac(pi=False)), (Slow(2), Slow(3))],
)  # fmt: skip
def test_a_rule_with_other_options_is_another_rule(saved, own):
    def build(rule):
        return SINGD(mlp(), **{**FAST, "rule": rule, "structures": ("dense", "dense")})

    state = build(saved).state_dict()
    with pytest.raises(ValueError, match=r"rule '(kfac|slow).*but this optimizer has '(kfac|slow)"):
        build(own).load_state_dict(state)
    build(saved).load_state_dict(state)
