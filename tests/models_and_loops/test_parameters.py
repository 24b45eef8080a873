"""Parameters that are frozen, unused, tied, replaced, moved, or handed over in groups of their own."""

import copy
import warnings

import pytest
import torch
from models import mlp, model_and_batches, train
from published import SINGD
from torch import nn

FAST = dict(lr=0.1, T=1, lr_cov=0.1, damping=0.1)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def dense(optimizer, layer):
    return [f.dense() for f in optimizer.factors(layer)]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def assert_close(model, twin, atol=1e-12):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


# -- frozen and unused ---------------------------------------------------------


def test_a_frozen_weight_stays_and_its_bias_trains_with_the_fallback():
    model, batches = model_and_batches("mlp")
    model[0].weight.requires_grad_(False)
    weight, bias = model[0].weight.clone(), model[0].bias.clone()
    optimizer = SINGD(model, **FAST)
    train(model, optimizer, batches)
    assert torch.equal(model[0].weight, weight)
    assert not torch.equal(model[0].bias, bias)
    assert [p is model[0].bias for p in optimizer.param_groups[1]["params"]] == [True]


def test_a_frozen_bias_is_no_column_of_the_matrix():
    model, batches = model_and_batches("mlp")
    model[0].bias.requires_grad_(False)
    bias = model[0].bias.clone()
    optimizer = SINGD(model, **FAST)
    train(model, optimizer, batches)
    assert torch.equal(model[0].bias, bias)
    assert optimizer.factors("0").K.n == 6


@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_freezing_and_unfreezing_in_mid_training(names, set_to_none):
    model, batches = model_and_batches("mlp", steps=9)
    optimizer = SINGD(model, **FAST)

    def run(part):
        for batch in part:
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model, batch).backward()
            optimizer.step()

    run(batches[:3])
    frozen = [getattr(model[0], name) for name in names]
    for p in frozen:
        p.requires_grad_(False).grad = None
    values, factors = [p.clone() for p in frozen], dense(optimizer, "0")
    free = model[0].bias if names == ("weight",) else model[0].weight
    before = free.clone()
    run(batches[3:6])
    assert same(frozen, values)
    assert torch.equal(free, before) == (len(names) == 2)
    if "weight" in names:
        assert same(
            dense(optimizer, "0"), factors
        )  # without the weight's gradients, no curvature of them
    for p in frozen:
        p.requires_grad_(True)
    run(batches[6:])
    assert not any(torch.equal(p, v) for p, v in zip(frozen, values, strict=True))
    assert not same(dense(optimizer, "0"), factors)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_parameters_frozen_at_construction_join_by_a_group():
    model, batches = model_and_batches("mlp", steps=6)
    model[2].weight.requires_grad_(False)
    weight = model[2].weight.clone()
    optimizer = SINGD(model, **FAST)
    train(model, optimizer, batches[:3])
    assert torch.equal(model[2].weight, weight)
    model[2].weight.requires_grad_(True)
    optimizer.add_param_group({"params": model[2].weight, "lr": 0.01})
    train(model, optimizer, batches[3:])
    assert not torch.equal(model[2].weight, weight)
    assert optimizer.factors("2").K.n == 8


