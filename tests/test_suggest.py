"""What `suggest` counts is what a trained optimizer keeps, it keeps the budget, and it changes nothing."""

import copy
import inspect
import itertools
import sys

import pytest
import torch
from models import model_and_batches, train
from torch import nn

import singd

module = sys.modules["singd.report.suggest"]  # (its package's attribute is the function)
loss_function = nn.functional.cross_entropy


@pytest.fixture
def fixed_times(monkeypatch):
    """Forward and backward take a second, AdamW's step none: what is chosen does not depend on a clock."""
    measured = module._measured

    def without_clock(*args):
        return 1.0, 0.0, measured(*args)[2]

    monkeypatch.setattr(module, "_measured", without_clock)


def kept_bytes(optimizer):
    """All numbers that an optimizer keeps between steps: its state and the products that it has formed."""
    numbers = 0
    for state in optimizer.state.values():
        for name, v in state.items():
            if torch.is_tensor(v) and name != "step":  # AdamW counts its steps in a tensor
                numbers += v.nbytes
    for block in optimizer._blocks:
        _, prepared = block.factors._prepared
        for product in prepared or ():
            if not isinstance(product, singd.StructuredMatrix):
                numbers += sum(t.nbytes for t in product.multiply.__self__.tensors())
    return numbers


@pytest.mark.parametrize("name", ["mlp", "cnn", "shared"])
@pytest.mark.parametrize("memory", [3.0, 8.0, 40.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"T": 1}, {"alpha1": 0.5, "momentum": 0.0}, {"preconditioner_dtype": torch.float32}],
)
def test_it_counts_what_a_trained_optimizer_keeps(name, memory, options, fixed_times):
    model, batches = model_and_batches(name)
    found = singd.suggest(model, batches[0], loss_function, budget={"memory": memory}, **options)
    optimizer = singd.SINGD(model, found.groups(model), **options)
    train(model, optimizer, batches)
    adamw = 2 * sum(p.nbytes for p in model.parameters())
    assert kept_bytes(optimizer) == pytest.approx(found.memory * adamw, rel=1e-12)
    assert found.memory <= memory
    for layer, pair in found.layers.items():
        K, C, *_ = optimizer.factors(layer)
        want = [singd.structure(s)(f.n, device="meta") for s, f in zip(pair, (K, C), strict=True)]
        assert [f.numel for f in (K, C)] == [f.numel for f in want]


def wide():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(300, 200), nn.Tanh(), nn.LayerNorm(200), nn.Dropout(), nn.Linear(200, 10)
    )
    return model, (torch.randn(20, 300), torch.randint(10, (20,)))


@pytest.mark.parametrize("memory", [0.6, 0.8, 1.0, 2.0])
def test_the_one_pair_fits_too_and_none_is_richer(memory, fixed_times):
    model, batch = wide()
    found = singd.suggest(model, batch, loss_function, budget={"memory": memory})
    adamw = 2 * sum(p.nbytes for p in model.parameters())

    def share(pair):
        twin = copy.deepcopy(model)
        optimizer = singd.SINGD(twin, structures=pair)
        train(twin, optimizer, [batch] * 2)
        return kept_bytes(optimizer) / adamw

    richer = module.PAIRS[: module.PAIRS.index(found.structures)]
    assert share(found.structures) <= memory
    assert all(share(pair) > memory for pair in richer)


def test_more_time_buys_richer_structures(fixed_times):
    model, batch = wide()
    budgets = [{"time": t} for t in (1.1, 2, 8, 1000.0)]
    found = [singd.suggest(model, batch, loss_function, budget=b) for b in budgets]
    assert all(s.time <= b["time"] for s, b in zip(found, budgets, strict=True))
    ranks = [[module.PAIRS.index(pair) for pair in s.layers.values()] for s in found]
    assert all(sum(new) <= sum(old) for old, new in itertools.pairwise(ranks))
    assert found[-1].structures == ("dense", "dense")
    assert sum(ranks[0]) > sum(ranks[-1]) == 0


def test_both_budgets_are_kept(fixed_times):
    model, batch = wide()
    found = singd.suggest(model, batch, loss_function, budget={"memory": 1.0, "time": 1.5})
    assert found.memory <= 1.0
    assert found.time <= 1.5


def test_time_is_multiplications_at_the_pace_of_forward_and_backward(fixed_times):
    """Dense, T=1, m rows: 2 d^2 d' for the step, 2 m d^2 + 2 d^3 for the update; 3 m d d' for the passes."""
    layer, (x, y) = nn.Linear(7, 5, bias=False), (torch.randn(11, 7), torch.randint(5, (11,)))
    found = singd.suggest(layer, (x, y), loss_function, budget={"time": 100.0}, T=1)
    assert found.structures == ("dense", "dense")
    work = 2 * 7 * 5 * (7 + 5) + 2 * 11 * (7**2 + 5**2) + 2 * (7**3 + 5**3)
    assert found.time == pytest.approx(1 + work / (3 * 11 * 7 * 5))


