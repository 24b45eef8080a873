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

    def plan(kernel, shape):
        if axis is None or kernel.stride[axis] != 1:
            return None
        return plan_products(kernel, axis, shape[2 + axis])

    monkeypatch.setattr(fast_patches, "cheapest_plan", plan)
    rows = find_kind(layer).input_rows(
        layer, x, approx="expand", bias=bias, dtype=x.dtype, output_shape=g.shape
    )
    A = rows.matrix()
    torch.testing.assert_close(rows.gram(), A.T @ A, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        torch.block_diag(*rows.block_gram(rows.width)[0]), A.T @ A, rtol=1e-11, atol=1e-11
    )


def test_a_third_of_the_work():
    # 3 x 3 kernel, padding 1, 16 positions: a full product and one row more each, instead of 9 full ones
    plan = plan_products(Window((3,), (1,), (1,)), axis=0, n=18)
    assert plan.rows == 18 + 17 + 16


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 13, 41])
def test_no_plan_multiplies_more_than_the_pairs_on_one_side(kernel, dilation, n):
    k = Window((kernel,), (1,), (dilation,))
    plan = plan_products(k, axis=0, n=n)
    assert plan.rows <= kernel * (kernel + 1) // 2 * max(0, k.output_size(0, n))


def test_the_cheaper_route_is_taken():
    kernel = Window((3, 3), (1, 1), (1, 1))
    assert cheapest_plan(kernel, (32, 64, 18, 18)).axis == 0
    assert cheapest_plan(kernel, (1, 2, 4, 4)) is None
    assert cheapest_plan(Window((1, 5), (1, 1), (1, 1)), (32, 64, 16, 20)).axis == 1
    assert cheapest_plan(Window((3, 3), (2, 1), (1, 1)), (32, 64, 18, 18)).axis == 1
    assert cheapest_plan(Window((1, 1), (1, 1), (1, 1)), (32, 64, 16, 16)) is None
    assert cheapest_plan(kernel, (0, 64, 18, 18)) is None


@pytest.mark.parametrize("stride", [1, 2])
def test_large_gram_in_both_precisions(stride):
    layer = nn.Conv2d(32, 4, 3, padding=1, stride=stride)
    x = torch.randn(32, 32, 16, 16)
    kernel = Window((3, 3), (stride, stride), (1, 1))
    assert (cheapest_plan(kernel, (32, 32, 18, 18)) is not None) == (stride == 1)
    A = rows_of(layer.double(), x.double(), bias=True).matrix()
    gram = A.T @ A
    torch.testing.assert_close(rows_of(layer, x.double(), bias=True).gram(), gram)
    rounded = rows_of(layer.float(), x, bias=True).gram().double()
    torch.testing.assert_close(rounded, gram, rtol=0, atol=1e-5 * gram.diag().max().item())


@pytest.mark.parametrize("route", ["plain", "shifted"])
def test_many_chunks_do_not_stall_in_half_precision(monkeypatch, one_example_at_a_time, route):
    if route == "shifted":
        monkeypatch.setattr(fast_patches, "cheapest_plan", lambda k, shape: plan_products(k, 0, 2))
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
