"""The optimizers that are compared. A new one is a line in ``METHODS``.

Each is a function of the model, the learning rate and what SINGD has to be told of the loss. It returns one
optimizer, or several that step together. The learning rate is the only thing that is tuned; all momenta
are what the method's authors recommend, and no method decays weights.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from tasks import BATCH_TASKS
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from singd import PUBLISHED, SINGD, StructuredMatrix
from singd.structures import static

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
from contenders import published_singd
from kfac_textbook import KFAC

PEERS = pathlib.Path(__file__).parents[2] / "build" / "peers"
Make = Callable[[nn.Module, float, dict[str, Any]], Any]


@dataclass
class Method:
    """A way to train.

    Attributes:
        make: From the model, the learning rate and the task's options to one optimizer or several.
        near: A learning rate from which the search for the best one starts.
        at: The same for single tasks, by name, where it is known better.
        default: The learning rate that it has without a word, if it has one.
    """

    make: Make
    near: float = 1e-2
    at: dict[str, float] = field(default_factory=dict)
    default: float | None = None


def split(model: nn.Module, chosen: Callable[[nn.Parameter], bool]) -> tuple[list, list]:
    """The parameters that are chosen, and the rest."""
    everything = list(model.parameters())
    return [p for p in everything if chosen(p)], [p for p in everything if not chosen(p)]


def adamw(params: Iterable[nn.Parameter], lr: float) -> AdamW:
    return AdamW(params, lr=lr, weight_decay=0.0)


def muon(model: nn.Module, lr: float, options: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """torch's Muon takes matrices only; all else, and embeddings, go to AdamW at the same rate."""
    from torch.optim import Muon

    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    loose = {
        id(p)
        for m in model.modules()
        for p in m._parameters.values()
        if "position" in m._parameters
    }
    matrices, rest = split(model, lambda p: p.ndim == 2 and id(p) not in tables | loose)
    same = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    return [Muon(matrices, lr=lr, **same), *([adamw(rest, lr)] if rest else [])]


def soap(model: nn.Module, lr: float, options: dict[str, Any]) -> Any:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=lr, weight_decay=0.0, precondition_frequency=10)


def shampoo(model: nn.Module, lr: float, options: dict[str, Any]) -> Any:
    """The scalable kind, which takes the size of its steps from another optimizer's."""
    from pytorch_optimizer import ScalableShampoo

    steps = {"start_preconditioning_step": 5, "preconditioning_compute_steps": 10}
    return ScalableShampoo(model.parameters(), lr=lr, weight_decay=0.0, **steps)


def textbook_kfac(damping: float) -> Make:
    return lambda model, lr, options: KFAC(model, lr=lr, damping=damping, T=5)


def published(**settings: Any) -> Make:
    """The published package; what it leaves out goes to AdamW."""

    def make(model: nn.Module, lr: float, options: dict[str, Any]) -> Any:
        theirs = published_singd(PEERS)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        ids = {id(p) for m in layers for p in m.parameters()}
        mine, rest = split(model, lambda p: id(p) in ids)
        singd = theirs(model, params=mine, lr=lr, warn_unsupported=False, **{**options, **settings})
        return [singd, *([AdamW(rest, lr=1e-3, weight_decay=0.0)] if rest else [])]

    return make


def singd(**settings: Any) -> Make:
    """SINGD with some arguments; what it has to be told of the loss comes with the task."""
    return lambda model, lr, options: SINGD(model, lr=lr, **{**settings, **options})


# of the published rule, the best settings that we found
FASTER = {**PUBLISHED, "T": 5, "lr_cov": 0.1, "normalize_lr_cov": True}
THEIRS = {name: FASTER[name] for name in ("T", "lr_cov", "normalize_lr_cov", "damping", "alpha1")}


def both(structure: str) -> dict[str, Any]:
    return {"structures": (structure, structure)}


SMALL = dict.fromkeys(BATCH_TASKS, 1e-2)