class Branches(nn.Module):
    """Uses one of two layers in a forward."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)
        self.use = self.left

    def forward(self, x):
        return self.use(x)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_layer_unused_in_a_forward_stays_and_its_factors_too(set_to_none):
    _, batches = model_and_batches("mlp", steps=6)
    model = Branches().double()
    optimizer = SINGD(model, **FAST, momentum=0.0)
    right = copy.deepcopy(model.right)
    for i, batch in enumerate(batches):
        model.use = model.right if i == 3 else model.left
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, batch).backward()
        left, factors = model.left.weight.clone(), dense(optimizer, "left")
        optimizer.step()
        assert torch.equal(model.left.weight, left) == (i == 3)
        assert same(dense(optimizer, "left"), factors) == (i == 3)
    assert not torch.equal(model.right.weight, right.weight)


def test_a_gradient_of_none_is_no_step():
    model, batches = model_and_batches("mlp", steps=3)
    optimizer = SINGD(model, **FAST)
    train(model, optimizer, batches[:1])
    before, factors = copy.deepcopy(model.state_dict()), dense(optimizer, "2")
    loss_of(model, batches[1]).backward()
    model[2].weight.grad = None
    optimizer.step()
    assert torch.equal(model[2].weight, before["2.weight"])
    assert same(dense(optimizer, "2"), factors)
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_step_without_any_gradient_changes_nothing():
    model, batches = model_and_batches("mlp", steps=2)
    optimizer = SINGD(model, **FAST)
    optimizer.step()
    train(model, optimizer, batches)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- tied ----------------------------------------------------------------------


class Tied(nn.Module):
    """One weight in two layers; or, for comparison, one layer called twice."""

    def __init__(self, one_layer):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first if one_layer else nn.Linear(6, 6)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_tied_layers_are_one_layer_called_twice():
    _, batches = model_and_batches("mlp")
    model = Tied(one_layer=False).double()
    twin = Tied(one_layer=True).double()
    twin.load_state_dict(model.state_dict(), strict=False)
    optimizer, other = SINGD(model, **FAST), SINGD(twin, **FAST)
    train(model, optimizer, batches)
    train(twin, other, batches)
    assert_close(model, twin)
    for mine, theirs in zip(dense(optimizer, "second"), dense(other, "first"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert "first = second" in str(optimizer)
    assert optimizer.state[model.first.weight]["step"] == len(batches)  # stepped once per step


class LanguageModel(nn.Module):
    """The output layer is the transposed embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embedding(x)))).mT


def test_a_weight_tied_between_embedding_and_head_trains_with_the_fallback():
    model = LanguageModel()
    optimizer = SINGD(model, **FAST, fallback={"lr": 0.01})
    x, y = torch.randint(0, 7, (2, 5, 3))
    losses = train(model, optimizer, [(x, y)] * 20)
    assert losses[-1] < losses[0]
    assert [p is model.head.weight for p in optimizer.param_groups[1]["params"]] == [True]
    line = next(line for line in str(optimizer).splitlines() if line.startswith("embedding"))
    assert "adamw (it is tied between layers of different kinds)" in line


def test_tied_weights_with_biases_of_their_own():
    _, batches = model_and_batches("mlp")
    model = Tied(one_layer=False).double()
    model.second.bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    before = copy.deepcopy(model.state_dict())
    optimizer = SINGD(model, **FAST)
    train(model, optimizer, batches)
    assert not any(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert optimizer.factors("first").K.n == 6


# -- replaced and moved --------------------------------------------------------


@pytest.mark.parametrize("when", ["before the first step", "in mid-training"])
@pytest.mark.parametrize("clear", ["optimizer", "model", "no"])
def test_load_state_dict_with_assign(when, clear):
    model, batches = model_and_batches("mlp", steps=6)
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model, **FAST), SINGD(twin, **FAST)
    if when == "in mid-training":
        train(model, optimizer, batches[:3])
        train(twin, other, batches[:3])
    fresh = mlp().double().state_dict()
    model.load_state_dict(copy.deepcopy(fresh), assign=True)
    twin.load_state_dict(fresh)
    twin.zero_grad()
    if clear != "no":
        dict(optimizer=optimizer, model=model)[clear].zero_grad()
    for m, o in ((model, optimizer), (twin, other)):
        for batch in batches[3:]:
            for part in (0, 1):  # two backward passes: the statistics of both count
                loss_of(m, (batch[0][part::2], batch[1][part::2])).backward()
            o.step()
            m.zero_grad()
    assert_close(model, twin, atol=0)
    assert same(dense(optimizer, "0"), dense(other, "0"))
    assert set(optimizer.state) == set(model.parameters())


def test_a_group_added_after_assign():
    model, batches = model_and_batches("mlp", steps=3)
    optimizer = SINGD(model, model[0].parameters(), **FAST)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    optimizer.add_param_group({"params": model[2].parameters()})
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, batches)
    assert not torch.equal(before["2.weight"], model[2].weight)


