"""The options of a parameter group: their published values, checks, and what of them goes into a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from singd.rules import Rule, find_rule
from singd.structures import StructureSpec, structure

Group: TypeAlias = Mapping[str, Any]
"""The options of a parameter group."""

Groups: TypeAlias = Sequence[Group]

FORMAT = 2  # of a checkpoint; raised when an older version could not read a newer one's

#: The options that are one of a few values.
CHOICES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "loss_average": (None, "batch", "batch+sequence"),
        "kfac_approx": ("expand", "reduce"),
        "repeated_calls": (None, "examples", "positions"),
        "normalize_lr_cov": (False, True, "spectral"),
        "momentum_on": ("direction", "gradient"),
        "algorithm": ("singd", "adamw"),
    }
)
COUNTING = ("loss_average", "kfac_approx", "repeated_calls")  # what a backward pass reads
NUMBERS = ("lr", "momentum", "damping", "alpha1", "weight_decay", "match_rms", "lr_cov")
SWITCHES = (
    *("batch_first", "kfac_like", "relative_damping"),
    *("scaled_start", "fast_start", "nesterov"),
)

#: What the fallback group runs with unless ``fallback`` says otherwise: AdamW's usual values, no decay.
ADAMW: Group = MappingProxyType(dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0))

#: The fallback's options by default: AdamW's usual values at SINGD's learning rate.
SAME: Mapping[str, Any] = MappingProxyType({})

#: Keyword arguments with which SINGD is the published method, each in its published meaning.
PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {
        **dict(
            momentum=0.9, nesterov=False, momentum_on="direction", match_rms=None, weight_decay=0.0
        ),
        **dict(structures=("dense", "dense"), rule="singd", damping=1e-3, relative_damping=False),
        **dict(T=10, lr_cov=1e-2, alpha1=0.5, normalize_lr_cov=False),
        **dict(scaled_start=False, fast_start=False, cache_products=True, fallback=ADAMW),
        **dict(loss_average="batch", kfac_approx="expand", batch_first=True, repeated_calls=None),
    }
)

OPTIONS = (
    *(name for name in PUBLISHED if name not in ("fallback", "cache_products")),
    *("lr", "kfac_like", "preconditioner_dtype"),
)
"""The names of the options of a group that SINGD preconditions."""

#: What torch calls the options that no group of ours knows, but that schedulers add.
_ADDED = ("params", "param_names", "initial_lr", "algorithm", "format", "betas", "eps")


@dataclass(frozen=True)
class Growing:
    """A schedule for ``T``: the factors are updated in every step at first, then rarer and rarer.

    At step t they are updated if ``t // patience`` steps have passed since the last time, at least one and at
    most ``most``.

    Attributes:
        most: The longest interval.
        patience: How many steps each interval lasts, about.
    """

    most: int = 10
    patience: int = 20

    def __call__(self, step: int) -> int:
        return min(self.most, max(1, step // self.patience))


GROWING = Growing()


def _number(name: str, value: Any, *, below: float = math.inf) -> None:
    """Raise unless ``value`` is a finite number in ``[0, below)``."""
    what = "a finite number >= 0" if below == math.inf else f"a number in [0, {below:g})"
    if isinstance(value, Tensor) and value.numel() == 1 and name == "lr":
        value = value.item()  # torch lets a learning rate be a tensor
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {what}, got {value!r}.")
    if not (math.isfinite(value) and 0 <= float(value) < below):
        raise ValueError(f"{name} must be {what}, got {value!r}.")


def check_choices(group: Group, names: Iterable[str] = tuple(CHOICES)) -> None:
    """Raise a ValueError unless options are among their choices."""
    for name in names:
        value, choices = group[name], CHOICES[name]
        if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
            shown = ", ".join(map(repr, choices))
            raise ValueError(f"{name} must be one of {shown}, got {value!r}.")


def _check_switches(group: Group, names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}.")


def dtypes(preconditioner_dtype: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    """``preconditioner_dtype`` as a pair for K and C; None stands for the weight's dtype."""
    value = preconditioner_dtype
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    known = [d is None or (isinstance(d, torch.dtype) and d.is_floating_point) for d in pair]
    if known != [True, True]:
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
    if not isinstance(structures, (tuple, list)) or len(structures) != 2:
        raise ValueError(f"structures must be a pair (for K, for C), got {structures!r}.")
    return structure(structures[0]), structure(structures[1])


