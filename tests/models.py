"""Small models in float64 that the tests share."""

import torch
from torch import nn


class Shared(nn.Module):
    """A weight-shared model: tokens through linear layers, one of them called twice, then a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 7)
        self.mix = nn.Linear(7, 7, bias=False)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.mix(torch.tanh(self.embed(x)))
        return self.head(self.mix(torch.tanh(x)).mean(1))


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, (3, 2), dilation=(1, 2), groups=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


SHAPES = {"mlp": (6,), "cnn": (2, 9, 9), "shared": (4, 5)}
MODELS = {"mlp": mlp, "cnn": cnn, "shared": Shared}


def model_and_batches(name, steps=6, batch=5, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().double()
    batches = [
        (torch.randn(batch, *SHAPES[name], dtype=torch.float64), torch.randint(0, 3, (batch,)))
        for _ in range(steps)
    ]
    return model, batches


def train(model, optimizer, batches, loss_function=nn.functional.cross_entropy):
    """The plain loop; returns the losses."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_function(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(model, optimizer, twin, other, atol=0.0):
    """Two runs ended with the same weights and the same factors."""
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            for a, b in zip(optimizer.factors(name), other.factors(name), strict=True):
                torch.testing.assert_close(a.dense(), b.dense(), rtol=0, atol=atol)