def test_assign_that_unties_weights_is_an_error():
    model = LanguageModel()
    optimizer = SINGD(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match="'embedding.weight' was tied .* tie them again"):
        optimizer.zero_grad()
    model.head.weight = model.embedding.weight
    before = model.embedding.weight.clone()
    x, y = torch.randint(0, 7, (2, 5, 3))
    train(model, optimizer, [(x, y)])
    assert not torch.equal(model.embedding.weight, before)


class Mixed(nn.Sequential):
    """Layers of both algorithms."""

    def __init__(self):
        super().__init__(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("overwrite", [False, True], ids=["in place", "new parameters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_moved_to_another_dtype_trains_on(dtype, overwrite):
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        model = Mixed()
        x, y = torch.randn(9, 6), torch.arange(9) % 3
        optimizer = SINGD(model, **FAST)
        losses = train(model, optimizer, [(x, y)] * 3)
        model.to(dtype)
        losses += train(model, optimizer, [(x.to(dtype), y)] * 5)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert losses[-1] < losses[0]
    assert all(p.dtype == dtype for p in model.parameters())
    assert optimizer.state[model[0].weight]["momentum_buffer"].dtype == dtype
    assert optimizer.factors("0").K.dtype == torch.float32  # what was learned is not rounded


def test_a_model_moved_to_another_device_takes_its_state_along_and_never_waits_for_it():
    """The meta device stands for an accelerator: it refuses tensors of the CPU, and to tell a number."""
    model = Mixed()
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    optimizer = SINGD(model, **FAST)
    train(model, optimizer, [(x, y)] * 2)
    model.to("meta")
    optimizer.zero_grad()
    for _ in range(2):
        nn.functional.cross_entropy(model(x.to("meta")), y.to("meta")).backward()
        optimizer.step()
    state = optimizer.state[model[0].weight]
    assert {state[k].device.type for k in ("K", "C", "m_K", "m_C", "momentum_buffer")} == {"meta"}


# -- groups --------------------------------------------------------------------


def test_a_group_added_in_mid_training_is_as_one_from_the_start():
    model, batches = model_and_batches("mlp", steps=6)
    twin = copy.deepcopy(model)
    late = SINGD(model, [*model[0].parameters(), *model[4].parameters()], **FAST)
    early = SINGD(
        twin, [*twin[0].parameters(), *twin[4].parameters(), *twin[2].parameters()], **FAST
    )
    for p in twin[2].parameters():
        p.requires_grad_(False)
    train(model, late, batches[:3])
    train(twin, early, batches[:3])
    late.add_param_group({"params": model[2].parameters()})
    for p in twin[2].parameters():
        p.requires_grad_(True)
    train(model, late, batches[3:])
    train(twin, early, batches[3:])
    assert_close(model, twin, atol=0)


def test_biases_in_a_group_of_their_own_keep_their_own_options():
    model, batches = model_and_batches("mlp")
    biases = [p for p in model.parameters() if p.ndim == 1]
    before = [b.clone() for b in biases]
    weights = [p for p in model.parameters() if p.ndim > 1]
    optimizer = SINGD(model, [{"params": biases, "lr": 0.0}, {"params": weights}], **FAST)
    train(model, optimizer, batches)
    assert same(biases, before)
    assert optimizer.factors("0").K.n == 7  # and still they are part of the matrix


def test_a_layer_whose_forward_is_not_seen_warns_once_and_trains():
    class Functional(nn.Sequential):
        def forward(self, x):
            return self[2](torch.tanh(nn.functional.linear(x, self[0].weight, self[0].bias)))

    model = Functional(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    _, batches = model_and_batches("mlp")
    optimizer = SINGD(model, **FAST)
    before = model[0].weight.clone()
    with pytest.warns(UserWarning, match="Layer '0' has a gradient but its forward"):
        train(model, optimizer, batches[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, batches[1:])
    assert not torch.equal(model[0].weight, before)
    assert same(dense(optimizer, "0")[:2], [torch.eye(7).double(), torch.eye(5).double()])
