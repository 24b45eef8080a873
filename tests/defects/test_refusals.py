"""What cannot work is refused at once, in a sentence; what torch accepts is accepted."""

import copy

import numpy as np
import pytest
import torch
from published import FAST
from torch import nn

from singd import SINGD

F64 = torch.float64


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(F64)


def one_step(model, optimizer, x=None):
    x = torch.randn(8, 5, dtype=F64) if x is None else x
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


# -- layers and inputs of other layouts --------------------------------------------------------------


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, sparse=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


TOKENS = torch.tensor([[0, 1], [2, 5]])


def test_a_sparse_embedding_that_is_frozen_is_no_trouble():
    model = Sparse()
    model.embedding.weight.requires_grad_(False)
    for params in (None, list(model.head.parameters())):
        one_step(model, SINGD(model, params, **FAST), TOKENS)


def test_a_sparse_embedding_of_another_optimizer_is_no_trouble():
    model = Sparse()
    optimizer = SINGD(model, model.head.parameters(), **FAST)
    other = torch.optim.SparseAdam(model.embedding.parameters())
    before = copy.deepcopy(model.state_dict())
    one_step(model, optimizer, TOKENS)
    other.step()
    assert not any(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "sparse" in str(optimizer)


def test_a_sparse_embedding_that_singd_would_train_is_refused():
    model = Sparse()
    for params in (None, model.parameters()):
        with pytest.raises(ValueError, match="sparse"):
            SINGD(model, params, **FAST)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_inputs_are_dense_ones_with_zeros(layout):
    layer = nn.Linear(5, 3).to(F64)
    twin = copy.deepcopy(layer)
    optimizer, other = SINGD(layer, **FAST), SINGD(twin, **FAST)
    x = torch.randn(8, 5, dtype=F64).relu()
    sparse = x.to_sparse() if layout == torch.sparse_coo else x.to_sparse_csr()
    one_step(layer, optimizer, sparse)
    one_step(twin, other, x)
    for a, b in zip(optimizer.factors(""), other.factors(""), strict=True):
        torch.testing.assert_close(a.dense(), b.dense(), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_a_nested_batch_is_all_its_rows(layout):
    layer = nn.Linear(5, 3).to(F64)
    twin = copy.deepcopy(layer)
    optimizer, other = (SINGD(m, **{**FAST, "loss_average": None}) for m in (layer, twin))
    parts = [torch.randn(n, 5, dtype=F64) for n in (2, 4, 3)]
    y = layer(torch.nested.nested_tensor(parts, layout=layout))
    torch.cat(y.unbind()).square().mean().backward()
    twin(torch.cat(parts)).square().mean().backward()
    optimizer.step()
    other.step()
    for a, b in zip(optimizer.factors(""), other.factors(""), strict=True):
        torch.testing.assert_close(a.dense(), b.dense(), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("options", [{}, {"structures": ("diagonal", "triltoeplitz")}], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("sizes", [(0, 3), (5, 0), (0, 0)])
def test_a_layer_without_numbers_is_no_trouble(sizes, normalize, options):
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.empty, self.full = nn.Linear(*sizes), nn.Linear(5, 3)

        def forward(self, x):
            return self.full(x).square().mean() + self.empty(x[:, : sizes[0]]).sum()

    model = Beside().to(F64)
    options = {**FAST, "normalize_lr_cov": normalize, **options}
    optimizer = SINGD(model, **options)
    for _ in range(3):
        one_step(model, optimizer)
    SINGD(model, **options).load_state_dict(optimizer.state_dict())
    optimizer.stats()


# -- options -----------------------------------------------------------------------------------------


def test_a_group_with_a_mistyped_key_is_refused():
    model = mlp()
    with pytest.raises((ValueError, KeyError), match="param"):
        SINGD(model, [{"param": list(model.parameters())}], **FAST)
    with pytest.raises(ValueError, match="needs 'params', got only 'param'"):
        SINGD(model, model[0].parameters(), **FAST).add_param_group({"param": model[2].weight})
    with pytest.raises(ValueError, match="'weight_decy'.*weight_decay"):
        SINGD(model, [{"params": model.parameters(), "weight_decy": 0.1}], **FAST)


def test_no_parameters_are_refused_as_by_torch():
    """They may come from a generator that another optimizer has used up."""
    model = mlp()
    params = model.parameters()
    SINGD(model, params, **FAST)
    with pytest.raises(ValueError, match="no parameters"):
        SINGD(model, params, **FAST)
    SINGD(model, [{"params": []}], **FAST)  # a group that is to be filled is none of its business


@pytest.mark.parametrize("params", [{"params": []}, ["0.weight"], [None]], ids=str)
def test_what_is_no_parameter_is_named(params):
    with pytest.raises(TypeError, match="parameters.*got (None|'params'|'0.weight')"):
        SINGD(mlp(), params, **FAST)


def test_a_set_of_parameters_is_refused():
    model = mlp()
    for params in (set(model.parameters()), [{"params": set(model.parameters())}]):
        with pytest.raises(TypeError, match="order"):
            SINGD(model, params, **FAST)


BAD = [
    ({"alpha1": 2.0}, ValueError),
    ({"alpha1": 1.0}, ValueError),
    ({"shard_factors": "x"}, TypeError),
    ({"grad_scaler": "x"}, TypeError),
    ({"cache_products": "x"}, TypeError),
    ({"average_gradients": "x"}, TypeError),
    ({"warn_unsupported": "x"}, TypeError),
    ({"lr": torch.ones(2)}, (TypeError, ValueError)),
    ({"T": 2.5}, TypeError),
]


@pytest.mark.parametrize("option, error", BAD, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_what_would_diverge_or_be_ignored_is_refused(option, error):
    with pytest.raises(error, match=f"^{next(iter(option))} must be"):
        SINGD(mlp(), **{**FAST, **option})


def test_numpys_numbers_are_numbers():
    """torch's optimizers take them; they are kept as plain ones, so that a checkpoint is plain."""
    model = mlp()
    numbers = dict(
        lr=np.float32(0.5), momentum=np.float64(0.5), T=np.int64(2), damping=np.float32(0.25)
    )
    torch.optim.SGD(model.parameters(), lr=numbers["lr"], momentum=numbers["momentum"])
    optimizer = SINGD(model, **{**FAST, **numbers, "fallback": {"lr": np.float32(0.5)}})
    group = optimizer.state_dict()["param_groups"][0]
    assert [(type(group[n]), group[n]) for n in numbers] == [
        (float, 0.5), (float, 0.5), (int, 2), (float, 0.25),
    ]  # fmt: skip
    one_step(model, optimizer)


CHANGES = [
    {"T": 0},
    {"T": "x"},
    {"loss_average": "mean"},
    {"damping": -1.0},
    {"kfac_approx": "both"},
    {"structures": ("diagonal", "dense")},
    {"algorithm": "adamw"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_an_option_set_to_what_cannot_be_in_mid_run_is_named_and_changes_nothing(change):
    model = mlp()
    optimizer = SINGD(model, **FAST)
    one_step(model, optimizer)
    before, factors = copy.deepcopy(model.state_dict()), optimizer.factors("0")
    (name, value), group = next(iter(change.items())), optimizer.param_groups[0]
    kept = group[name]
    group[name] = value
    with pytest.raises((TypeError, ValueError), match=name):
        one_step(model, optimizer)  # in its backward or in its step
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    group[name] = kept
    for a, b in zip(optimizer.factors("0"), factors, strict=True):
        assert torch.equal(a.dense(), b.dense())
    one_step(model, optimizer)


@pytest.mark.parametrize("own", [{}, {"betas": (0.9, 0.99), "eps": 1e-8}], ids=str)
def test_a_group_stays_with_its_algorithm(own):
    """Which layers are preconditioned was decided when the group came."""
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)).to(F64)
    optimizer = SINGD(model, [{"params": model.parameters(), **own}], **FAST)
    for group, other in zip(optimizer.param_groups, ("adamw", "singd"), strict=True):
        kept, group["algorithm"] = group["algorithm"], other
        with pytest.raises(ValueError, match="algorithm"):
            one_step(model, optimizer)
        group["algorithm"] = kept
    one_step(model, optimizer)


def test_a_group_that_is_refused_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).to(F64)
    optimizer = SINGD(model, model[1].parameters(), **FAST)
    before = str(optimizer)
    with pytest.raises(ValueError, match="more than one"):  # the norm's are in a group already
        optimizer.add_param_group({"params": [*model[0].parameters(), *model[1].parameters()]})
    assert str(optimizer) == before
    assert len(optimizer.param_groups) == 1
    assert not model[0]._forward_hooks
    optimizer.add_param_group({"params": model[0].parameters()})
    one_step(model, optimizer)
