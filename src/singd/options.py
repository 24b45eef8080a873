"""The options of a parameter group: defaults, checks, and what of them goes into a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from singd.structures import StructureSpec, structure

# Of a checkpoint; raised when an older version could not read a newer one's. 2 stores bordered factors natively.
FORMAT = 2

KFAC_APPROX = ("expand", "reduce")
LOSS_AVERAGE = (None, "batch", "batch+sequence")
ALGORITHMS = ("singd", "adamw")

#: What the fallback group runs with unless ``fallback`` says otherwise: AdamW's usual values, no decay.
ADAMW: Mapping[str, Any] = MappingProxyType(
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
)


def _number(name: str, value: Any, *, below: float = math.inf) -> None:
    """Raise unless ``value`` is a finite number in ``[0, below)``."""
    what = "a finite number >= 0" if below == math.inf else f"a number in [0, {below:g})"
    if isinstance(value, Tensor) and value.numel() == 1 and name == "lr":
        value = value.item()  # torch lets a learning rate be a tensor
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {what}, got {value!r}.")
    if not (math.isfinite(value) and 0 <= value < below):
        raise ValueError(f"{name} must be {what}, got {value!r}.")


def _choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def dtypes(preconditioner_dtype: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    """``preconditioner_dtype`` as a pair for K and C; None stands for the weight's dtype."""
    value = preconditioner_dtype
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(
        d is None or (isinstance(d, torch.dtype) and d.is_floating_point) for d in pair
    ):
        raise ValueError(
            "preconditioner_dtype must be None, a floating-point torch.dtype or a pair of them "
            f"(for K, for C), got {value!r}."
        )
    return pair


def resolve(structures: Any) -> tuple[StructureSpec, StructureSpec]:
    """``structures`` as a pair for K and C.

    Raises:
        ValueError: If it is no pair, or names an unknown structure.
    """
    if (
        isinstance(structures, str)
        or not isinstance(structures, (tuple, list))
        or len(structures) != 2
    ):
        raise ValueError(f"structures must be a pair (for K, for C), got {structures!r}.")
    return structure(structures[0]), structure(structures[1])


def step_size(lr_cov: float | Callable[[int], float], step: int) -> float:
    """``lr_cov`` at a step, checked where a callable is only known then."""
    if not callable(lr_cov):
        return lr_cov
    value = lr_cov(step)
    _number(f"lr_cov({step})", value)
    return value


def check_singd(group: Mapping[str, Any]) -> None:
    """Check the options of a group that SINGD preconditions.

    Raises:
        TypeError: For a value of the wrong type.
        ValueError: For a value out of range; the sentence names the choices.
    """
    for name in ("lr", "momentum", "damping", "alpha1", "weight_decay"):
        _number(name, group[name])
    if not callable(group["lr_cov"]):
        _number("lr_cov", group["lr_cov"])
    T = group["T"]
    if isinstance(T, bool) or not isinstance(T, int):
        raise TypeError(f"T must be an integer >= 1, got {T!r}.")
    if T < 1:
        raise ValueError(f"T must be an integer >= 1, got {T!r}.")
    _choice("loss_average", group["loss_average"], LOSS_AVERAGE)
    _choice("kfac_approx", group["kfac_approx"], KFAC_APPROX)
    for name in ("kfac_like", "normalize_lr_cov"):
        _boolean(name, group[name])
    dtypes(group["preconditioner_dtype"])
    resolve(group["structures"])


def check_adamw(group: Mapping[str, Any]) -> None:
    """Check the options of a fallback group; raises as :func:`check_singd`."""
    for name in ("lr", "eps", "weight_decay"):
        _number(name, group[name])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers in [0, 1), got {betas!r}.")
    for beta in betas:
        _number("betas", beta, below=1.0)


def fallback_options(fallback: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The fallback's options, completed; None where it is switched off."""
    if fallback is None:
        return None
    if not isinstance(fallback, Mapping):
        raise TypeError(f"fallback must be a dict of AdamW options or None, got {fallback!r}.")
    unknown = [name for name in fallback if name not in ADAMW]
    if unknown:
        raise ValueError(f"Unknown fallback option {unknown[0]!r}; choose from {', '.join(ADAMW)}.")
    options = {**ADAMW, **fallback}
    check_adamw(options)
    return options


def saved(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as plain values for a checkpoint: names for structures, no callables."""
    plain = {name: value for name, value in group.items() if not callable(value)}
    plain["structures"] = tuple(s.name for s in resolve(group["structures"]))
    return plain
