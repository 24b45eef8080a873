"""What holds for every rule that is registered: micro-batches, checkpoints, copies, what it shows of itself.

A rule of a user, which keeps one factor of one side, is registered here and obeys them as well.
"""

import copy
import io
import pickle

import pytest
import torch
from models import assert_same, model_and_batches, train
from rule_runs import FAST, PLAIN
from small import build
from small import train as train_small
from torch import nn

from singd import SINGD, Rule, register_rule
from singd.rules import INPUT, registered_rules


class Whitened(Rule):
    """The inputs' second moment, and one step of Newton towards its inverse; nothing of the outputs."""

    name = "whitened"
    keeps = {"U": INPUT, "X": INPUT}

    def start(self, identity):
        return {"U": identity[INPUT] * 0.0, "X": identity[INPUT] * 1.0}

    def curvature(self, factors, a, g):
        return factors["input"].project_congruence(a), factors["output"].project_congruence(g)

    def update(self, factors, curvature, options, updates):
        beta = 1.0 if updates == 0 else options["lr_cov"]
        U = factors["U"] * (1 - beta) + curvature.H_K * beta
        damped = U.to(dtype=torch.promote_types(U.dtype, torch.float32)).map(torch.clone)
        X = damped.add_identity_(options["damping"]).map(torch.linalg.inv)
        return {"U": U, "X": X.to(dtype=U.dtype)}

    def sides(self, factors):
        return factors["X"], factors["X"]

    def direction(self, prepared, dW, *, overwrite=False):
        return prepared[0].mm(dW.mT.to(prepared[0].dtype)).mT

    def prepare(self, factors, keep):
        return self.sides(factors)


register_rule("whitened", Whitened())
ALL = list(registered_rules())
assert ALL[:4] == ["singd", "ikfac", "kfac", "shampoo"]


def options_of(rule, **options):
    return {**PLAIN, **FAST, "rule": rule, **options}


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def identical(a, b):
    leaves = torch.utils._pytree.tree_leaves
    a, b = leaves(a), leaves(b)
    assert len(a) == len(b) > 5
    return all(
        torch.equal(v, w) if isinstance(v, torch.Tensor) else v == w
        for v, w in zip(a, b, strict=True)
    )


# -- statistics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "shared"])
@pytest.mark.parametrize("rule", ALL)
def test_micro_batches_are_one_batch(rule, name):
    model, batches = model_and_batches(name, batch=6)
    twin = copy.deepcopy(model)
    optimizer, other = (SINGD(m, **options_of(rule, T=2)) for m in (model, twin))
    train(model, optimizer, batches)
    for x, y in batches:
        other.zero_grad()
        for part in (slice(0, 1), slice(1, 6)):
            (nn.functional.cross_entropy(twin(x[part]), y[part]) * len(x[part]) / 6).backward()
        other.step()
    assert_same(model, optimizer, twin, other, atol=1e-11)


@pytest.mark.parametrize("rule", ALL)
def test_hooks_are_there_for_rows_only(rule):
    model, batches = model_and_batches("mlp", steps=1)
    optimizer = SINGD(model, **options_of(rule))
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    assert hooks == (3 if registered_rules()[rule].needs_rows else 0)
    train(model, optimizer, batches)
    optimizer.detach()
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("rule", ALL)
def test_a_closure_and_a_step_without_gradients(rule):
    model, ((x, y),) = model_and_batches("mlp", steps=1)
    twin = copy.deepcopy(model)
    optimizer, other = (SINGD(m, **options_of(rule)) for m in (model, twin))
    other.step()  # nobody has a gradient
    train(twin, other, [(x, y)])

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert_same(model, optimizer, twin, other)


@pytest.mark.parametrize("rule", ALL)
def test_a_batch_that_is_not_finite_leaves_the_factors_as_they_were(rule):
    model, batches = model_and_batches("mlp", steps=3)
    optimizer = SINGD(model, **options_of(rule))
    train(model, optimizer, batches[:2])
    before = [A.dense() for layer in ("0", "2", "4") for A in optimizer.factors(layer)]
    x, y = batches[2]
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x * torch.inf), y).backward()
    if registered_rules()[rule].needs_rows:
        optimizer.step()
    else:
        with pytest.warns(UserWarning, match=r"factors of layer '\d' would not be finite"):
            optimizer.step()
    after = [A.dense() for layer in ("0", "2", "4") for A in optimizer.factors(layer)]
    assert all(torch.equal(A, B) for A, B in zip(after, before, strict=True))


