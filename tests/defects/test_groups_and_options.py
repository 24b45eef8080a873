"""Every parameter that is handed over trains, with the options of its own group."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import FAST
from torch import nn

from singd import SINGD

F64 = torch.float64


class Mixed(nn.Module):
    """Layers that SINGD knows, with and without a bias, a norm, and a loose parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.norm = nn.LayerNorm(9)
        self.first = nn.Linear(9, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.last = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = self.norm(torch.tanh(self.conv(x)).flatten(1))
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x))))) * self.scale


def mixed():
    return Mixed().to(F64)


def batch(n=6):
    return torch.randn(n, 2, 4, dtype=F64), torch.arange(n) % 3


def run(model, optimizer, steps=1):
    for _ in range(steps):
        x, y = batch()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def in_table(optimizer, name):
    """The row of a layer or a parameter."""
    return next(line for line in str(optimizer).splitlines() if line.split(" ")[0] == name)


# -- every parameter trains --------------------------------------------------------------------------


def test_a_bias_whose_weight_is_adamws_trains_and_the_table_says_with_what():
    model = mixed()
    optimizer = SINGD(
        model,
        [
            {"params": [model.first.weight], "algorithm": "adamw"},
            {"params": [model.first.bias, *model.last.parameters()]},
        ],
        **FAST,
    )
    before = model.first.bias.clone()
    run(model, optimizer)
    assert not torch.equal(model.first.bias, before)
    assert "adamw" in in_table(optimizer, "first.bias")


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([1e-3, 0.1]),
        "algorithm": st.sampled_from(["singd", "adamw"]),
        "T": st.integers(1, 3),
        "momentum": st.sampled_from([0.0, 0.9]),
        "structures": st.sampled_from([("dense", "dense"), ("diagonal", "block2diagonal")]),
        "weight_decay": st.sampled_from([0.0, 0.01]),
    },
)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_parameter_that_was_handed_over_moves(data):
    """For every split of the parameters into groups, given at once or one after the other."""
    torch.manual_seed(0)
    model = mixed()
    names = data.draw(st.permutations([n for n, _ in model.named_parameters()]))
    names = names[: data.draw(st.integers(1, len(names)))]
    params = [model.get_parameter(n) for n in names]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(params) - 1)), max_size=3)))
    parts = [params[a:b] for a, b in itertools.pairwise([0, *cuts, len(params)]) if a < b]
    groups = [{"params": p, **data.draw(OPTIONS)} for p in parts]
    first = data.draw(st.integers(1, len(groups)))
    optimizer = SINGD(model, groups[:first], **FAST)
    for group in groups[first:]:
        optimizer.add_param_group(group)
    before = [p.clone() for p in params]
    run(model, optimizer, steps=2)
    still = [n for n, p, b in zip(names, params, before, strict=True) if torch.equal(p, b)]
    assert not still
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(params)


def test_a_frozen_weights_bias_trains_alike_however_it_was_handed_over():
    """The weight is frozen when SINGD is built: its bias is a loose parameter, which AdamW trains."""
    model = mixed()
    model.first.weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model, **FAST), SINGD(twin, twin.parameters(), **FAST)
    for m, o in ((model, optimizer), (twin, other)):
        torch.manual_seed(1)
        run(m, o, steps=3)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=name)


def test_what_is_taken_out_of_the_groups_stays():
    """As with torch's own optimizers; and it trains on once it is handed over again."""
    model = mixed()
    groups = [{"params": part.parameters()} for part in (model.first, model.last, model.norm)]
    optimizer = SINGD(model, groups, **FAST)
    run(model, optimizer, steps=2)
    group = optimizer.param_groups.pop(0)
    before = copy.deepcopy(model.state_dict())
    run(model, optimizer, steps=2)
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == {"last.weight", "last.bias", "norm.weight", "norm.bias"}
    optimizer.add_param_group({"params": group["params"]})
    run(model, optimizer)
    assert not torch.equal(model.first.weight, before["first.weight"])
    assert optimizer.stats()["first"]["age"] == 0


