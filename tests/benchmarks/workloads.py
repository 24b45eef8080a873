"""The three networks that the benchmarks train, with one batch each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Workload:
    """A network and its batch."""

    model: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    classes: int

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.inputs, generator=generator)
        return x, torch.randint(0, self.classes, self.inputs[:1], generator=generator)


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def cnn() -> nn.Module:
    """Channels 3-32-64-64-128, kernels 3 x 3, strides 1 2 1 2."""
    layers: list[nn.Module] = []
    channels = (3, 32, 64, 64, 128)
    for i, stride in enumerate((1, 2, 1, 2)):
        layers += [nn.Conv2d(channels[i], channels[i + 1], 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Block(nn.Module):
    """A pre-norm transformer block of linear layers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        B, S, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.project(mixed.transpose(1, 2).reshape(B, S, d))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """4 blocks of width 192 on 64 tokens: 32 x 32 images in 4 x 4 patches."""

    def __init__(self, width: int = 192, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.zeros(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, 3) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


WORKLOADS = {
    "mlp": Workload(mlp, (128, 784), 10),
    "cnn": Workload(cnn, (32, 3, 32, 32), 10),
    "vit": Workload(ViT, (16, 3, 32, 32), 10),
}


def _small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


# for a look at whether everything runs
SMALL = {
    "mlp": Workload(
        lambda: nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 10)), (8, 40), 10
    ),
    "cnn": Workload(_small_cnn, (2, 3, 8, 8), 10),
    "vit": Workload(lambda: ViT(12, 1), (2, 3, 32, 32), 10),
}
