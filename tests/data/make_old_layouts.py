"""Makes factors_of_format_1.pt: checkpoints of every structure, with their factors as dense matrices beside them.

Format 1 stored rank-k triangular and hierarchical factors block by block. What it wrote must go on loading, to
the bit. Run once, with the last version that wrote that format, from the repository's root:

    PYTHONPATH=src python tests/data/make_old_layouts.py
"""

import copy
from pathlib import Path

import torch
from published import SINGD
from torch import nn

from singd import registered_structures
from singd.groups import FORMAT

STEPS, LATER = 3, 2
KEYS = ("K", "C", "m_K", "m_C")
LAYERS = ("0", "3", "6")
OPTIONS = dict(lr=0.05, T=1, lr_cov=0.05, damping=0.1, momentum=0.9)


def build(structure, dtype=torch.float64, **options):
    """Linear layers of 7 to 5 and 12 to 3, with a convolution between them: factors of sizes 3 to 13."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(7, 5), nn.Tanh(), nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), nn.Flatten(),
        nn.Tanh(), nn.Linear(12, 3),
    ).to(dtype)  # fmt: skip
    return model, SINGD(model, **{**OPTIONS, **options, "structures": (structure, structure)})


def train(model, optimizer, steps):
    """Some steps, each on data of its own."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 7, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (6,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)), y).backward()
        optimizer.step()


def weights(model):
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def dense_factors(optimizer):
    """The factors of all layers, K, C, m_K and m_C of one after the other, as one vector of dense matrices."""
    factors = [getattr(optimizer.factors(name), key) for name in LAYERS for key in KEYS]
    return torch.cat([A.dense().flatten() for A in factors])


def record(structure, **options):
    """A checkpoint after some steps, the factors in it, and the weights some steps later."""
    model, optimizer = build(structure, **options)
    train(model, optimizer, range(STEPS))
    saved = {
        "model": weights(model),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "dense": dense_factors(optimizer),
    }
    train(model, optimizer, range(STEPS, STEPS + LATER))
    return {**saved, "later": weights(model)}


if __name__ == "__main__":
    path = Path(__file__).parent / "factors_of_format_1.pt"
    if path.exists() or FORMAT != 1:
        raise SystemExit(f"{path.name} is of format 1; the point of it is that it stays as it was.")
    saved = {name: record(name) for name in [*registered_structures(), "hierarchical2_4"]}
    for name in ("hierarchical3_2", "trilrank4first"):
        half = record(name, dtype=torch.float32, preconditioner_dtype=torch.bfloat16)
        saved[f"{name}, bfloat16"] = half
    torch.save(saved, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.1f} kB")