def step_size(group: Group, state: Mapping[str, Any]) -> float:
    """``lr_cov`` in a layer's next step, checked where a callable is only known then."""
    value, step = group["lr_cov"], state.get("step", 0)
    if callable(value):
        value = value(step)
        _number(f"lr_cov({step})", value)
    return value


def interval(T: int | Callable[[int], int], step: int) -> int:
    """The steps between updates at a step, checked where a callable is only known then."""
    value = T(step) if callable(T) else T
    what = f"T({step})" if callable(T) else "T"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{what} must be an integer >= 1, got {value!r}.")
    if value < 1:
        raise ValueError(f"{what} must be an integer >= 1, got {value!r}.")
    return int(value)


def is_due(group: Group, state: Mapping[str, Any]) -> bool:
    """Whether the factors of a layer are updated in the next step: at steps 0, T, 2T, ...

    Where T is a callable: once T(step) steps have passed since the last update.
    """
    step, last = state.get("step", 0), state.get("last_update", -1)
    every = interval(group["T"], step)
    if callable(group["T"]):
        return last < 0 or step - last >= every
    return step % every == 0


def rule_of(group: Group) -> Rule:
    """The rule that moves the factors of a group."""
    return find_rule("ikfac" if group["kfac_like"] else group["rule"])


def check_singd(group: Group) -> None:
    """Check the options of a group that SINGD preconditions.

    Raises:
        TypeError: For a value of the wrong type.
        ValueError: For a value out of range; the sentence names the choices.
    """
    check_values(group)
    rule = find_rule(group["rule"])
    if group["kfac_like"] and rule.name not in ("singd", "ikfac"):
        raise ValueError(
            f"kfac_like=True means rule='ikfac', but rule is {rule.name!r}; give one of them."
        )
    specs = resolve(group["structures"])
    if type(rule).refusal is Rule.refusal:
        return  # it refuses none, so none is made: a user's structure may not exist in size 1
    for spec in specs:
        works_with = rule.refusal(spec(1, device="meta"))
        if works_with is not None:
            raise ValueError(
                f"The rule {rule.name!r} works with {works_with} only, got the structure {spec.name!r}."
            )


def check_before_step(
    param_groups: Groups, seen: dict[int, Any], names: Mapping[Any, str], ours: Collection[Any]
) -> None:
    """Check what a user may have changed in the groups since they were seen last, and the gradients.

    Args:
        param_groups: The optimizer's.
        seen: What each of them said when it was checked last, by its number; brought up to date.
        names: Of all parameters.
        ours: The parameters that SINGD preconditions.

    Raises:
        RuntimeError: If a gradient is sparse.
        TypeError: For a value of the wrong type.
        ValueError: For a value out of range; the sentence names the choices.
    """
    for i, group in enumerate(param_groups):
        said = {name: value for name, value in group.items() if name != "params"}
        if said != seen.get(i) or isinstance(group["lr"], Tensor):  # (a tensor changes in place)
            mine = "singd" if any(p in ours for p in group["params"]) else "adamw"
            if group["params"] and group["algorithm"] != mine:
                raise ValueError(
                    f"The algorithm of group {i} cannot change to {group['algorithm']!r}, because its layers were "
                    "prepared for the other one; build another optimizer."
                )
            (check_values if group["algorithm"] == "singd" else check_adamw)(group)
            seen[i] = said
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    f"The gradient of {names[p]!r} is sparse; SINGD needs dense ones (sparse=False)."
                )


def check_values(group: Group) -> None:
    """Check all options but the rule and the structures; raises as `check_singd`."""
    for name in NUMBERS:
        value = group[name]
        said = value is None if name == "match_rms" else name == "lr_cov" and callable(value)
        if not said:
            _number(name, value)
    for name in ("alpha1", "momentum") if group["momentum_on"] == "gradient" else ("alpha1",):
        _number(name, group[name], below=1.0)
    if not callable(group["T"]):
        interval(group["T"], 0)
    check_choices(group, CHOICES)
    _check_switches(group, SWITCHES)
    dtypes(group["preconditioner_dtype"])


