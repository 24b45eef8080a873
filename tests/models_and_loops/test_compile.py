"""torch.compile: the same training, and a compilation per model, not per step."""

import copy

import pytest
import torch
import torch._dynamo
from models import model_and_batches, train
from published import SINGD
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

FAST = dict(lr=0.1, T=3, lr_cov=0.1, damping=0.1)

# Both are torch's own, after any graph break and from its default compiler.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(model, twin, optimizer, other):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
    for block in other._blocks:
        for a, b in zip(optimizer.factors(block.name), other.factors(block.name), strict=True):
            torch.testing.assert_close(a.dense(), b.dense(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "cnn", "shared"])
@pytest.mark.parametrize("build_from", ["model", "compiled"])
def test_compiled_trains_as_plain_without_a_recompilation_per_step(name, build_from):
    model, batches = model_and_batches(name, steps=8)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    optimizer = SINGD(model if build_from == "model" else compiled, **FAST)
    other = SINGD(twin, **FAST)
    counts = []
    for batch in batches:
        train(compiled, optimizer, [batch])
        counts.append(counter.frame_count)
    train(twin, other, batches)
    assert counts[0] > 0
    assert counts[1:] == [counts[1]] * 7  # steps that gather statistics and steps that don't alike
    assert counts[1] == counts[0]
    assert_same(model, twin, optimizer, other)


@pytest.mark.parametrize("dynamic", [True, None])
def test_dynamic_shapes(dynamic):
    model, batches = model_and_batches("mlp", steps=8, batch=9)
    batches = [(x[: 2 + i], y[: 2 + i]) for i, (x, y) in enumerate(batches)]
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=dynamic)
    optimizer, other = SINGD(model, **FAST), SINGD(twin, **FAST)
    counts = []
    for batch in batches:
        train(compiled, optimizer, [batch])
        counts.append(counter.frame_count)
    train(twin, other, batches)
    settled = 0 if dynamic else 1  # by default, torch makes a size dynamic when it first changes
    assert counts[settled:] == [counts[settled]] * (8 - settled)
    assert_same(model, twin, optimizer, other)


def test_the_default_compiler():
    model, batches = model_and_batches("mlp", steps=4)
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model, **FAST), SINGD(twin, **FAST)
    train(torch.compile(model), optimizer, batches)
    train(twin, other, batches)
    assert_same(model, twin, optimizer, other)


def test_module_compile_in_place():
    model, batches = model_and_batches("mlp", steps=4)
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model, **FAST), SINGD(twin, **FAST)
    model.compile(backend="aot_eager")
    train(model, optimizer, batches)
    train(twin, other, batches)
    assert_same(model, twin, optimizer, other)


def test_a_compiled_activation_checkpoint():
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    inner, batches = model_and_batches("mlp", steps=4)
    twin = copy.deepcopy(inner)
    model = Checkpointed(inner)
    optimizer, other = SINGD(model, **FAST), SINGD(twin, **FAST)
    train(torch.compile(model, backend="aot_eager"), optimizer, batches)
    train(twin, other, batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_singd_built_after_the_first_call_of_a_compiled_model_warns():
    model, batches = model_and_batches("mlp", steps=2)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batches[0][0])
    optimizer = SINGD(model, **FAST)
    with pytest.warns(UserWarning, match="build SINGD before the first call of a compiled model"):
        train(compiled, optimizer, batches)


def test_evaluation_between_steps_does_not_recompile():
    model, batches = model_and_batches("mlp", steps=6)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    optimizer = SINGD(model, **FAST)
    counts = []
    for batch in batches:
        train(compiled, optimizer, [batch])
        with torch.no_grad():
            compiled(batch[0])
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 5
