"""The results as text, for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns of equal width, the first to the left, the others to the right."""
    cells = [list(head)] + [[_text(cell) for cell in row] for row in rows]
    sizes = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(n) if i == 0 else cell.rjust(n)
            for i, (cell, n) in enumerate(zip(row, sizes, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "NO"
    return f"{cell:,.4g}" if isinstance(cell, float) else str(cell)


def tables(results: dict[str, Any]) -> str:
    """Every part of the results that was measured."""
    m = results["machine"]
    parts = [
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} thread, torch {m['torch']}, load {m['load']} at start; "
        f"a product of size {results['product_size']}: {results['product_gflop_per_s']:.0f} GFLOP/s"
    ]
    for name, part in results.get("training", {}).items():
        sgd = part["sgd_ms"]
        rows = [
            [
                row["name"],
                row["ms"],
                *(row["overhead_ms"][q] for q in ("lower", "median", "upper")),
                100 * row["overhead_ms"]["median"] / sgd["median"],
                row["iterations"],
            ]
            for row in sorted(part["contenders"], key=lambda r: r["overhead_ms"]["median"])
        ]
        parts.append(
            f"{name}: CPU ms per iteration; SGD {sgd['median']:.1f} ({sgd['lower']:.1f} to {sgd['upper']:.1f})\n"
            + table(
                ("", "iteration", "overhead: 1/4", "median", "3/4", "% of SGD", "iterations"), rows
            )
        )
    for name, part in results.get("defaults", {}).items():
        if name not in ("steps", "tiny"):
            adamw = next(r["ms"] for r in part["contenders"] if r["name"] == "AdamW")
            rows = [
                [row["name"], row["ms"], row["overhead_ms"], row["ms"] / adamw]
                for row in part["contenders"]
            ]
            parts.append(
                f"{name}: the defaults over {results['defaults']['steps']} steps, CPU ms\n"
                + table(("", "iteration", "over SGD", "of AdamW"), rows)
            )
    if "defaults" in results:
        tiny = results["defaults"]["tiny"]
        parts.append("tiny layers: " + ", ".join(f"{k} {v:.3g}" for k, v in tiny.items()))
    if "marks" in results:
        rows = [
            [
                f"{r['workload']} {r['structure']}, T={r['T']}",
                r["ours_ms"],
                r.get("published_ms"),
                r.get("share"),
                r["mark"],
                r["share"] <= r["mark"] if "share" in r else None,
                r["gflop"],
                r["floor_ms"],
                r["times_floor"],
            ]
            for r in results["marks"]
        ]
        head = (
            "",
            "ours, ms",
            "published",
            "share",
            "mark",
            "met",
            "GFLOP",
            "floor, ms",
            "x floor",
        )
        parts.append(
            "Overhead over SGD against the marks, and the least work known\n" + table(head, rows)
        )
    if "widths" in results:
        parts.append(_widths(results["widths"]))
    if "memory" in results:
        parts.append(_memory(results["memory"]))
    if "hook" in results:
        parts.append(
            "Forward hook without an update, microseconds per call: " + str(results["hook"])
        )
    return "\n\n".join(parts)


def _widths(part: dict[str, Any]) -> str:
    head = ["", *(f"{part_}{d}" for part_ in ("U", "N") for d in part["widths"])]
    rows = [
        [name, *cost["update_ms"], *cost["gradient_ms"]]
        for name, cost in part["structures"].items()
    ]
    text = "ms of an update (U) and one side of a natural gradient (N) against the width\n" + table(
        head, rows
    )
    head = [
        "",
        "U: fitted",
        "theory",
        "below dense from",
        "N: fitted",
        "theory",
        "below dense from",
    ]
    keys = ("exponent", "exponent_in_theory", "below_dense_from")
    rows = [
        [name, *(cost[f"{p}_{key}"] for p in ("update", "gradient") for key in keys)]
        for name, cost in part["structures"].items()
    ]
    return text + f"\n\nExponents from width {part['fitted_from']} on\n" + table(head, rows)


def _memory(part: dict[str, Any]) -> str:
    adamw = next(row["bytes"] for row in part["kept_on_vit"] if row["name"] == "AdamW")
    kept = [[r["name"], r["bytes"] / 1e6, r["bytes"] / adamw] for r in part["kept_on_vit"]]
    layers = [
        [name, r["share_of_adamw"], r["factors"] / 1e6, r["factors_bfloat16"] / 1e6]
        for name, r in part["layers_on_vit"].items()
    ]
    bytes_of = {row["name"]: row["bytes"] for row in part["peak_on_cnn"]}
    peaks = [
        [
            name,
            b / 1e6,
            b / bytes_of[f"published {name}"] if f"published {name}" in bytes_of else None,
        ]
        for name, b in bytes_of.items()
    ]
    return "\n\n".join(
        (
            "Kept between steps on the ViT\n" + table(("", "MB", "of AdamW's"), kept),
            "State of the layers that SINGD preconditions on the ViT\n"
            + table(("", "of AdamW's", "factors, MB", "in bfloat16"), layers),
            "Peak of an update on the CNN\n" + table(("", "MB", "of published"), peaks),
        )
    )
