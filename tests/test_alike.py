"""Layers that are alike are preconditioned together, and move as each of them would alone."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from singd import PUBLISHED, SINGD, alike
from singd.structures import registered_structures

LAYERS = {
    "linear": lambda: nn.Linear(5, 7),
    "linear without bias": lambda: nn.Linear(5, 7, bias=False),
    "conv": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "transposed conv": lambda: nn.ConvTranspose1d(4, 2, 3, groups=2),
    "embedding": lambda: nn.Embedding(6, 3),
}


class Beside(nn.Module):
    """Some layers of one kind, each of its own scale, and one that is not like them."""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(5))
        self.other = nn.Linear(3, 4)

    def forward(self, x, z):
        seen = [(i + 1) * layer(x).square().mean() for i, layer in enumerate(self.layers)]
        return torch.stack(seen).sum() + self.other(z).square().mean()


def inputs(name):
    if name == "embedding":
        return torch.randint(0, 6, (8,))
    if name.startswith("linear"):
        return torch.randn(8, 5, dtype=torch.float64)
    return torch.randn(8, 4, 6, dtype=torch.float64)


@pytest.fixture
def calls(monkeypatch):
    """How many layers were preconditioned together, in each call."""
    found: Counter[int] = Counter()
    together = alike.directions

    def counted(some, states):
        found[len(some)] += 1
        return together(some, states)

    monkeypatch.setattr(alike, "directions", counted)
    return found


def trained(model, name, options, steps=3):
    torch.manual_seed(1)
    optimizer = SINGD(model, lr=0.1, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs(name), torch.randn(8, 3, dtype=torch.float64)).backward()
        optimizer.step()
    return optimizer


def agree(name, options, calls, monkeypatch, expected):
    torch.manual_seed(0)
    model = Beside(LAYERS[name]).double()
    alone = copy.deepcopy(model)
    trained(model, name, options)
    assert calls == expected
    monkeypatch.setattr(alike, "FEW", 100)
    trained(alone, name, options)
    assert calls == expected
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("structure", registered_structures())
def test_in_every_structure(name, structure, calls, monkeypatch):
    batched = registered_structures()[structure](6).batched
    options = dict(structures=(structure, structure))
    # (of an embedding the inputs have a diagonal factor)
    agree(name, options, calls, monkeypatch, {5: 3} if batched else {})


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", ["singd", "ikfac", "shampoo"])
@pytest.mark.parametrize("options", [{}, {**PUBLISHED, "T": 2}], ids=["default", "published"])
def test_with_every_rule_of_two_factors(name, rule, options, calls, monkeypatch):
    agree(name, {**options, "rule": rule}, calls, monkeypatch, {5: 3})


def test_others_stay_alone(calls, monkeypatch):
    options = dict(rule="kfac", structures=("dense", "dense"))  # keeps inverses
    agree("linear", options, calls, monkeypatch, {})
    monkeypatch.undo()


def test_each_group_by_itself(calls):
    model = Beside(LAYERS["linear"]).double()
    slow = [p for layer in model.layers[:2] for p in layer.parameters()]
    rest = [p for p in model.parameters() if not any(p is q for q in slow)]
    optimizer = SINGD(model, [{"params": slow, "lr": 0.0}, {"params": rest}], lr=0.1)
    before = copy.deepcopy(model)
    model(inputs("linear"), torch.randn(8, 3, dtype=torch.float64)).backward()
    optimizer.step()
    assert calls == {}  # two and three are too few
    moved = [
        not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)
    ]
    assert moved == [False] * 4 + [True] * 8


def test_one_without_a_gradient_stays(calls):
    model = Beside(LAYERS["linear"]).double()
    optimizer = SINGD(model, lr=0.1)
    for p in model.layers[2].parameters():
        p.requires_grad_(False)
    before = copy.deepcopy(model.layers[2])
    model(inputs("linear"), torch.randn(8, 3, dtype=torch.float64)).backward()
    optimizer.step()
    assert calls == {4: 1}
    assert torch.equal(model.layers[2].weight, before.weight)
