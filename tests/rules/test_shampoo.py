"""The rule that sees gradients alone: what it preconditions that has no rows, and that it asks for no hook."""

import copy

import pytest
import rule_textbook
import torch
from rule_runs import FAST, PLAIN
from torch import nn

from singd import SINGD

OPTIONS = {**PLAIN, **FAST, "rule": "shampoo"}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.cell = kind(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x.transpose(0, 1))[0][-1])


class Loose(nn.Module):
    """A matrix of its own, one of one row, a vector, and a tensor of three dimensions."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(6, 3) / 3)
        self.row = nn.Parameter(torch.ones(1, 6))
        self.bias = nn.Parameter(torch.zeros(3))
        self.cube = nn.Parameter(torch.randn(2, 6, 6) / 6)

    def forward(self, x):
        return (x * self.row @ self.cube.sum(0)).mean(1) @ self.mixing + self.bias


MODELS = {
    "attention": (Attention, ["attention.in_proj_weight"]),
    "lstm": (Recurrent, ["cell.weight_ih_l0", "cell.weight_hh_l0"]),
    "gru": (lambda: Recurrent(nn.GRU), ["cell.weight_ih_l0", "cell.weight_hh_l0"]),
    "loose": (Loose, ["mixing"]),
}


def train(model, optimizer, steps=4):
    losses = []
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 5, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (16,), generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_matrices_outside_of_layers_move_as_the_textbook_says(name):
    make, loose = MODELS[name]
    model = make().double()
    twin = copy.deepcopy(model)
    optimizer = SINGD(model, **{**OPTIONS, "momentum": 0.0})
    assert not any(m._forward_hooks for m in model.modules())
    train(model, optimizer)
    assert all(f"{weight} " in repr(optimizer) for weight in loose)

    update, direction = rule_textbook.RULES["shampoo"]
    states = {p: {} for p in twin.parameters()}
    alone = SINGD(twin, **{**OPTIONS, "momentum": 0.0})  # moves what is in a layer, and all vectors
    names = {p: n for n, p in twin.named_parameters()}

    class Between:
        """The optimizer, whose steps on loose matrices are replaced by the textbook's."""

        zero_grad = alone.zero_grad

        def step(self):
            own = {}
            for p, n in names.items():
                if n in loose:
                    d_o, d_i = p.shape
                    options = dict(damping=0.1, lr_cov=0.2, alpha1=0.5)
                    update(
                        states[p],
                        torch.eye(d_i).double(),
                        torch.eye(d_o).double(),
                        p.grad,
                        **options,
                    )
                    own[p] = p.detach() - 0.05 * direction(states[p], p.grad)
            alone.step()
            for p, value in own.items():
                p.data.copy_(value)

    train(twin, Between())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)
    for weight in loose:
        kept = optimizer.factors(weight)
        state = states[dict(twin.named_parameters())[weight]]
        for key in ("K", "C", "m_K", "m_C"):
            torch.testing.assert_close(getattr(kept, key).dense(), state[key], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", ["singd", "kfac"])
def test_rules_that_need_rows_leave_them_to_adamw(name, rule):
    make, loose = MODELS[name]
    optimizer = SINGD(make(), **{**OPTIONS, "rule": rule})
    params = dict(optimizer._names)
    adam = {
        params[p] for g in optimizer.param_groups if g["algorithm"] == "adamw" for p in g["params"]
    }
    assert set(loose) <= adam
    with pytest.raises(ValueError, match=f"SINGD doesn't precondition layer '{loose[0]}'"):
        optimizer.factors(loose[0])


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_resumes(name):
    make, loose = MODELS[name]
    model = make().double()
    options = {
        **OPTIONS,
        "lr": 0.01,
        "scaled_start": True,
        "relative_damping": True,
        "match_rms": 0.2,
    }
    options |= {"normalize_lr_cov": "spectral", "lr": 0.1}
    optimizer = SINGD(model, **options)
    losses = train(model, optimizer, 10)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses += train(model, optimizer, 30)
    assert losses[-1] < 0.8 * losses[0]
    twin = make().double()
    other = SINGD(twin, **options)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert train(twin, other, 30) == losses[10:]
    assert optimizer.stats()[loose[0]]["norm_K"] > 0


@pytest.mark.parametrize("name", MODELS)
def test_without_a_fallback_it_leaves_out_vectors_only(name):
    make, loose = MODELS[name]
    with pytest.warns(UserWarning, match="SINGD leaves out parameters") as said:
        optimizer = SINGD(make(), **OPTIONS, fallback=None)
    left = str(said[0].message)
    assert not any(weight in left for weight in loose)
    assert all(optimizer.factors(weight) for weight in loose)


def test_a_group_of_loose_matrices_takes_the_rule_of_its_own():
    """Rows where there are layers, the gradient where there are none."""
    model = Attention()
    loose = [model.attention.in_proj_weight]
    rest = [p for p in model.parameters() if p is not loose[0]]
    groups = [{"params": rest}, {"params": loose, "rule": "shampoo"}]
    optimizer = SINGD(model, groups, **{**OPTIONS, "rule": "kfac"})
    train(model.double(), optimizer, 3)
    assert optimizer.factors("head")._fields == ("U", "G", "U_inv", "G_inv")
    assert optimizer.factors("attention.in_proj_weight")._fields == ("K", "C", "m_K", "m_C")


def test_half_precision_gradients():
    model = Attention().bfloat16()
    optimizer = SINGD(
        model, **{**OPTIONS, "preconditioner_dtype": torch.float32, "relative_damping": True}
    )
    x, y = torch.randn(8, 5, 6).bfloat16(), torch.randint(0, 3, (8,))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
    K = optimizer.factors("attention.in_proj_weight").K
    assert K.dtype == torch.float32 and K.dense().isfinite().all()
