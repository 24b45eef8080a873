"""What an optimizer tells about itself: its table of layers, and diagnostics of a step."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

import torch

from singd.blocks import Block, whole
from singd.checkpoint import FACTORS, state_bytes
from singd.update import natural_gradient

if TYPE_CHECKING:
    from singd.optimizer import SINGD

HEADER = ("layer", "kind", "matrix", "K", "C", "state bytes", "group")


def rows(optimizer: SINGD) -> list[tuple[str, ...]]:
    """One row per layer, then one per parameter that the fallback trains or that is left out."""
    group_of = {p: i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    lines: list[tuple[str, ...]] = []
    seen = set()
    for block in optimizer._blocks:
        if block.weight not in group_of or not block.active:
            continue
        d_o, d_i = block.size
        seen.update(block.params)
        structures = block.structures()
        size = sum(state_bytes(optimizer.state[p]) for p in block.params if p in optimizer.state)
        lines.append(
            (
                " = ".join(block.names),
                type(block.modules[0]).__name__,
                f"{d_o} x {d_i}",
                structures["K"].name,
                structures["C"].name,
                f"{size:,}",
                str(group_of[block.weight]),
            )
        )
    for p, name in optimizer._names.items():
        if p in seen:
            continue
        group = group_of.get(p)
        what = "left out" if group is None else optimizer.param_groups[group]["algorithm"]
        reason = optimizer._reasons.get(p)
        size = state_bytes(optimizer.state[p]) if p in optimizer.state else 0
        shape = " x ".join(map(str, p.shape)) or "1"
        lines.append(
            (
                name,
                what + (f" ({reason})" if reason else ""),
                shape,
                "-",
                "-",
                f"{size:,}",
                "-" if group is None else str(group),
            )
        )
    return lines


def table(optimizer: SINGD) -> str:
    """The rows as aligned text."""
    lines = [HEADER, *rows(optimizer)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    return "SINGD\n" + "\n".join(text)


def html_table(optimizer: SINGD) -> str:
    """The rows for a notebook."""

    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(r, "td") for r in rows(optimizer))
    return f"<table><thead>{line(HEADER, 'th')}</thead><tbody>{body}</tbody></table>"


@torch.no_grad()
def stats(optimizer: SINGD) -> dict[str, dict[str, float]]:
    """Diagnostics of every preconditioned layer, computed from the state when called.

    Returns:
        For each layer's name, plain numbers:

        - ``norm_K``, ``norm_C``, ``norm_m_K``, ``norm_m_C``: Frobenius norms.
        - ``trace_K``, ...: average traces.
        - ``update_ratio``: size of the last update (lr times momentum) over the weight's; nan with no
          momentum buffer.
        - ``cosine``: between gradient and natural gradient; nan when the gradient is cleared already.
        - ``age``: steps since the factors were last updated.
        - ``state_bytes``: those of this rank.
    """
    result = {}
    blocks = [
        b for b in optimizer._blocks if b.active and "step" in optimizer.state.get(b.weight, {})
    ]
    for block in blocks:
        state = optimizer.state[block.weight]
        numbers = optimizer._ownership.gathered([block], FACTORS, optimizer.state, "stats")[0]
        factors = {key: block.blueprint(key[-1]).from_flat(v) for key, v in numbers.items()}
        line: dict[str, float] = {}
        for key, matrix in factors.items():
            line["norm_" + key] = float(matrix.norm())
            line["trace_" + key] = float(matrix.average_trace())
        line["update_ratio"] = _update_ratio(optimizer, block.params)
        line["cosine"] = _cosine(block, factors)
        line["age"] = (
            state["step"] - 1 - state["last_update"] if state["last_update"] >= 0 else math.inf
        )
        line["state_bytes"] = sum(
            state_bytes(optimizer.state[p]) for p in block.params if p in optimizer.state
        )
        result[block.name] = line
    return result


def _update_ratio(optimizer: SINGD, params: list[Any]) -> float:
    updates, weights = [], []
    lr_of = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for p in params:
        buffer = optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
        if buffer is None:
            return math.nan
        updates.append(float(lr_of[p]) * float(whole(buffer).norm()))
        weights.append(float(whole(p).norm()))
    return math.hypot(*updates) / max(math.hypot(*weights), 1e-300)


def _cosine(block: Block, factors: dict[str, Any]) -> float:
    if any(p.grad is None for p in block.params):
        return math.nan
    dW = block.gradient()
    N = natural_gradient(factors["K"], factors["C"], dW).double()
    dW = dW.double()
    return float((dW * N).sum() / (dW.norm() * N.norm()).clamp(min=1e-300))
