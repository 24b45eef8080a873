"""The fast routes of convolutions' patches: the same numbers as plain unfolding, for less."""

from __future__ import annotations

import weakref

import pytest
import torch
from layer_cases import CASES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from singd.kernels import Window, fast_patches, patches
from singd.kernels.shifted_products import cheapest_plan, plan_products
from singd.layers import find_kind

CONVOLUTIONS = [name for name in CASES if name.startswith(("conv", "transposed"))]


def rows_of(layer: nn.Module, x: Tensor, bias: bool = False, approx: str = "expand"):
    with torch.no_grad():
        shape = layer(x).shape
    return find_kind(layer).input_rows(
        layer, x, approx=approx, bias=bias, dtype=x.dtype, output_shape=shape
    )


@pytest.fixture
def one_example_at_a_time(monkeypatch):
    monkeypatch.setattr(patches, "CHUNK_BYTES", 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gram_along_every_axis(monkeypatch, one_example_at_a_time, name, axis, bias):
    layer, x, g = CASES[name].run()
    if axis is not None and axis >= len(layer.kernel_size):
        return

    def plan(kernel, shape, zeros):
        if axis is None:
            return None
        return plan_products(kernel, axis, shape[2 + axis], zeros[axis])

    monkeypatch.setattr(fast_patches, "cheapest_plan", plan)
    rows = find_kind(layer).input_rows(
        layer, x, approx="expand", bias=bias, dtype=x.dtype, output_shape=g.shape
    )
    A = rows.matrix()
    torch.testing.assert_close(rows.gram(), A.T @ A, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        torch.block_diag(*rows.block_gram(rows.width)[0]), A.T @ A, rtol=1e-11, atol=1e-11
    )


def rows_in(plan) -> int:
    return sum(product.hi - product.lo for product in plan.products)


def test_a_third_of_the_work():
    # 3 x 3 kernel, padding 1, 16 positions: full, minus 1 and minus 2 rows, instead of 9 full ones
    plan = plan_products(Window((3,), (1,), (1,)), axis=0, n=18, zeros=(1, 1))
    assert rows_in(plan) == 16 + 15 + 14
    # without zeros at the ends, the ends are rows as well
    plan = plan_products(Window((3,), (1,), (1,)), axis=0, n=18, zeros=(0, 0))
    assert rows_in(plan) == 18 + 17 + 16
    # stride 2: the even rows meet offsets 0 and 2, the odd ones offset 1
    plan = plan_products(Window((3,), (2,), (1,)), axis=0, n=17, zeros=(0, 0))
    assert plan.phases == {0, 1}
    # pairs 00 and 22 together, 02, 11, 01, 12; with 8 positions they were 6 * 8 apart
    assert rows_in(plan) == 9 + 8 + 8 + 8 + 8


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("zeros", [(0, 0), (1, 1), (3, 0), (0, 4), (20, 20)])
def test_no_plan_multiplies_more_than_the_pairs_on_one_side(kernel, stride, dilation, zeros):
    n = 41
    k = Window((kernel,), (stride,), (dilation,))
    plan = plan_products(k, axis=0, n=n, zeros=zeros)
    assert rows_in(plan) <= kernel * (kernel + 1) // 2 * k.output_size(0, n)


def test_the_cheaper_route_is_taken():
    kernel = Window((3, 3), (1, 1), (1, 1))
    zeros = [(1, 1), (1, 1)]
    assert cheapest_plan(kernel, (32, 64, 18, 18), zeros).axis == 0
    assert cheapest_plan(kernel, (1, 2, 4, 4), zeros) is None
    wide = Window((1, 5), (1, 1), (1, 1))
    assert cheapest_plan(wide, (32, 64, 16, 20), [(0, 0), (2, 2)]).axis == 1
    pointwise = Window((1, 1), (1, 1), (1, 1))
    assert cheapest_plan(pointwise, (32, 64, 16, 16), [(0, 0), (0, 0)]) is None
    assert cheapest_plan(kernel, (0, 64, 18, 18), zeros) is None


@pytest.mark.parametrize("stride", [1, 2])
def test_large_gram_in_both_precisions(stride):
    layer = nn.Conv2d(32, 4, 3, padding=1, stride=stride)
    x = torch.randn(32, 32, 16, 16)
    kernel = Window((3, 3), (stride, stride), (1, 1))
    assert cheapest_plan(kernel, (32, 32, 18, 18), [(1, 1), (1, 1)]) is not None
    A = rows_of(layer.double(), x.double(), bias=True).matrix()
    gram = A.T @ A
    torch.testing.assert_close(rows_of(layer, x.double(), bias=True).gram(), gram)
    rounded = rows_of(layer.float(), x, bias=True).gram().double()
    torch.testing.assert_close(rounded, gram, rtol=0, atol=1e-5 * gram.diag().max().item())


@pytest.mark.parametrize("route", ["plain", "shifted"])
def test_many_chunks_do_not_stall_in_half_precision(monkeypatch, one_example_at_a_time, route):
    if route == "shifted":
        monkeypatch.setattr(
            fast_patches, "cheapest_plan", lambda k, shape, zeros: plan_products(k, 0, 2, (0, 0))
        )
    layer = nn.Conv1d(1, 1, 1, dtype=torch.bfloat16)
    x = torch.ones(600, 1, 2, dtype=torch.bfloat16)  # adding 2 to 512 changes nothing in bfloat16
    rows = rows_of(layer, x)
    assert rows.gram().item() == pytest.approx(1200, rel=2**-8)
    assert rows.block_gram(1)[0].item() == pytest.approx(1200, rel=2**-8)
    assert rows.squares().item() == rows.sums().item() == pytest.approx(1200, rel=2**-8)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        existing = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            storage = t.untyped_storage()
            if storage.data_ptr() not in existing and storage not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(f) -> int:
    with PeakMemory() as memory:
        f()
    return memory.peak


def test_the_memory_meter():
    assert peak_bytes(lambda: torch.ones(1000) + torch.ones(1000)) == 3 * 4000
    assert peak_bytes(lambda: [torch.ones(1000).sum() for _ in range(3)]) == 4000 + 3 * 4


@pytest.mark.parametrize("stride", [1, 2])
def test_peak_memory_is_at_most_a_third_of_unfolding(stride):
    layer, x = nn.Conv2d(16, 8, 3, padding=1, stride=stride), torch.randn(128, 16, 32, 32)
    unfolded = rows_of(layer, x).matrix().nbytes
    assert unfolded == x.numel() * 9 * 4 / stride**2
    for answer in (
        lambda rows: rows.gram(),
        lambda rows: rows.squares(),
        lambda rows: rows.block_gram(30),
        lambda rows: sum(part.matrix().sum() for part in rows.split()),
    ):
        rows = rows_of(layer, x, bias=True)
        assert peak_bytes(lambda answer=answer, rows=rows: answer(rows)) < unfolded / 3
    reduced = peak_bytes(lambda: rows_of(layer, x, bias=True, approx="reduce").gram())
    assert reduced < unfolded / 3


def test_the_matrix_is_not_held_twice():
    rows = rows_of(nn.Conv2d(16, 8, 3, padding=1), torch.randn(64, 16, 16, 16), bias=True)
    assert peak_bytes(rows.matrix) < 1.5 * rows.matrix().nbytes
