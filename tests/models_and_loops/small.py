"""What the checkpoint tests train: every kind of state, in a few kB."""

import torch
from published import SINGD
from torch import nn

OPTIONS = dict(
    lr=0.05,
    T=2,
    lr_cov=0.05,
    damping=0.1,
    weight_decay=0.01,
    structures=("block2diagonal", "dense"),
    fallback={"lr": 0.01},
)


class Small(nn.Sequential):
    """Layers of both algorithms: two linear ones, a convolution and a norm."""

    def __init__(self):
        super().__init__(
            nn.Conv1d(2, 3, 2), nn.Flatten(), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4, bias=False),
            nn.Tanh(), nn.Linear(4, 3),
        )  # fmt: skip


def batch(step, dtype=torch.float32):
    """The data of a step, whenever and wherever it is asked for."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 2, 4, generator=generator).to(dtype)
    return x, torch.randint(0, 3, (6,), generator=generator)


def train(model, optimizer, steps):
    for step in steps:
        x, y = batch(step, next(model.parameters()).dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def build(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    model = Small().to(dtype)
    return model, SINGD(model, **{**OPTIONS, **options})
