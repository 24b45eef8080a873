"""All optimizers of the comparison, with the options that make them do the same kind of work."""

from __future__ import annotations

import importlib
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from kfac_textbook import KFAC
from timing import PERIOD, Contender
from torch import nn
from torch.optim import SGD, AdamW

import singd
from singd.structures import registered_structures

PUBLISHED_STRUCTURES = {  # a published iteration can take seconds: those that have a mark
    "mlp": ("dense", "diagonal", "block30diagonal", "triltoeplitz"),
    "cnn": ("dense", "diagonal", "block30diagonal", "hierarchical15_15"),
    "vit": ("dense", "diagonal", "block30diagonal", "hierarchical15_15"),
}


def published_singd(folder: pathlib.Path) -> Any:
    """The class of the published package, which has the name of ours, from a folder of its own.

    Both live in one process, so that their runs can take turns: the published modules are imported while
    ours are out of sight, and then the other way round.

    Raises:
        FileNotFoundError: If the folder does not hold the package.
    """
    if not (folder / "singd").is_dir():
        raise FileNotFoundError(
            f"There is no published package in {folder}; `make bench` puts it there."
        )
    ours = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "singd"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        optimizer = importlib.import_module("singd.optim.optimizer").SINGD
    finally:
        sys.path.remove(str(folder))
        for name in [n for n in sys.modules if n.split(".")[0] == "singd"]:
            del sys.modules[name]
        sys.modules.update(ours)
    if optimizer is singd.SINGD:
        raise RuntimeError("The published package took the place of ours.")
    return optimizer


SGD_CONTENDER = Contender("SGD", lambda m: [SGD(m.parameters(), lr=1e-3, momentum=0.9)])


def _muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """torch's Muon takes matrices only; all else goes to AdamW, as its documentation says."""
    from torch.optim import Muon

    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [Muon(matrices, lr=1e-3), AdamW(rest, lr=1e-3)]


def others() -> list[Contender]:
    """Everything that is not SINGD, with T = 10 where a frequency can be chosen."""
    from pytorch_optimizer import SOAP, Shampoo

    frequency = {"precondition_frequency": PERIOD}
    steps = {"preconditioning_compute_steps": PERIOD}
    return [
        Contender("AdamW", lambda m: [AdamW(m.parameters(), lr=1e-3)]),
        Contender("Muon", _muon),
        Contender("SOAP, T=10", lambda m: [SOAP(m.parameters(), lr=1e-3, **frequency)], PERIOD),
        Contender("Shampoo, T=10", lambda m: [Shampoo(m.parameters(), lr=1e-3, **steps)], PERIOD),
        Contender(
            "textbook KFAC, T=10", lambda m: [KFAC(m, lr=1e-5, damping=1e-2, T=PERIOD)], PERIOD
        ),
    ]


def singd_of(optimizer: Any, structure: str, T: int, **options: Any) -> Callable[..., Any]:
    """Ours with the published values of all other options, as the published package has them."""
    if optimizer is singd.SINGD:
        options = {**singd.PUBLISHED, **options}
    options = {**options, "structures": (structure, structure), "T": T}
    return lambda m: [optimizer(m, **options)]


def ours(period: int, structures: Iterable[str] | None = None) -> list[Contender]:
    """SINGD with each registered structure for both factors."""
    names = registered_structures() if structures is None else structures
    return [
        Contender(f"{name}, T={period}", singd_of(singd.SINGD, name, period), period, "ours", name)
        for name in names
    ]


def without_cache() -> Contender:
    """Dense factors whose products are not kept between updates."""
    make = singd_of(singd.SINGD, "dense", PERIOD, cache_products=False)
    return Contender(f"dense without cache, T={PERIOD}", make, PERIOD, "ours", "dense")


def published(optimizer: Any, workload: str, period: int) -> list[Contender]:
    """The published package with its structures."""
    return [
        Contender(
            f"published {name}, T={period}",
            singd_of(optimizer, name, period, warn_unsupported=False),
            period,
            "published",
            name,
        )
        for name in PUBLISHED_STRUCTURES[workload]
        if period > 1 or "toeplitz" not in name  # 8 seconds for an iteration, in each phase
    ]