def test_a_bias_cannot_be_taken_out_alone():
    """It is a column of its layer's matrix; what says so changes nothing."""
    model = mixed()
    optimizer = SINGD(model, **FAST)
    run(model, optimizer)
    group, bias = optimizer.param_groups[0], model.first.bias
    kept = list(group["params"])
    group["params"] = [p for p in kept if p is not bias]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="bias of layer 'first'.*requires_grad_"):
        run(model, optimizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    group["params"] = kept
    bias.requires_grad_(False)  # which the sentence recommends
    bias.grad = None
    run(model, optimizer)
    assert torch.equal(bias, before["first.bias"])
    assert not torch.equal(model.first.weight, before["first.weight"])


# -- a group's own options ---------------------------------------------------------------------------


def test_lr_of_a_group_is_also_that_of_its_norms():
    model = mixed()
    optimizer = SINGD(model, [{"params": model.parameters(), "lr": 0.0}], **FAST)
    before = copy.deepcopy(model.state_dict())
    run(model, optimizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "own",
    [{"lr": 0.02}, {"weight_decay": 0.3}, {"betas": (0.5, 0.6)}, {"eps": 0.1}],
    ids=lambda own: next(iter(own)),
)
def test_what_a_group_says_overrides_the_fallback_for_its_norms(own):
    model = mixed()
    twin = copy.deepcopy(model.norm)
    usual = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    optimizer = SINGD(
        model, [{"params": model.norm.parameters(), **own}], **{**FAST, "fallback": usual}
    )
    adamw = torch.optim.AdamW(twin.parameters(), **{**usual, **own})
    for _ in range(3):
        for p, q in zip(model.norm.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    for p, q in zip(model.norm.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


@pytest.mark.parametrize("bad", [{"betas": (2, 3)}, {"betas": 0.9}, {"eps": -1.0}])
def test_adamws_options_in_a_group_are_checked(bad):
    model = mixed()
    for params in (model.parameters(), model.last.parameters()):  # also where none falls to AdamW
        with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
            SINGD(model, [{"params": params, **bad}], **FAST)


# -- schedules ---------------------------------------------------------------------------------------


def test_one_cycle_turns_the_fallbacks_beta_as_well():
    """As in torch, where the schedule cycles ``momentum`` or the first of ``betas``."""
    norm = nn.LayerNorm(5).to(F64)
    twin = copy.deepcopy(norm)
    optimizer = SINGD(norm, **FAST)
    adamw = torch.optim.AdamW(twin.parameters(), weight_decay=0.0)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10)
        for o in (optimizer, adamw)
    ]
    for _ in range(8):
        for p, q in zip(norm.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for step in (optimizer.step, adamw.step, *(s.step for s in schedules)):
            step()
    for p, q in zip(norm.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


def test_the_update_ratio_is_that_of_the_step_that_was_taken():
    model = mixed()
    optimizer = SINGD(model, **FAST)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(3):
        before = copy.deepcopy(model.second.weight.data)
        run(model, optimizer)
        schedule.step()
    after = model.second.weight.data
    measured = float((after - before).norm() / after.norm())
    assert optimizer.stats()["second"]["update_ratio"] == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("match_rms", [None, 0.2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum_on", ["direction", "gradient"])
def test_the_update_ratio_with_any_momentum(
    momentum_on, nesterov, momentum, weight_decay, match_rms
):
    options = dict(
        momentum_on=momentum_on, nesterov=nesterov, momentum=momentum, weight_decay=weight_decay,
        match_rms=match_rms,
    )  # fmt: skip
    model = mixed()
    optimizer = SINGD(model, **{**FAST, **options})
    for _ in range(3):
        before = copy.deepcopy(model.first)
        run(model, optimizer)
    pairs = list(zip(model.first.parameters(), before.parameters(), strict=True))
    pairs = [(p.detach(), q.detach()) for p, q in pairs]
    step = torch.cat([(p - q).flatten() for p, q in pairs]).norm()
    ratio = float(step / torch.cat([p.flatten() for p, _ in pairs]).norm())
    assert optimizer.stats()["first"]["update_ratio"] == pytest.approx(ratio, rel=1e-9)
    optimizer.zero_grad()
    known = momentum_on == "direction" and momentum and not nesterov
    assert math.isnan(optimizer.stats()["first"]["update_ratio"]) != known
