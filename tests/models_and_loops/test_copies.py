"""Copies: of model and optimizer together, of the model alone, and through pickle."""

import copy
import pickle

import pytest
import torch
from small import batch, build, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle], ids=lambda f: f.__name__)
@pytest.mark.parametrize("order", [1, -1], ids=["model first", "optimizer first"])
@pytest.mark.parametrize("at", [0, 3])
def test_model_and_optimizer_together_train_on_alike_and_apart(way, order, at):
    pair = build()
    train(*pair, range(at))
    twins = way(pair[::order])[::order]
    at_copy = copy.deepcopy(twins[0].state_dict())
    train(*pair, range(at, 7))
    assert all(torch.equal(v, at_copy[k]) for k, v in twins[0].state_dict().items())
    train(*twins, range(at, 7))
    assert same_weights(pair[0], twins[0])
    for a, b in zip(pair[1].factors("4"), twins[1].factors("4"), strict=True):
        assert torch.equal(a.dense(), b.dense())
    assert str(pair[1]) == str(twins[1])
    assert sum(len(m._forward_hooks) for m in twins[0].modules()) == 3


def test_through_torch_save(tmp_path):
    pair = build()
    train(*pair, range(3))
    torch.save(pair, tmp_path / "both.pt")
    twins = torch.load(tmp_path / "both.pt", weights_only=False)
    train(*pair, range(3, 7))
    train(*twins, range(3, 7))
    assert same_weights(pair[0], twins[0])


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle], ids=lambda f: f.__name__)
def test_a_model_copied_alone_feeds_nobody(way):
    model, optimizer = build()
    other, reference = build()
    train(model, optimizer, range(2))
    train(other, reference, range(2))
    alone = way(model)
    x, y = batch(50)
    nn.functional.cross_entropy(alone(x), y).backward()
    assert optimizer._collector.statistics == {}
    train(model, optimizer, range(2, 5))
    train(other, reference, range(2, 5))
    assert same_weights(model, other)


def test_a_model_copied_alone_takes_an_optimizer_of_its_own():
    model, optimizer = build()
    train(model, optimizer, range(2))
    alone = copy.deepcopy(model)
    mine = type(optimizer)(alone, lr=0.05, T=1)
    fresh, theirs = build()
    fresh.load_state_dict(model.state_dict())
    theirs = type(optimizer)(fresh, lr=0.05, T=1)
    train(alone, mine, range(3))
    train(fresh, theirs, range(3))
    assert same_weights(alone, fresh)
    assert all(len(m._forward_hooks) <= 1 for m in alone.modules())


def test_weight_averaging():
    model, optimizer = build()
    other, reference = build()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(5):
        train(model, optimizer, [step])
        train(other, reference, [step])
        averaged.update_parameters(model)
        for e, p in zip(expected, other.parameters(), strict=True):
            e.copy_(p) if step == 0 else e.lerp_(p.detach(), 0.5)
        averaged(batch(step)[0]).sum().backward()
        averaged.zero_grad()
    assert same_weights(model, other)
    for e, p in zip(expected, averaged.parameters(), strict=True):
        torch.testing.assert_close(p, e)


def test_a_copy_outlives_its_original():
    model, optimizer = build()
    train(model, optimizer, range(2))
    twin, other = copy.deepcopy((model, optimizer))
    reference, original = copy.deepcopy((model, optimizer))
    del model, optimizer
    train(twin, other, range(2, 5))
    train(reference, original, range(2, 5))
    assert same_weights(twin, reference)