def check_names(group: Group, known: Mapping[str, Any]) -> None:
    """Refuse an option that nobody reads, such as a misspelt one.

    Raises:
        ValueError: With the name and the choices.
    """
    choices = {*known, *_ADDED}
    for name in group:
        if name not in choices and not name.startswith(("max_", "min_", "base_", "swa_")):
            shown = ", ".join(sorted({*known, "params"} - {"format"}))
            raise ValueError(f"Unknown option {name!r} of a parameter group; choose from {shown}.")


def check_adamw(group: Group) -> None:
    """Check the options of a fallback group; raises as :func:`check_singd`."""
    for name in ("lr", "eps", "weight_decay"):
        _number(name, group[name])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers in [0, 1), got {betas!r}.")
    for beta in betas:
        _number("betas", beta, below=1.0)


def check_whole(given: Mapping[str, Any]) -> None:
    """Check the options of the whole optimizer; raises as :func:`check_singd`."""
    optional = [n for n in ("cache_products", "average_gradients") if given[n] is not None]
    _check_switches(given, ["shard_factors", "warn_unsupported", *optional])
    grad_scaler = given["grad_scaler"]
    scales = all(hasattr(grad_scaler, name) for name in ("scale", "is_enabled"))
    if grad_scaler is not None and not scales:
        raise TypeError(f"grad_scaler must be a torch.amp.GradScaler or None, got {grad_scaler!r}.")


def parameter(p: Any) -> Any:
    """The parameter of an entry that may be a (name, parameter) pair, as in torch."""
    return p[1] if isinstance(p, tuple) else p


def plain(group: Group) -> dict[str, Any]:
    """Options with numbers of other libraries, such as numpy's, as Python's own, so that a checkpoint is plain."""

    def own(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(own, value))
        if type(value) in (bool, int, float) or not isinstance(value, Real):
            return value
        return int(value) if isinstance(value, Integral) else float(value)

    return {name: value if name == "params" else own(value) for name, value in group.items()}


def as_list(params: Any) -> list[Any]:
    """The parameters of a group as a list.

    Raises:
        TypeError: For a set, whose order differs from run to run.
    """
    if isinstance(params, (set, frozenset)):
        raise TypeError(
            "The parameters of a group must be in a fixed order, got a set; pass a list."
        )
    return [params] if isinstance(params, Tensor) else list(params)


def as_groups(params: Any) -> list[dict[str, Any]]:
    """What a user passes as ``params``, as a list of groups.

    Raises:
        ValueError: For a group without parameters.
    """
    params = as_list(params)
    if not params:
        raise ValueError("There are no parameters to train; a generator gives them once only.")
    found = params if isinstance(params[0], dict) else [{"params": params}]
    for group in found:
        if "params" not in group:
            raise ValueError(
                f"A parameter group needs 'params', got only {', '.join(map(repr, group))}."
            )
    return [{**g, "params": as_list(g["params"])} for g in found]


def fallback_options(fallback: Group | None, lr: float | Tensor) -> dict[str, Any] | None:
    """The fallback's options, completed, with SINGD's lr unless it has its own; None where it is switched off."""
    if fallback is None:
        return None
    if not isinstance(fallback, Mapping):
        raise TypeError(f"fallback must be a dict of AdamW options or None, got {fallback!r}.")
    unknown = [name for name in fallback if name not in ADAMW]
    if unknown:
        raise ValueError(f"Unknown fallback option {unknown[0]!r}; choose from {', '.join(ADAMW)}.")
    options = plain({**ADAMW, "lr": lr, **fallback})
    check_adamw(options)
    return options


def fallback_group(group: Group, fallback: Group | None) -> dict[str, Any]:
    """The options of AdamW for those parameters of a group that fall to it: what the group says itself, then the
    fallback's.

    Args:
        group: What the user said of the group.
        fallback: Of the whole optimizer.
    """
    own = {name: group[name] for name in ADAMW if name in group}
    adam = {**(ADAMW if fallback is None else fallback), **own, "algorithm": "adamw"}
    check_adamw(adam)
    return {**group, **adam}


def saved(group: Group) -> dict[str, Any]:
    """A group's options as plain values for a checkpoint: names for structures and rules, no callables."""
    plain = {name: value for name, value in group.items() if not callable(value)}
    plain["structures"] = tuple(s.name for s in resolve(group["structures"]))
    plain["rule"] = find_rule(group["rule"]).spelling
    return plain
