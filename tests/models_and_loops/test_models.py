"""Every model trains: what SINGD understands with its own factors, all else with the fallback."""

import copy
import warnings

import pytest
import torch
from published import SINGD
from torch import nn

from singd.layers import KINDS, LinearKind, register_layer


class RNN(nn.Module):
    """A recurrent layer whose last output is classified."""

    def __init__(self, cls):
        super().__init__()
        self.rnn = cls(4, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    """Queries, keys and values from the same tokens."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0].mean(1))


class Pair(nn.Module):
    """A bilinear layer fed with its input twice."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.bilinear(x, x)))


class Loose(nn.Module):
    """Parameters of the model's own, one of them 0-d."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.scale * x @ self.matrix))


class OddLinear(nn.Linear):
    """A subclass that computes something else than its parent."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.abs(), self.bias) ** 2


class Tuple(nn.Module):
    """A module that takes one tuple, and calls its layers by keyword."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(2, 3, bias=False)

    def forward(self, pair):
        return self.left(input=pair[0]) + self.right(input=pair[1])


class Splits(nn.Module):
    """Hands halves of its input to a module that takes a tuple."""

    def __init__(self):
        super().__init__()
        self.inner = Tuple()

    def forward(self, x):
        return self.inner(x.chunk(2, -1))


def conv(dims, transposed):
    cls = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    pool = getattr(nn, f"AdaptiveAvgPool{dims}d")
    return nn.Sequential(
        cls(2, 4, 3, stride=2), nn.Tanh(), cls(4, 3, 2, groups=1), pool(1), nn.Flatten()
    )


def weight_norm_of_old(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def sandwich(layer):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3))


def lazy():
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(3))
    model(torch.zeros(1, 4))
    return model


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))


def tokens(*size):
    return torch.randint(0, 7, size)


# name: (model, its input, layers with factors, whether some parameters go to the fallback)
MODELS = {
    **{
        f"Conv{'Transpose' if t else ''}{d}d": (
            lambda d=d, t=t: conv(d, t),
            lambda d=d: torch.randn(5, 2, *[7, 6, 5][:d]),
            {"0", "2"},
            False,
        )
        for d in (1, 2, 3)
        for t in (False, True)
    },
    "Embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3)),
        lambda: tokens(5, 3),
        {"0", "2"},
        False,
    ),
    "Embedding with max_norm": (
        lambda: nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(12, 3)),
        lambda: tokens(5, 3),
        {"0", "2"},
        False,
    ),
    "EmbeddingBag": (
        lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3)),
        lambda: tokens(5, 3),
        {"1"},
        True,
    ),
    **{
        type(norm).__name__: (
            lambda norm=norm: sandwich(copy.deepcopy(norm)),
            lambda: torch.randn(5, 4),
            {"0", "4"},
            True,
        )
        for norm in (nn.LayerNorm(6), nn.RMSNorm(6), nn.BatchNorm1d(6), nn.GroupNorm(2, 6))
    },
    **{
        cls.__name__: (lambda cls=cls: RNN(cls), lambda: torch.randn(5, 3, 4), {"head"}, True)
        for cls in (nn.RNN, nn.LSTM, nn.GRU)
    },
    "MultiheadAttention": (Attention, lambda: torch.randn(5, 3, 4), {"head"}, True),
    "TransformerEncoderLayer": (
        encoder,
        lambda: torch.randn(5, 3, 4),
        {"0.linear1", "0.linear2", "2"},
        True,
    ),
    "Bilinear": (Pair, lambda: torch.randn(5, 4), {"head"}, True),
    "loose parameters": (Loose, lambda: torch.randn(5, 4), {"head"}, True),
    "weight_norm": (
        lambda: sandwich(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
        lambda: torch.randn(5, 4),
        {"0", "4"},
        True,
    ),
    "weight_norm of old": (
        lambda: sandwich(weight_norm_of_old(nn.Linear(6, 6))),
        lambda: torch.randn(5, 4),
        {"0", "4"},
        True,
    ),
    "spectral_norm": (
        lambda: sandwich(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))),
        lambda: torch.randn(5, 4),
        {"0", "4"},
        True,
    ),
    "spectral_norm of old": (
        lambda: sandwich(nn.utils.spectral_norm(nn.Linear(6, 6))),
        lambda: torch.randn(5, 4),
        {"0", "4"},
        True,
    ),
    "lazy": (lazy, lambda: torch.randn(5, 4), {"0", "2"}, False),
    "an odd subclass": (
        lambda: sandwich(OddLinear(6, 6)),
        lambda: torch.randn(5, 4),
        {"0", "4"},
        True,
    ),
    "a tuple and keywords": (
        Splits,
        lambda: torch.randn(5, 4),
        {"inner.left", "inner.right"},
        False,
    ),
}


def steps(model, optimizer, x, n=8):
    y = torch.arange(len(x)) % 3
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_trains(name):
    make, data, own, fallback = MODELS[name]
    model, x = make(), data()
    before = copy.deepcopy(model.state_dict())
    optimizer = SINGD(model, lr=0.05, T=2, lr_cov=0.05, damping=0.1, fallback={"lr": 0.01})

    layers = {n for n, m in model.named_modules() if _has_factors(optimizer, n)}
    assert layers == own
    assert [g["algorithm"] for g in optimizer.param_groups] == ["singd", "adamw"][: 1 + fallback]

    losses = steps(model, optimizer, x)
    assert losses[-1] < losses[0]
    trained = dict(model.named_parameters())
    for key, p in trained.items():
        assert not torch.equal(p, before[key]), key
        assert torch.isfinite(p).all(), key
    for layer in own:
        K = optimizer.factors(layer).K.dense()
        assert not torch.equal(K, torch.eye(len(K))), layer

    lines = {line.split()[0]: line for line in str(optimizer).splitlines()[3:]}
    theirs = {n for n in trained if n.rpartition(".")[0] not in own}
    assert set(lines) == own | theirs
    assert all("adamw" in lines[n] for n in theirs) and not any("adamw" in lines[n] for n in own)


def _has_factors(optimizer, name):
    try:
        optimizer.factors(name)
    except ValueError:
        return False
    return True


def test_the_input_factor_of_an_embedding_is_the_diagonal_of_token_counts():
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 3)).double()
    optimizer = SINGD(model, lr=0.0, T=1, lr_cov=1.0, kfac_like=True, damping=0.1)
    x = torch.tensor([[1, 2], [1, 0], [3, 1]])
    steps(model, optimizer, x, n=1)
    shares = torch.tensor([0, 3, 1, 1, 0], dtype=torch.float64) / 6  # of 6 tokens; padding has none
    m = 0.5 * (shares + 0.1 - 1)
    torch.testing.assert_close(optimizer.factors("0").K.dense(), torch.diag(1 - m))


def test_padding_stays_and_max_norm_holds():
    model = nn.Sequential(
        nn.Embedding(5, 3, padding_idx=0, max_norm=0.5), nn.Flatten(), nn.Linear(6, 3)
    )
    padding = model[0].weight[0].clone()
    x = torch.tensor([[1, 2], [4, 0], [3, 1]])
    steps(model, SINGD(model, lr=0.1, T=1), x)
    assert torch.equal(model[0].weight[0], padding)
    model(x)
    assert model[0].weight.norm(dim=1).max() <= 0.5 + 1e-6


def test_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="'0.weight' gets sparse gradients"):
        SINGD(nn.Sequential(nn.Embedding(5, 3, sparse=True)))
    bag = nn.Sequential(nn.EmbeddingBag(7, 4, sparse=True), nn.Linear(4, 3))
    optimizer = SINGD(bag)
    before = copy.deepcopy(bag.state_dict())
    with pytest.raises(
        RuntimeError, match="The gradient of '0.weight' is sparse; SINGD needs dense"
    ):
        steps(bag, optimizer, tokens(5, 3))
    assert all(torch.equal(v, before[k]) for k, v in bag.state_dict().items())


class TransposedLinear(nn.Module):
    """A linear layer whose weight is stored [in, out], as in GPT-2 implementations."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) / d_in**0.5)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class TransposedKind(LinearKind):
    """All that SINGD has to be told of it."""

    input_name = "x"

    def weight_to_matrix(self, layer, weight):
        return weight.T

    def matrix_to_weight(self, layer, matrix):
        return matrix.T


@pytest.fixture
def registered():
    register_layer(TransposedLinear, TransposedKind())
    yield
    del KINDS[TransposedLinear]


def test_a_layer_kind_of_the_users_own(registered):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    twin = nn.Sequential(TransposedLinear(4, 5), nn.Tanh(), TransposedLinear(5, 3)).double()
    for mine, theirs in ((model[0], twin[0]), (model[2], twin[2])):
        theirs.weight.data = mine.weight.data.T.clone()
        theirs.bias.data = mine.bias.data.clone()
    x = torch.randn(5, 4, dtype=torch.float64)
    options = dict(lr=0.1, T=2, lr_cov=0.1, structures=("dense", "diagonal"))
    steps(model, SINGD(model, **options), x)
    optimizer = SINGD(twin, **options)
    steps(twin, optimizer, x)
    for mine, theirs in ((model[0], twin[0]), (model[2], twin[2])):
        torch.testing.assert_close(theirs.weight, mine.weight.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(theirs.bias, mine.bias, rtol=0, atol=1e-12)
    assert "TransposedLinear" in str(optimizer)


def test_an_unregistered_layer_trains_with_the_fallback():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), TransposedLinear(5, 3))
    optimizer = SINGD(model)
    assert [g["algorithm"] for g in optimizer.param_groups] == ["singd", "adamw"]
    losses = steps(model, optimizer, torch.randn(5, 4))
    assert losses[-1] < losses[0]