# -- checkpoints and copies ----------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3, 4])
@pytest.mark.parametrize("rule", ALL)
def test_resume_is_bit_exact(rule, at):
    structures = ("dense", "dense") if rule == "whitened" else ("block2diagonal", "dense")
    options = options_of(rule, T=2, structures=structures)
    model, optimizer = build(**options)
    train_small(model, optimizer, range(at))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train_small(model, optimizer, range(at, 8))
    other, resumed = build(seed=1, **options)
    train_small(other, resumed, range(20, 23))
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train_small(other, resumed, range(at, 8))
    assert identical(model.state_dict(), other.state_dict())
    assert identical(optimizer.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("rule", ALL)
def test_factors_in_bfloat16_resume_to_the_bit(rule):
    options = options_of(rule, preconditioner_dtype=torch.bfloat16)
    model, optimizer = build(**options)
    train_small(model, optimizer, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train_small(model, optimizer, range(3, 6))
    other, resumed = build(seed=1, **options)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train_small(other, resumed, range(3, 6))
    assert identical(model.state_dict(), other.state_dict())
    assert {A.dtype for A in resumed.factors("4")} == {torch.bfloat16}


@pytest.mark.parametrize("rule", ALL)
def test_a_checkpoint_of_another_rule_is_refused(rule):
    model, batches = model_and_batches("mlp", steps=1)
    optimizer = SINGD(model, **options_of(rule))
    train(model, optimizer, batches)
    saved, theirs = optimizer.state_dict(), next(r for r in ALL if r != rule)
    assert {g["rule"] for g in saved["param_groups"]} == {rule}
    other = SINGD(copy.deepcopy(model), **options_of(theirs))
    said = rf"has the rule '{rule}' for layer '0', but this optimizer has '{theirs}'\.$"
    with pytest.raises(ValueError, match=said):
        other.load_state_dict(saved)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("rule", ALL)
def test_copies_train_on_alike(rule, way):
    model, batches = model_and_batches("mlp")
    optimizer = SINGD(model, **options_of(rule, T=2))
    train(model, optimizer, batches[:3])
    twin, other = way((model, optimizer))
    train(model, optimizer, batches[3:])
    train(twin, other, batches[3:])
    assert_same(model, optimizer, twin, other)


# -- what it shows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ALL)
def test_factors_and_stats_go_by_the_names_of_the_rule(rule):
    model, batches = model_and_batches("mlp", steps=2)
    optimizer = SINGD(model, **options_of(rule))
    keeps = registered_rules()[rule].keeps
    before = optimizer.factors("0")
    assert before._fields == tuple(keeps)
    assert [A.n for A in before] == [7 if side == INPUT else 8 for side in keeps.values()]
    train(model, optimizer, batches)
    after = optimizer.factors(model[0])
    assert not any(torch.equal(a.dense(), b.dense()) for a, b in zip(before, after, strict=True))
    line = optimizer.stats()["0"]
    assert {k for k in line if k.startswith(("norm_", "trace_"))} == {
        f"{what}_{name}" for what in ("norm", "trace") for name in keeps
    }
    for name, A in after._asdict().items():
        assert line["norm_" + name] == pytest.approx(A.dense().norm().item())
    assert 0 < line["cosine"] <= 1 and line["age"] == 0
    stored = 8 * sum(A.numel for A in after) + 8 * 8 * 7  # float64, and the momentum of the weights
    assert line["state_bytes"] == stored
    table = repr(optimizer)
    assert table.count("Linear") == 3 and "8 x 7" in table and "<table" in optimizer._repr_html_()


@pytest.mark.parametrize("rule", ALL)
def test_factors_that_are_kept_between_updates_give_the_same_run(rule):
    model, batches = model_and_batches("mlp", steps=5)
    twin = copy.deepcopy(model)
    optimizer = SINGD(model, **options_of(rule, T=3))
    other = SINGD(twin, **options_of(rule, T=3), cache_products=False)
    train(model, optimizer, batches)
    train(twin, other, batches)
    assert_same(model, optimizer, twin, other, atol=1e-12)


@pytest.mark.parametrize("rule", ALL)
def test_groups_may_have_rules_of_their_own(rule):
    """Each layer moves as it would if all had its rule."""
    model, batches = model_and_batches("mlp", steps=1)
    twin = copy.deepcopy(model)
    groups = [{"params": model[0].parameters(), "rule": rule}, {"params": model[2:].parameters()}]
    optimizer = SINGD(model, groups, **options_of("singd"))
    other = SINGD(twin, **options_of(rule))
    train(model, optimizer, batches)
    train(twin, other, batches)
    assert torch.equal(model[0].weight, twin[0].weight)
    assert rule == "singd" or not torch.equal(model[2].weight, twin[2].weight)
    assert [len(optimizer.factors(i)) for i in ("0", "2")] == [len(other.factors("0")), 4]
