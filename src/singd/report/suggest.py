"""Which structures fit a budget of memory or of time: what they keep is counted, their time is estimated."""

from __future__ import annotations

import collections
import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singd.blocks import Block
from singd.groups import GROWING, interval
from singd.plan import find_blocks, find_slots, unwrapped
from singd.precision import accumulation_dtype
from singd.report.table import html_table, table
from singd.rules import INPUT, OUTPUT, find_rule
from singd.weight_steps import keeps_products

PAIRS: tuple[tuple[str, str], ...] = (
    ("dense", "dense"),
    ("dense", "diagonal"),
    ("block64diagonal", "block64diagonal"),
    ("block64diagonal", "diagonal"),
    ("block30diagonal", "diagonal"),
    ("diagonal", "diagonal"),
)
"""What is tried for K and C, from the richest to the cheapest."""

OPTIONS = {"T": GROWING, "momentum": 0.9, "alpha1": 0.0, "preconditioner_dtype": None}
"""The options of SINGD that change what it costs, with its defaults."""

HEADER = ("layer", "matrix", "K", "C", "memory", "time")


@dataclass(frozen=True)
class Suggestion:
    """Structures that fit a budget; printed, a table of the layers.

    Attributes:
        structures: The richest pair that fits if all layers take it: what ``SINGD(structures=...)`` takes.
        layers: A pair for each layer by its name, as rich as they fit together.
        memory: What is kept between steps with ``layers``, over what AdamW keeps.
        time: The estimated time of an iteration with ``layers``, over that with AdamW.
        rows: The lines of the table.
    """

    structures: tuple[str, str]
    layers: Mapping[str, tuple[str, str]]
    memory: float
    time: float
    rows: Sequence[tuple[str, ...]]

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups with the structures in ``layers``, for ``SINGD(model, groups)``.

        Args:
            model: The model, or one with layers of the same names.

        Raises:
            AttributeError: If it lacks a layer.
        """
        model, pairs, found = unwrapped(model)[0], {}, collections.defaultdict(list)
        for name, pair in self.layers.items():
            pairs.update(dict.fromkeys(model.get_submodule(name).parameters(recurse=False), pair))
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            found[pairs.get(p)].append(p)
        return [{"params": ps} | ({"structures": k} if k else {}) for k, ps in found.items()]

    def __repr__(self) -> str:
        text = table(self.rows, HEADER, "Memory and time over those of AdamW")
        return f"{text}\none pair for all layers: structures={self.structures}"

    def _repr_html_(self) -> str:
        return html_table(self.rows, HEADER)


def suggest(
    model: nn.Module, batch: Any, loss: Any = None, *, budget: Mapping[str, float], **options: Any
) -> Suggestion:
    """Find for each layer the richest structures that fit a budget, all layers together.

    Memory is counted: the factors, their kept products and the momentum, against AdamW's two numbers per weight.
    Time is estimated: the multiplications of each structure, at the pace of forward and backward in one measured
    step of a copy of the model. It leaves out what each call costs: cheap structures in small layers can take
    twice as long as it says, so measure what you choose. The model, its gradients and torch's random numbers
    stay as they are.

    Six pairs of structures are tried, from diagonal ones to dense ones. All layers take the cheapest at first, and
    rise to richer ones level by level, each as far as all of them together still fit.

    Args:
        model: The model.
        batch: ``(inputs, targets)`` for ``loss(model(inputs), targets)``; or a function that is given
            a copy of the model and returns its loss.
        loss: The loss of outputs and targets.
        budget: ``{"memory": ..., "time": ...}`` or one of both, as multiples of what AdamW takes.
        **options: Those of SINGD that change its cost: ``T``, ``momentum``, ``alpha1``, ``preconditioner_dtype``.

    Raises:
        TypeError: For a batch or a budget of another form, or an unknown option.
        ValueError: If the cheapest pair does not fit, or the model has no layer to precondition.
    """
    if not isinstance(budget, Mapping) or not budget or not set(budget) <= {"memory", "time"}:
        raise TypeError(f"budget must be a dict with 'memory', 'time' or both, got {budget!r}.")
    if unknown := [name for name in options if name not in OPTIONS]:
        raise TypeError(f"Unknown option {unknown[0]!r}; choose from {', '.join(OPTIONS)}.")
    if not callable(batch if loss is None else loss):
        got = f"{type(batch).__name__} and loss={loss!r}"
        raise TypeError(f"Give (inputs, targets) and a loss, or a function of models, not {got}.")

    def loss_of(model: nn.Module) -> Tensor:
        return batch(model) if loss is None else loss(model(batch[0]), batch[1])

    model = unwrapped(model)[0]
    find_slots(model)  # refuses lazy layers
    rule = find_rule("singd")
    blocks = [b for b in find_blocks(model)[0] if b.weight.requires_grad and b.works_with(rule)]
    if not blocks:
        raise ValueError("The model has no layer that SINGD preconditions, so there is no choice.")
    for b in blocks:
        b.bias = b.own_bias if b.own_bias is not None and b.own_bias.requires_grad else None
    passes, step, rows = _measured(model, loss_of, blocks)
    products = sum(3 * rows[b] * math.prod(b.size) for b in blocks if not b.kind.input_structure)
    pace, adamw_time = passes / max(products, 1), passes + step  # seconds per multiplication
    options = {**OPTIONS, **options, "rule": "singd", "kfac_like": False}
    costs = {b: [_cost(b, pair, rows[b], options) for pair in PAIRS] for b in blocks}

    sizes = {p: 2 * p.nbytes for p in model.parameters() if p.requires_grad}  # AdamW's
    ours = {p for b in blocks for p in b.params}
    rest = sum(2 * p.numel() * accumulation_dtype(p.dtype).itemsize for p in sizes if p not in ours)

    def total(level: Mapping[Block, int]) -> dict[str, float]:
        used = [costs[b][i] for b, i in level.items()]
        memory, work = rest + sum(m for m, _ in used), sum(w for _, w in used)
        return {"memory": memory / sum(sizes.values()), "time": 1 + pace * work / adamw_time}

    def fits(level: Mapping[Block, int]) -> bool:
        return all(total(level)[name] <= limit for name, limit in budget.items())

    every = [dict.fromkeys(blocks, i) for i in range(len(PAIRS))]
    if not fits(level := every[-1].copy()):
        least = " and ".join(f"{total(level)[name]:.3g} in {name}" for name in budget)
        raise ValueError(f"The cheapest structures take {least}, over the budget {dict(budget)}.")
    one = next(PAIRS[i] for i, same in enumerate(every) if fits(same))
    for i in reversed(range(len(PAIRS))):  # all layers rise by one level before any rises by two
        for b in blocks:
            level[b] = i if fits({**level, b: i}) else level[b]
    lines = []
    for b, i in level.items():
        alone = costs[b][i][0] / sum(sizes[p] for p in b.params), costs[b][i][1] * pace / adamw_time
        K, C = b.kind.input_structure or PAIRS[i][0], PAIRS[i][1]
        size, shares = "{} x {}".format(*b.size), ("{:.2f} +{:.2f}".format(*alone)).split()
        lines.append((" = ".join(b.names), size, K, C, *shares))
    if rest:
        lines.append(("all else", "-", "AdamW", "AdamW", "1.00", "+0.00"))
    whole = total(level)
    lines.append(("in all", "", "", "", f"{whole['memory']:.2f}", f"{whole['time']:.2f}"))
    return Suggestion(one, {b.name: PAIRS[i] for b, i in level.items()}, **whole, rows=lines)


def _measured(
    model: nn.Module, loss_of: Callable[[nn.Module], Tensor], blocks: Sequence[Block]
) -> tuple[float, float, dict[Block, float]]:
    """Seconds of forward and backward, and of AdamW's step, on a copy; and how many rows each layer sees."""
    twin, rows = copy.deepcopy(model), dict.fromkeys(blocks, 0.0)
    block_of = {twin.get_submodule(name): b for b in blocks for name in b.names}

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        rows[block_of[layer]] += output.numel() / block_of[layer].size[0]

    for layer in block_of:
        layer.register_forward_hook(count)
    adamw = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad])
    cuda = sorted({p.get_device() for p in twin.parameters() if p.is_cuda})

    def seconds(do: Callable[[], Any]) -> float:
        start = time.perf_counter()
        do()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.random.fork_rng(cuda), torch.enable_grad():
        times = [(seconds(lambda: loss_of(twin).backward()), seconds(adamw.step)) for _ in range(4)]
    passes, steps = map(min, zip(*times, strict=True))  # (the first ones warm up)
    return passes, steps, {b: n / len(times) for b, n in rows.items()}


def _cost(block: Block, pair: Any, rows: float, options: Mapping[str, Any]) -> tuple[int, float]:
    """Bytes kept for one layer, and the multiplications of a step.

    With s numbers in K, of size d_i: K K^T times the gradient takes 2 s d_o multiplications, or s d_o with the
    kept product. P(K^T U K) takes 2 s for each row, and K^T K and K m_K take s^2 / d_i each. The same for C.
    """
    block.group = {**options, "structures": pair}
    momentum = sum(p.nbytes for p in block.params) * bool(options["momentum"])
    memory = momentum + sum(A.numel * A.dtype.itemsize for A in block.blueprints().values())
    forms = options["T"] != 1 and keeps_products(block, None)
    often = sum(1 / interval(options["T"], step) for step in range(1000)) / 1000  # of a schedule
    work = 0.0
    for side, other in zip((INPUT, OUTPUT), block.size, strict=True):
        A = block.factors.identity[side]
        product = forms and A.numel > A.n  # a diagonal one has none that would be shorter
        memory += A.numel * A.dtype.itemsize * product
        work += (2 - product) * A.numel * other + often * 2 * (rows * A.numel + A.numel**2 / A.n)
    return memory, work