METHODS: dict[str, Method] = {
    "SGD": Method(
        lambda m, lr, _: SGD(m.parameters(), lr=lr, momentum=0.9),
        1e-1,
        {"autoencoder": 1e-3, "curves": 1e-3},
    ),
    "AdamW": Method(
        lambda m, lr, _: adamw(m.parameters(), lr),
        3e-3,
        {"regression": 1e-1},
        1e-3,
    ),
    "Muon": Method(muon, 1e-2, {"regression": 1e-1}, 1e-3),
    "SOAP": Method(soap, 3e-3, {"regression": 1e-1}, 3e-3),
    "Shampoo": Method(shampoo, 1e-2, {}, 1e-3),
    "KFAC": Method(textbook_kfac(1e-2), 1e-3),
    "published singd": Method(published(**THEIRS), 1e-2, {"autoencoder": 1e-3}, 1e-3),
    "SINGD 0.1": Method(singd(**PUBLISHED), 1e-2, {"autoencoder": 3e-3, "ViT": 3e-3}, 1e-3),
    "SINGD 0.1, faster": Method(singd(**FASTER), 1e-2, {"autoencoder": 1e-3}),
    "SINGD 0.1, diagonal": Method(
        singd(**PUBLISHED | both("diagonal")), 1e-2, {"autoencoder": 1e-3}, 1e-3
    ),
    "SINGD": Method(singd(), 3e-3, {"regression": 3e-1, **SMALL}, 1e-3),
    # dense factors of wide layers know more directions than a small batch has rows: more damping
    "SINGD, dense": Method(
        singd(**both("dense"), damping=0.1), 3e-3, {"regression": 1.0, **SMALL}, 1e-3
    ),
    "SINGD, diagonal": Method(singd(**both("diagonal")), 3e-3, {"regression": 3e-1}, 1e-3),
}


@dataclass(eq=False, repr=False)
class ScaledIdentity(StructuredMatrix):
    """One number times the identity: a factor that has a size, and sees no direction."""

    s: Tensor  # [1]
    size: int = static()

    @classmethod
    def eye(cls, n: int, **kw: Any) -> ScaledIdentity:
        return cls(torch.ones(1, **kw), n)

    @property
    def n(self) -> int:
        return self.size

    def mm(self, X: Tensor) -> Tensor:
        return self.s * X

    tmm = mm

    def compose(self, other: ScaledIdentity) -> ScaledIdentity:
        return ScaledIdentity(self.s * other.s, self.size)

    def project(self, Y: Tensor) -> ScaledIdentity:
        return ScaledIdentity(Y.square().sum().reshape(1) / self.size, self.size)

    def trace(self) -> Tensor:
        return self.s[0].float() * self.size


def half_decade(lr: float, steps: int = 0) -> float:
    """The number 1 or 3 times a power of ten that is nearest to ``lr``, and then some half decades on."""
    k = round(2 * math.log10(lr)) + steps
    return float(f"{(1 if k % 2 == 0 else 3)}e{k // 2}")


def quarters(lr: float) -> tuple[float, float]:
    """The rates a quarter of a decade below and above ``lr``, in two digits."""
    return float(f"{lr / 10**0.25:.1e}"), float(f"{lr * 10**0.25:.1e}")


def without(name: str, **settings: Any) -> tuple[str, Method]:
    """The defaults with one thing changed."""
    return name, Method(singd(**settings), 3e-3, SMALL)


def narrow_blocks(model: nn.Module, lr: float, options: dict[str, Any]) -> SINGD:
    """The defaults, but blocks no wider than the layer has outputs, so that none takes more than the weight."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    groups: list[dict[str, Any]] = [
        {
            "params": list(layer.parameters()),
            "structures": (f"block{min(64, len(layer.weight))}diagonal", "diagonal"),
        }
        for layer in layers
    ]
    theirs = {id(p) for group in groups for p in group["params"]}
    _, rest = split(model, lambda p: id(p) in theirs)
    return SINGD(model, [*groups, *([{"params": rest}] if rest else [])], lr=lr, **options)


# one thing of the defaults changed in each, beside the defaults and AdamW: run with --ablations
ABLATIONS: dict[str, Method] = {name: METHODS[name] for name in ("AdamW", "SINGD")} | dict(
    (
        without("scale only", structures=(ScaledIdentity, ScaledIdentity)),
        without("diagonal", **both("diagonal")),
        without("inputs only", structures=("block64diagonal", ScaledIdentity)),
        without("outputs only", structures=(ScaledIdentity, "diagonal")),
        without("outputs only, dense", structures=(ScaledIdentity, "dense")),
        without("no matched size", match_rms=None),
        without("published", **PUBLISHED),
        without("momentum after", momentum_on="direction"),
        without("absolute damping", relative_damping=False),
        without("T = 10", T=10),
        ("narrow blocks", Method(narrow_blocks, 3e-3, SMALL)),
    )
)
