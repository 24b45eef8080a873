"""Off the CPU, few operators: what each of them does is large there, and to start one takes as long."""

import pytest
import torch
from structure_cases import STRUCTURES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from singd import structure
from singd.layers import find_kind

NOTHING = ("empty", "promote_types", "_unsafe_view", "scalar_tensor")
WAITS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select", "equal")
LAYERS = {
    "linear": (lambda: nn.Linear(64, 64, device="meta"), (32, 8, 64)),
    "conv2d": (lambda: nn.Conv2d(64, 64, 3, padding=1, device="meta"), (256, 64, 56, 56)),
    "conv3d": (lambda: nn.Conv3d(8, 8, 3, stride=2, device="meta"), (4, 8, 9, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(64, 64, 3, stride=2, device="meta"), (8, 64, 14, 14)),
}
MOST = 40
# two sets of dense rows, each with products of its own; the circulant is a user's, without a form of its own
MORE = {"hierarchical": 50, "circulant": 62}


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: no views, no empty tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        assert name not in WAITS, f"{func} waits for the device"
        empty = isinstance(out, torch.Tensor) and out.numel() == 0
        computes = not (func.is_view or empty or any(word in name for word in NOTHING))
        self.count += computes
        return out


def layer_work(name, layer, shape):
    """The gathering, the Gram matrices and the products of an update of one layer."""
    kind = find_kind(layer)
    d_o, d_i = kind.size(layer, True)
    K, C = structure(name)(d_i, device="meta"), structure(name)(d_o, device="meta")
    x = torch.empty(shape, device="meta")
    g = torch.empty_like(layer(x))

    def gather(approx):
        a = kind.input_rows(layer, x, approx=approx, bias=True, dtype=x.dtype, output_shape=g.shape)
        b = kind.grad_rows(layer, g, x, approx=approx, dtype=x.dtype)
        return K.project_congruence(a), C.project_congruence(b)

    def update():
        return K.gram(), C.gram(), K @ K, C @ C

    return gather, update


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_few_operators_and_none_that_waits(name, layer, approx):
    make, shape = LAYERS[layer]
    gather, update = layer_work(name, make(), shape)
    with torch.no_grad(), Operators() as operators:
        gather(approx)
        update()
    more = [count for prefix, count in MORE.items() if name.startswith(prefix)]
    assert operators.count <= (more[0] if more else MOST)


@pytest.mark.parametrize("method", ["mm", "tmm", "mm_AAt", "mm_AtA"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_product_of_any_size_is_a_few_operators(name, method):
    for n in (64, 1000, 4096):
        A, X = structure(name)(n, device="meta"), torch.empty(n, n, device="meta")
        with torch.no_grad(), Operators() as operators:
            getattr(A, method)(X)
        assert operators.count <= 20, n


def test_measures_wait_for_nothing():
    for name in STRUCTURES:
        A = structure(name)(64, device="meta")
        with torch.no_grad(), Operators():
            A.trace(), A.average_trace(), A.norm(), A.max_abs(), A.spectral_norm()
            A.map(torch.clone).add_(A, A.trace()).mul_(A.trace()).add_identity_(A.trace())


def test_the_count_counts():
    with Operators() as operators:
        (torch.ones(3, device="meta").view(3, 1) + 1).T
    assert operators.count == 2
    with pytest.raises(AssertionError, match="waits for the device"), Operators():
        torch.ones(1).item()
