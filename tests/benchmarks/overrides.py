"""What each override of a structure is worth: its time beside that of the base class's own form.

    PYTHONPATH=src OMP_NUM_THREADS=1 python tests/benchmarks/overrides.py

prints the table of ``docs/overrides_table.md``, for factors of 769 x 769 (768 inputs and a bias), 128 rows of a
batch and 512 columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from singd import structure
from singd.rows import DenseRows
from singd.structures import Preconditioner, StructuredMatrix, Transposed

N, ROWS, COLUMNS = 769, 128, 512
STRUCTURES = (
    "dense",
    "diagonal",
    "block30diagonal",
    "hierarchical15_15",
    "trilrank4first",
    "triltoeplitz",
)
WHAT = {
    "add_identity_": "`add_identity_`: add a multiple of I",
    "gram": "`gram`: P(AᵀA)",
    "cogram": "`cogram`: P(AAᵀ)",
    "project_congruence": "`project_congruence`: P(AᵀRᵀRA)",
    "project_cocongruence": "`project_cocongruence`: P(ARᵀRAᵀ)",
    "mm_AAt": "`mm_AAt`: AAᵀX",
    "mm_AAt_": "`mm_AAt_`: the same in place of X",
    "mm_AtA": "`mm_AtA`: AᵀAX",
    "preconditioner": "`preconditioner`: AAᵀ kept, times X",
    "dense": "`dense`: the matrix itself",
    "norm": "`norm`: the Frobenius norm",
    "spectral_norm": "`spectral_norm`: exact, where the base class estimates",
}  # fmt: skip


def fastest(work: Callable[[], object], repeats: int = 7) -> float:
    """The least CPU time in seconds, of which other work on the machine can only take more."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def overridden(A: StructuredMatrix, method: str) -> bool:
    """Whether a structure, or the one that it transposes, has a form of its own."""
    if isinstance(A, Transposed):
        swap = {"gram": "cogram", "project_congruence": "project_cocongruence", "mm_AAt": "mm_AtA"}
        swap |= {v: k for k, v in swap.items()} | {m: m for m in ("add_identity_",)}
        return method in swap and overridden(A.of, swap[method])
    return getattr(type(A), method) is not getattr(StructuredMatrix, method)


def works(A: StructuredMatrix, method: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """A method as it is, and in the base class's form."""
    X, rows = torch.randn(N, COLUMNS), DenseRows(torch.randn(ROWS, N))
    if method == "preconditioner":
        kept = A.preconditioner()
        assert isinstance(kept, Preconditioner)
        return lambda: kept.mm_AAt(X), lambda: StructuredMatrix.mm_AAt(A, X)
    args = {"mm_AAt": (X,), "mm_AAt_": (X,), "mm_AtA": (X,), "add_identity_": (1e-9,)}
    args |= {"project_congruence": (rows,), "project_cocongruence": (rows,)}
    base, mine = getattr(StructuredMatrix, method), getattr(A, method)
    return lambda: mine(*args.get(method, ())), lambda: base(A, *args.get(method, ()))


def cell(A: StructuredMatrix, method: str) -> str:
    """How many times as fast an override is, or nothing where there is none."""
    if not overridden(A, method):
        return ""
    mine, base = (fastest(work) for work in works(A, method))
    ratio = base / mine
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def table() -> str:
    """The table as Markdown: how many times as fast as the base class's form each override is."""
    factors = []
    for name in STRUCTURES:
        eye = structure(name)(N)
        factors.append(eye + eye.map(torch.randn_like) * (0.1 / N))
    lines = ["| method | " + " | ".join(f"`{name}`" for name in STRUCTURES) + " |"]
    lines.append("|---|" + "---|" * len(STRUCTURES))
    for method, words in WHAT.items():
        lines.append(f"| {words} | " + " | ".join(cell(A, method) for A in factors) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(table())
