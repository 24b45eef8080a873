"""SINGD as users meet it: groups, the fallback, schedulers, what it prints."""

import copy

import pytest
import torch
from models import model_and_batches, train
from published import SINGD
from torch import nn


class Everything(nn.Module):
    """Layers of ours, norms, an unsupported layer and a loose parameter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        x = self.norm(self.linear(x)) * self.scale
        return self.head(torch.tanh(self.bilinear(x, x)))


def run(model, optimizer, steps=8):
    _, batches = model_and_batches("mlp", steps=steps)
    batches = [(x.float(), y) for x, y in batches[:1] * steps]
    return train(model, optimizer, batches)


def test_every_parameter_trains():
    model = Everything()
    before = copy.deepcopy(model.state_dict())
    optimizer = SINGD(model, lr=0.01)
    losses = run(model, optimizer)
    assert losses[-1] < losses[0]
    assert not any(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [g["algorithm"] for g in optimizer.param_groups] == ["singd", "adamw"]


def test_the_fallback_is_torchs_adamw():
    model = Everything()
    twin = copy.deepcopy(model)
    adam = dict(lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    optimizer = SINGD(model, lr=0.0, fallback=adam)
    others = [p for n, p in twin.named_parameters() if n.split(".")[0] not in ("linear", "head")]
    run(model, optimizer)
    run(twin, torch.optim.AdamW(others, **adam))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_print_shows_a_table_of_layers():
    optimizer = SINGD(Everything(), structures=("block3diagonal", "diagonal"))
    lines = {line.split()[0]: line for line in str(optimizer).splitlines()[3:]}
    assert lines["linear"].split()[1:7] == ["Linear", "8", "x", "7", "block3diagonal", "diagonal"]
    assert lines["norm.weight"].split()[1] == "adamw"
    assert set(lines) == {
        "linear", "head", "norm.weight", "norm.bias", "scale", "bilinear.weight", "bilinear.bias",
    }  # fmt: skip


def test_state_bytes_in_the_table_are_those_of_the_state():
    model = Everything()
    optimizer = SINGD(model)
    run(model, optimizer, steps=1)
    K_m_K, C_m_C, momentum = 2 * 7 * 7, 2 * 8 * 8, 8 * 7
    line = next(line for line in str(optimizer).splitlines() if line.startswith("linear"))
    assert line.split()[7].replace(",", "") == str(4 * (K_m_K + C_m_C + momentum))


def test_groups_have_their_own_options():
    model, batches = model_and_batches("mlp")
    frozen = copy.deepcopy(model[4].state_dict())
    optimizer = SINGD(
        model,
        params=[
            {"params": model[0].parameters(), "structures": ("diagonal", "triltoeplitz")},
            {"params": model[2].parameters(), "T": 1, "lr_cov": 0.1},
            {"params": model[4].parameters(), "lr": 0.0},
        ],
        lr=0.1,
    )
    train(model, optimizer, batches)
    assert optimizer.factors("0").K.numel == 7
    assert optimizer.factors("2").K.numel == 64
    assert all(torch.equal(v, frozen[k]) for k, v in model[4].state_dict().items())


def test_biases_in_a_group_without_decay_still_share_the_matrix():
    model, batches = model_and_batches("mlp")
    twin = copy.deepcopy(model)
    split = [
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.0},
    ]
    train(model, SINGD(model, split, lr=0.1, T=1), batches)
    train(twin, SINGD(twin, lr=0.1, T=1), batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_groups_added_later_train():
    model, batches = model_and_batches("mlp", steps=8)
    optimizer = SINGD(model, params=model[0].parameters(), lr=0.1, T=1)
    train(model, optimizer, batches[:2])
    before = copy.deepcopy(model[2].state_dict())
    optimizer.add_param_group(
        {"params": model[2].parameters(), "structures": ("diagonal", "dense")}
    )
    train(model, optimizer, batches[2:])
    assert not torch.equal(model[2].weight, before["weight"])
    assert optimizer.factors("2").K.numel == 8


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.LinearLR(o),
    ],
)
def test_schedulers_drive_every_group(scheduler):
    model = Everything()
    optimizer = SINGD(model, lr=0.1)
    schedule = scheduler(optimizer)
    seen = []
    for _ in range(5):
        run(model, optimizer, steps=1)
        schedule.step()
        seen.append([g["lr"] for g in optimizer.param_groups])
    assert all(len({lrs[i] for lrs in seen}) > 1 for i in range(2))


def test_a_closure_gives_the_loss():
    model, batches = model_and_batches("mlp", steps=1)
    optimizer = SINGD(model, lr=0.1)
    x, y = batches[0]

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.item() > optimizer.step(closure).item()


def test_nothing_is_gathered_between_updates():
    model, batches = model_and_batches("mlp", steps=3)
    optimizer = SINGD(model, T=2)
    gathered = []
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        gathered.append(len(optimizer._collector.statistics))
        optimizer.step()
    assert gathered == [3, 0, 3]


def test_zero_grad_clears_the_statistics_of_the_gradients():
    model, batches = model_and_batches("mlp", steps=2)
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model, T=1, lr=0.1), SINGD(twin, T=1, lr=0.1)
    (x, y), second = batches
    for clear in (optimizer.zero_grad, model.zero_grad):
        nn.functional.cross_entropy(model(x), y).backward()
        clear()
    train(model, optimizer, [second])
    train(twin, other, [second])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "structure", ["dense", "hierarchical2_3", "trilrank2first", "block3diagonal"]
)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_cached_products_change_nothing(name, structure):
    model, batches = model_and_batches(name, steps=8)
    twin = copy.deepcopy(model)
    options = dict(lr=0.05, T=3, lr_cov=0.2, damping=0.1, structures=(structure, structure))
    train(model, SINGD(model, **options), batches)
    train(twin, SINGD(twin, cache_products=False, **options), batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
