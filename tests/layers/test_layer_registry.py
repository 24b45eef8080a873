"""Which modules are found, and how users add their own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from singd.layers import KINDS, EmbeddingKind, LinearKind, find_kind, register_layer

LAYERS = {
    nn.Linear: lambda: nn.Linear(3, 4),
    nn.Conv1d: lambda: nn.Conv1d(2, 4, 3),
    nn.Conv2d: lambda: nn.Conv2d(2, 4, 3),
    nn.Conv3d: lambda: nn.Conv3d(2, 4, 3),
    nn.ConvTranspose1d: lambda: nn.ConvTranspose1d(2, 4, 3),
    nn.ConvTranspose2d: lambda: nn.ConvTranspose2d(2, 4, 3),
    nn.ConvTranspose3d: lambda: nn.ConvTranspose3d(2, 4, 3),
    nn.Embedding: lambda: nn.Embedding(5, 3),
}


@pytest.fixture
def own_kinds(monkeypatch):
    """The registry, put back after the test."""
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)


@pytest.mark.parametrize("cls", LAYERS, ids=lambda cls: cls.__name__)
def test_the_layers_of_torch_are_found(cls):
    layer = LAYERS[cls]()
    assert find_kind(layer) is KINDS[cls]
    assert find_kind(layer).supports(layer) is None


def test_nothing_else_is_found():
    others = [nn.ReLU(), nn.LayerNorm(3), nn.BatchNorm2d(3), nn.Bilinear(2, 3, 4), nn.LSTM(2, 3)]
    others += [nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2).out_proj]
    others += [nn.EmbeddingBag(5, 3), nn.Sequential(nn.Linear(2, 2))]
    assert [find_kind(module) for module in others] == [None] * len(others)


def test_a_subclass_is_not_adopted_silently():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    assert find_kind(Odd(3, 4)) is None


@pytest.mark.parametrize("make", [LAYERS[nn.Linear], LAYERS[nn.Conv2d]])
def test_a_weight_made_of_other_parameters_is_not_found(make):
    def parametrized(layer):
        parametrize.register_parametrization(layer, "weight", nn.Identity())
        return layer

    assert find_kind(parametrized(make())) is None
    assert find_kind(parametrizations.weight_norm(make())) is None
    assert find_kind(parametrizations.spectral_norm(make())) is None
    assert find_kind(nn.utils.spectral_norm(make())) is None
    assert find_kind(prune.l1_unstructured(make(), "weight", 0.5)) is None


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_older_weight_norm_is_not_found():
    assert find_kind(nn.utils.weight_norm(nn.Linear(3, 4))) is None
    removed = nn.utils.remove_weight_norm(nn.utils.weight_norm(nn.Linear(3, 4)))
    assert find_kind(removed) is KINDS[nn.Linear]


@pytest.mark.parametrize(
    ("lazy", "x"),
    [
        (lambda: nn.LazyLinear(4), torch.randn(2, 3)),
        (lambda: nn.LazyConv2d(4, 3), torch.randn(2, 3, 5, 5)),
        (lambda: nn.LazyConvTranspose1d(4, 3), torch.randn(2, 3, 5)),
    ],
)
def test_a_lazy_layer_is_found_once_it_has_seen_an_input(lazy, x):
    layer = lazy()
    assert find_kind(layer) is None
    layer(x)
    assert find_kind(layer) is KINDS[type(layer)]


def test_a_sharded_layer_is_found():
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not (dist.is_available() and hasattr(fsdp, "fully_shard")):
        pytest.skip("this torch has no fully_shard")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        layer = fsdp.fully_shard(nn.Linear(3, 4), mesh=mesh)
        assert type(layer) is not nn.Linear
        assert find_kind(layer) is KINDS[nn.Linear]

        class Odd(nn.Linear):
            pass

        assert find_kind(fsdp.fully_shard(Odd(3, 4), mesh=mesh)) is None
    finally:
        dist.destroy_process_group()


class TransposedLinear(nn.Module):
    """As in GPT-2: y = x W + b, with a weight [in, out]."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_a_kind_of_a_user_takes_a_few_lines(own_kinds):
    class TransposedLinearKind(LinearKind):
        input_name = "x"

        def weight_to_matrix(self, layer, weight):
            return weight.T

        def matrix_to_weight(self, layer, matrix):
            return matrix.T

    register_layer(TransposedLinear, TransposedLinearKind())

    layer = TransposedLinear(4, 3).double()
    kind = find_kind(layer)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    y = layer(x=x)
    g = torch.randn_like(y)
    y.backward(g)
    assert kind.input((), {"x": x}) is x
    assert kind.size(layer, bias=True) == (4, 4)
    a = kind.input_rows(layer, x, approx="expand", bias=True, dtype=x.dtype)
    G = kind.grad_rows(layer, g, x, approx="expand", dtype=x.dtype)
    M = kind.to_matrix(layer, layer.weight.grad, layer.bias.grad)
    torch.testing.assert_close(G.matrix().T @ a.matrix(), M)
    weight, bias = kind.from_matrix(layer, M, bias=True)
    assert torch.equal(weight, layer.weight.grad)
    assert torch.equal(bias, layer.bias.grad)


def test_the_input_of_a_call():
    kind, x = KINDS[nn.Linear], torch.randn(2, 3)
    assert kind.input((x,), {}) is x
    assert kind.input((), {"input": x}) is x
    with pytest.raises(TypeError, match=r"without the argument 'input'; it has \['other'\]"):
        kind.input((), {"other": x})


def test_bad_registrations(own_kinds):
    before = dict(KINDS)
    with pytest.raises(TypeError, match=r"layer_class must be a subclass of nn.Module, got 3"):
        register_layer(3, LinearKind())
    with pytest.raises(TypeError, match="kind must be an object of a LayerKind class, got <class"):
        register_layer(TransposedLinear, LinearKind)
    assert before == KINDS


def test_embeddings_that_are_refused():
    kind = KINDS[nn.Embedding]
    assert kind.supports(nn.Embedding(5, 3, sparse=True)) == "sparse gradients"
    reason = kind.supports(nn.Embedding(5, 3, scale_grad_by_freq=True))
    assert "scale_grad_by_freq" in reason


def test_complex_weights_are_refused_with_a_reason():
    layer = nn.Linear(2, 3, dtype=torch.complex64)
    assert "complex" in find_kind(layer).supports(layer)


def test_a_large_vocabulary_is_never_dense():
    layer = nn.Embedding(10**7, 1)
    x = torch.tensor([[3, 5], [3, 9]])
    rows = EmbeddingKind().input_rows(layer, x, approx="expand", bias=False, dtype=torch.float32)
    assert EmbeddingKind.input_structure == "diagonal"
    counts = rows.squares()
    assert {i: counts[i].item() for i in counts.nonzero().flatten().tolist()} == {3: 2, 5: 1, 9: 1}


def test_token_counts_are_exact_in_half_precision():
    tokens = torch.zeros(300, dtype=torch.long)
    rows = EmbeddingKind().input_rows(
        nn.Embedding(2, 3), tokens, approx="expand", bias=False, dtype=torch.bfloat16
    )
    assert rows.squares().tolist() == [300.0, 0.0]
