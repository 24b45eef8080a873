"""A guard against slowness: ratios of CPU times, with margins that a busy machine does not use up.

`make bench` measures; this only notices what has become several times slower. The smallest of some
times is compared, since other work on the machine can only add.
"""

import time

import contenders
import pytest
import torch
from timing import Training
from workloads import WORKLOADS

import singd
from singd.rows import DenseRows
from singd.rules import natural_gradient


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fastest(*works, repeats=5):
    """The smallest CPU time of each, measured in turns."""
    times = [[] for _ in works]
    for _ in range(repeats):
        for mine, work in zip(times, works, strict=True):
            start = time.process_time()
            work()
            mine.append(time.process_time() - start)
    return [min(t) for t in times]


def trainings(workload, *fields):
    found = [Training(field, WORKLOADS[workload]) for field in fields]
    for training in found:
        training.iterate()
    return [training.iterate for training in found]


def test_a_step_without_an_update_costs_little_more_than_sgd():
    fields = contenders.ours(10, ["diagonal", "block30diagonal", "dense"])
    sgd, diagonal, block, dense = fastest(*trainings("mlp", contenders.SGD_CONTENDER, *fields))
    assert diagonal < 2 * sgd
    assert block < 4 * sgd
    assert dense < 10 * sgd


def test_keeping_products_pays():
    fields = [*contenders.ours(10, ["dense"]), contenders.without_cache()]
    kept, plain = fastest(*trainings("mlp", *fields))
    assert kept < 0.9 * plain


def test_an_update_of_a_convolution_forms_no_patches_for_its_diagonal():
    fields = contenders.ours(1, ["diagonal", "dense"])
    diagonal, dense = fastest(*trainings("cnn", *fields))
    assert diagonal < dense


def gradient_work(name, d, columns):
    factor = singd.structure(name)(d)
    factor = factor + factor.map(torch.randn_like) * (0.1 / d)
    other, dW = singd.structure("diagonal")(columns), torch.randn(columns, d)
    return lambda: natural_gradient(factor, other, dW)


def test_structure_pays_in_a_wide_natural_gradient():
    names = ("dense", "diagonal", "block30diagonal", "hierarchical15_15", "triltoeplitz")
    dense, *others = fastest(*(gradient_work(name, 4096, 128) for name in names), repeats=3)
    for name, cost, share in zip(names[1:], others, (0.1, 0.3, 0.3, 0.9), strict=True):
        assert cost < share * dense, name


def test_structure_pays_in_wide_statistics():
    names = ("dense", "diagonal", "block30diagonal", "hierarchical15_15", "triltoeplitz")
    rows = DenseRows(torch.randn(128, 2048))
    factors = [singd.structure(name)(2048) for name in names]
    dense, *others = fastest(*(lambda K=K: K.project_congruence(rows) for K in factors), repeats=3)
    for name, cost, share in zip(names[1:], others, (0.1, 0.4, 0.5, 0.9), strict=True):
        assert cost < share * dense, name


def test_costs_grow_as_they_should():
    widths = {
        "dense": (512, 2048, 64),
        "diagonal": (1024, 4096, 16),
        "triltoeplitz": (1024, 4096, 16),
    }
    for name, (small, large, most) in widths.items():
        few, many = fastest(*(gradient_work(name, d, 256) for d in (small, large)))
        assert many < most * few, name  # four times as wide: 16 times for d^2, 4 for d


def test_the_forward_hook_is_light_when_no_update_is_due():
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    plain = torch.nn.Linear(8, 8)
    optimizer = singd.SINGD(torch.nn.Sequential(layer), T=10**6)
    layer(x).sum().backward()
    optimizer.step()
    bare, hooked = fastest(*(lambda f=f: [f(x) for _ in range(300)] for f in (plain, layer)))
    assert hooked < 3 * bare
