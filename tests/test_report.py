"""Diagnostics are what they say, measured from outside; and asking changes nothing."""

import copy
import math

import pytest
import torch
from models import model_and_batches, train
from published import SINGD
from torch import nn


def vector(layer, what):
    return torch.cat([what(p).flatten() for p in layer.parameters()])


@pytest.mark.parametrize("name", ["mlp", "cnn", "shared"])
@pytest.mark.parametrize("structure", ["dense", "block3diagonal", "triltoeplitz"])
def test_stats_are_what_they_say(name, structure):
    model, batches = model_and_batches(name)
    optimizer = SINGD(
        model, T=4, lr=0.05, lr_cov=0.2, damping=0.1, structures=(structure, structure)
    )
    train(model, optimizer, batches[:5])
    old = copy.deepcopy(model)
    optimizer.zero_grad()
    x, y = batches[5]
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    stats = optimizer.stats()
    for layer_name, line in stats.items():
        layer, before = model.get_submodule(layer_name), old.get_submodule(layer_name)
        K, C, m_K, m_C = (F.dense() for F in optimizer.factors(layer))
        for key, F in (("K", K), ("C", C), ("m_K", m_K), ("m_C", m_C)):
            assert line["norm_" + key] == pytest.approx(F.norm().item())
            assert line["trace_" + key] == pytest.approx(F.trace().item() / len(F))
        new, was = vector(layer, lambda p: p.detach()), vector(before, lambda p: p.detach())
        assert line["update_ratio"] == pytest.approx(((new - was).norm() / new.norm()).item())
        parts = [p.grad.flatten(1) if p.ndim > 1 else p.grad[:, None] for p in layer.parameters()]
        dW = torch.cat(parts, 1)
        N = C @ C.T @ dW @ K @ K.T
        assert line["cosine"] == pytest.approx(((dW * N).sum() / dW.norm() / N.norm()).item())
        assert line["age"] == 1  # updated at step 4, this was step 5
        assert all(type(value) in (float, int) for value in line.values())
    assert len(stats) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules())


def test_asking_changes_nothing():
    model, batches = model_and_batches("mlp")
    twin = copy.deepcopy(model)
    optimizer, silent = SINGD(model, T=2, lr=0.05), SINGD(twin, T=2, lr=0.05)
    assert optimizer.stats() == {}
    for batch in batches:
        train(model, optimizer, [batch])
        optimizer.stats()
        train(twin, silent, [batch])
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_what_is_not_known_is_nan():
    model, batches = model_and_batches("mlp")
    optimizer = SINGD(model, momentum=0.0)
    train(model, optimizer, batches)
    optimizer.zero_grad()
    line = optimizer.stats()["0"]
    assert math.isnan(line["cosine"])
    assert math.isnan(line["update_ratio"])


def test_the_table_in_a_notebook():
    model, _ = model_and_batches("mlp")
    optimizer = SINGD(model)
    html = optimizer._repr_html_()
    assert html.count("<tr>") == 1 + 3  # a header and three layers
    assert "<td>Linear</td><td>8 x 7</td><td>dense</td>" in html