def test_it_changes_nothing():
    model, batch = wide()
    optimizer = singd.SINGD(model, T=1)
    train(model, optimizer, [batch] * 2)
    model(batch[0]).sum().backward()
    state = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    statistics = dict(optimizer._collector.statistics)
    random = torch.get_rng_state()
    singd.suggest(model, batch, loss_function, budget={"memory": 1.0})
    assert torch.equal(random, torch.get_rng_state())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert statistics == optimizer._collector.statistics
    for name, v in model.state_dict().items():
        assert torch.equal(v, weights[name])
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, g)
    for key, entry in optimizer.state_dict()["state"].items():
        for name, v in entry.items():
            same = torch.equal(v, state["state"][key][name]) if torch.is_tensor(v) else True
            assert same and (torch.is_tensor(v) or v == state["state"][key][name])


def test_a_function_of_the_model_in_place_of_a_batch():
    model, (x, y) = wide()
    given = []

    def loss(twin):
        given.append(twin)
        return loss_function(twin(x), y)

    found = singd.suggest(model, loss, budget={"memory": 1.0})
    assert given and all(twin is not model for twin in given)
    assert found.memory <= 1.0
    optimizer = singd.SINGD(model, found.groups(model), structures=found.structures)
    assert train(model, optimizer, [(x, y)] * 20)[-1] < 1.0


def test_the_table():
    model, batch = wide()
    found = singd.suggest(model, batch, loss_function, budget={"memory": 100.0})
    lines = repr(found).splitlines()
    assert len(lines) == 3 + 2 + 2 + 1  # title, header, rule; layers; all else, in all; one pair
    assert lines[3].split()[:6] == ["0", "200", "x", "301", "dense", "dense"]
    assert lines[5].split()[:3] == ["all", "else", "-"]
    assert lines[-1].endswith("structures=('dense', 'dense')")
    assert found._repr_html_().count("<tr>") == 1 + 4


def test_embeddings_and_frozen_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Flatten(), nn.Linear(24, 3))
    model[1].requires_grad_(False)
    batch = torch.randint(9, (5, 4)), torch.randint(3, (5,))
    found = singd.suggest(model, batch, loss_function, budget={"memory": 100.0})
    assert list(found.layers) == ["0", "3"]
    assert "0 6 x 9 diagonal dense" in " ".join(repr(found).split())
    optimizer = singd.SINGD(model, found.groups(model))
    train(model, optimizer, [batch] * 3)
    adamw = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert kept_bytes(optimizer) == pytest.approx(found.memory * adamw)


def test_its_defaults_are_those_of_the_optimizer():
    known = inspect.signature(singd.SINGD).parameters
    assert {name: known[name].default for name in module.OPTIONS} == module.OPTIONS
    assert known["cache_products"].default is None
    assert known["rule"].default == "singd"


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (
            {"budget": 1.0},
            TypeError,
            "budget must be a dict with 'memory', 'time' or both, got 1.0.",
        ),
        ({"budget": {"memroy": 1.0}}, TypeError, "budget must be a dict"),
        ({"budget": {}}, TypeError, "budget must be a dict"),
        ({"budget": {"memory": 0.1}}, ValueError, "The cheapest structures take 0.5.* in memory"),
        ({"lr": 1.0}, TypeError, "Unknown option 'lr'; choose from T, momentum"),
        (
            {"loss": None},
            TypeError,
            "Give .inputs, targets. and a loss, or a function",
        ),
        ({"loss": 3}, TypeError, "not tuple and loss=3"),
        ({"model": nn.LayerNorm(300)}, ValueError, "no layer that SINGD preconditions"),
        ({"model": nn.LazyLinear(3)}, ValueError, "The lazy layer '' has no sizes yet"),
    ],
)
def test_errors_are_one_sentence(given, error, says):
    model, batch = wide()
    call = {"model": model, "batch": batch, "loss": loss_function}
    call = {**call, "budget": {"memory": 1.0}, **given}
    with pytest.raises(error, match=says) as raised:
        singd.suggest(**call)
    assert "\n" not in str(raised.value)


def test_groups_of_another_model():
    model, batch = wide()
    found = singd.suggest(model, batch, loss_function, budget={"memory": 1.0})
    twin = wide()[0]
    groups = found.groups(twin)
    assert {p for g in groups for p in g["params"]} == set(twin.parameters())
    with pytest.raises(AttributeError):
        found.groups(nn.Linear(3, 3))
