"""The law of all kernels: a faster form does what the plain one does, for every shape, dtype and layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from layer_cases import CASES as LAYERS

from singd import kernels
from singd.kernels import KERNELS, cpu_products, fast_toeplitz
from singd.kernels import patches as patches_module
from singd.kernels.patches import windows
from singd.layers import find_kind

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SIZES = (0, 1, 3, 16, 17, 40)
LONG = (1, 7, 40, 300)
PATCHES = [name for name in LAYERS if name.startswith(("conv", "transposed"))]


def random(*shape, dtype=torch.float64, across=False):
    """A matrix whose rows are contiguous, or whose columns are."""
    if across:
        return torch.randn(shape[::-1]).to(dtype).T
    return torch.randn(shape).to(dtype)


def matrices(dtype):
    for n, k, m, across in itertools.product(SIZES, SIZES, SIZES, (False, True)):
        yield random(n, k, dtype=dtype, across=across), random(k, m, dtype=dtype)


def symmetric(dtype):
    for n, m, across in itertools.product(SIZES, SIZES, (False, True)):
        L = random(n, m, dtype=dtype, across=across)
        yield L, L.T
        if dtype == torch.float64:
            S = random(m, m)
            yield L, (S + S.T) @ L.T


def rows_and_width(dtype):
    for m, d, k in itertools.product(SIZES, (1, 15, 16, 31, 47), (1, 3, 7, 15, 30)):
        yield random(m, d, dtype=dtype), k
        yield random(m, d, dtype=dtype, across=True), k


def toeplitz(dtype):
    for n, m, across in itertools.product(LONG, SIZES, (False, True)):
        X = random(n, m, dtype=dtype, across=across)
        s, t = (random(n, dtype=dtype) / n**0.5 for _ in range(2))
        for factors in (((t, True),), ((t, False),), ((s, False), (t, True))):
            yield X, *factors


def vectors(dtype):
    for n in LONG:
        wide = torch.promote_types(dtype, torch.float32)
        yield random(n, dtype=wide), random(n, dtype=wide)


def columns(dtype):
    for n, m, across in itertools.product(LONG, SIZES, (False, True)):
        wide = torch.promote_types(dtype, torch.float32)  # they come in the dtype to sum in
        yield (random(n, m, dtype=wide, across=across),)


def patches(dtype):
    for name in PATCHES:
        layer, x, g = LAYERS[name].run()
        rows = find_kind(layer).patches(layer, x, dtype, g.shape)
        yield rows.patches


CASES = {
    "matmul": matrices,
    "matmul_symmetric": symmetric,
    "block_gram": rows_and_width,
    "toeplitz_mm": toeplitz,
    "correlation": vectors,
    "diagonal_sums": columns,
    "patch_gram": lambda dtype: ((p,) for p in patches(dtype)),
    "patch_sums": lambda dtype: ((p, squared) for p in patches(dtype) for squared in (False, True)),
    "patch_tmm": lambda dtype: (
        (p, random(len(p.x) * p.places.numel(), n, dtype=dtype)) for p in patches(dtype) for n in (1, 5)
    ),
}  # fmt: skip


@pytest.fixture(params=["as it is", "small"])
def constants(request, monkeypatch):
    """The constants as they are; or such that small matrices take the routes of large ones."""
    if request.param == "small":
        for module, name, value in (
            (cpu_products, "BLOCK", 3),
            (cpu_products, "LEAST", 10),
            (cpu_products, "ALIGNED", 2),
            (fast_toeplitz, "SMALL", {"cpu": 0, "other": 0}),
            (fast_toeplitz, "CHUNK", 100),
            (patches_module, "CHUNK_BYTES", 1),
        ):
            monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_faster_form_does_what_the_plain_one_does(constants, name, dtype):
    kernel, tried = KERNELS[name], 0
    for args in CASES[name](dtype):
        expected = kernel.plain(*args)
        for twin in kernel.twins.values():
            if twin.pays is None or twin.pays(*args):
                tried += 1
                agree(twin.run(*args), expected, name, dtype)
    assert tried > 0


def agree(found, expected, name, dtype):
    pairs = (
        zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    )
    for mine, plain in pairs:
        assert mine.dtype == plain.dtype
        # sums of many terms: an error is relative to the largest of them, and those formed term by
        # term, as torch's convolutions do, err like a random walk
        size = plain.abs().max().item() if plain.numel() else 0.0
        units = 64 * torch.finfo(dtype).eps * max(size, 1.0)
        torch.testing.assert_close(mine, plain, rtol=0, atol=units)


def test_every_kernel_with_a_faster_form_is_compared():
    assert {name for name, kernel in KERNELS.items() if kernel.twins} == set(CASES)


def test_all_are_switched_off_and_on():
    A = torch.randn(300, 300)

    def is_fast():  # the faster form leaves room behind its rows
        return kernels.matmul_symmetric(A, A.T).stride(0) != 300

    assert is_fast()
    with kernels.use("plain"):
        assert not is_fast()
        with kernels.use("fast"):
            assert is_fast()
        assert not is_fast()
    assert is_fast()
    kernels.use("plain")
    assert not is_fast()
    kernels.use("fast")
    with pytest.raises(ValueError, match="takes 'fast' or 'plain', got 'slow'"):
        kernels.use("slow")


def test_a_kernel_of_a_user(monkeypatch):
    matmul = KERNELS["matmul"]
    monkeypatch.setattr(matmul, "twins", dict(matmul.twins))
    calls = []
    kernels.register_kernel(
        "matmul", "meta", lambda A, B: calls.append(A) or A @ B, lambda A, B: len(A) > 2
    )
    for n in (2, 3):
        matmul(torch.ones(n, 4, device="meta"), torch.ones(4, 5, device="meta"))
    assert [len(A) for A in calls] == [3]
    with pytest.raises(ValueError, match="Unknown kernel 'matmull'; choose from block_gram, "):
        kernels.register_kernel("matmull", "cpu", torch.matmul)


def test_windows_are_places_of_the_kernel():
    x = torch.arange(7.0)
    window = kernels.Window((2,), (2,), (3,))
    assert windows(x, window).tolist() == [[0.0, 3.0], [2.0, 5.0]]
    assert window.output_size(0, 7) == 2
