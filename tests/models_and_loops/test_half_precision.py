"""Weights in half precision: 500 steps on digits in every structure, without a NaN."""

import pytest
import torch
from published import SINGD
from sklearn.datasets import load_digits
from torch import nn

from singd import registered_structures

STEPS, BATCH = 500, 32


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16 - 0.3, dtype=torch.float32), torch.tensor(y)


@pytest.mark.parametrize("structure", registered_structures())
@pytest.mark.parametrize(
    "dtype, factors",
    [
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_500_steps_on_digits(digits, structure, dtype, factors):
    x, y = digits[0].to(dtype), digits[1]
    model = nn.Sequential(nn.Linear(64, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 10)).to(
        dtype
    )
    optimizer = SINGD(
        model,
        lr=0.01,
        T=5,
        lr_cov=0.02,
        structures=(structure, structure),
        preconditioner_dtype=factors,
    )
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(STEPS):
        i = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[i]).float(), y[i])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    assert torch.isfinite(losses).all()
    assert losses[-50:].mean() < 0.5 * losses[:5].mean()
    for layer in ("0", "3"):
        for matrix in optimizer.factors(layer):
            assert matrix.dtype == (factors or dtype)
            assert torch.isfinite(matrix.dense()).all()
