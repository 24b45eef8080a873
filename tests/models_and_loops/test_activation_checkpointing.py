"""Activation checkpointing of both kinds: the same training, and the memory stays saved."""

import copy
import gc
import weakref

import pytest
import torch
from models import model_and_batches
from published import SINGD
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

FAST = dict(lr=0.1, T=2, lr_cov=0.1, damping=0.1)


class Checkpointed(nn.Module):
    """A model whose middle is computed again in the backward pass."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(6, 8)
        self.middle = nn.Sequential(
            nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh()
        )
        self.last = nn.Linear(8, 3)

    def segment(self, x):
        if self.reentrant is None:
            return self.middle(x)
        return checkpoint(self.middle, x, use_reentrant=self.reentrant)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(self.segment(self.segment(x)))  # a weight in two segments


def pair(reentrant):
    torch.manual_seed(0)
    model = Checkpointed(reentrant).double()
    twin = copy.deepcopy(model)
    twin.reentrant = None
    _, batches = model_and_batches("mlp", steps=5)
    return model, SINGD(model, **FAST), twin, SINGD(twin, **FAST), batches


def assert_same(model, optimizer, twin, other):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    for name in ("first", "middle.0", "middle.2", "last"):
        for a, b in zip(optimizer.factors(name), other.factors(name), strict=True):
            torch.testing.assert_close(a.dense(), b.dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("passes", ["one", "micro-batches", "retain_graph"])
def test_trains_as_without(reentrant, passes):
    model, optimizer, twin, other, batches = pair(reentrant)
    for m, o in ((model, optimizer), (twin, other)):
        for x, y in batches:
            o.zero_grad()
            for part in (slice(0, 2), slice(2, 5)) if passes == "micro-batches" else (slice(0, 5),):
                loss = nn.functional.cross_entropy(m(x[part]), y[part], reduction="sum") / 5
                if passes == "retain_graph":
                    loss.backward(retain_graph=True)
                loss.backward()
            o.step()
    assert_same(model, optimizer, twin, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_sequential(reentrant):
    model, batches = model_and_batches("mlp", steps=4)
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model, **FAST), SINGD(twin, **FAST)
    for x, y in batches:
        x = x.clone().requires_grad_()
        outputs = checkpoint_sequential(model, 2, x, use_reentrant=reentrant), twin(x)
        for o, out in zip((optimizer, other), outputs, strict=True):
            o.zero_grad()
            nn.functional.cross_entropy(out, y).backward()
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inputs_inside_a_segment_are_not_held(reentrant):
    """At a step that gathers statistics, too, and for a plain model they are: the test can fail."""
    for how, held in ((reentrant, False), (None, True)):
        model, optimizer, *_, batches = pair(how)
        seen = []
        model.middle[2].register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(weakref.ref(args[0].untyped_storage()))
        )
        loss = nn.functional.cross_entropy(model(batches[0][0]), batches[0][1])
        gc.collect()
        assert all((ref() is not None) == held for ref in seen)
        loss.backward()
        assert optimizer._collector.statistics


def test_saved_tensor_hooks_see_the_inputs():
    """Offloading, as torch.autograd.graph.save_on_cpu does it, applies to what SINGD keeps."""
    model, optimizer, twin, other, batches = pair(None)
    packed = []
    x, y = batches[0]

    def pack(t):
        packed.append(t.data_ptr())
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    assert packed.count(x.data_ptr()) == 2  # once by the layer, once for its statistics
    nn.functional.cross_entropy(twin(x), y).backward()
    other.step()
    assert_same(model, optimizer, twin, other)
