"""Nothing of the optimizer is left on a model whose training is over."""

import copy
import gc
import io
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from published import FAST
from torch import nn

from singd import SINGD

ROOT = pathlib.Path(__file__).parents[2]


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def trained():
    model = mlp()
    optimizer = SINGD(model, **FAST)
    model(torch.randn(8, 5)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_parameters = sum(len(p._backward_hooks or ()) for p in model.parameters())
    return on_parameters + sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def test_detach_takes_the_hooks_off_and_the_factors_stay():
    model, optimizer = trained()
    assert hooks(model) > 0
    optimizer.detach()
    assert hooks(model) == 0
    optimizer.detach()  # once more does nothing
    before, weight = optimizer.factors("0"), model[0].weight.clone()
    model(torch.randn(8, 5)).square().mean().backward()
    optimizer.step()  # with the preconditioner as it was
    assert not torch.equal(model[0].weight, weight)
    for a, b in zip(optimizer.factors("0"), before, strict=True):
        assert torch.equal(a.dense(), b.dense())
    SINGD(model, **FAST).load_state_dict(optimizer.state_dict())


def test_hooks_go_with_their_optimizer():
    model, optimizer = trained()
    del optimizer
    gc.collect()
    assert hooks(model) == 0


@pytest.mark.parametrize("end", ["detach", "delete"])
def test_a_forward_without_a_backward_leaves_no_hook(end):
    """Not on the weights either, whose gradients the first backward pass would have looked at."""
    model = mlp()
    optimizer = SINGD(model, **FAST)
    model(torch.randn(8, 5))
    if end == "detach":
        optimizer.detach()
    del optimizer
    gc.collect()
    assert hooks(model) == 0


def test_a_copy_has_no_hooks_that_do_nothing():
    """Weight averaging and evaluation copy models."""
    model, optimizer = trained()
    averaged = copy.deepcopy(model)
    averaged(torch.randn(8, 5))  # they take themselves off when they are called
    assert hooks(averaged) == 0
    other, their = copy.deepcopy((model, optimizer))  # both: this one trains on
    other(torch.randn(8, 5)).square().mean().backward()
    their.step()
    assert hooks(other) == hooks(model)


def test_two_optimizers_of_one_model_each_take_their_own_hooks():
    model, optimizer = trained()
    one = hooks(model)
    other = SINGD(model, **FAST)
    other.detach()
    assert hooks(model) == one
    model(torch.randn(8, 5)).square().mean().backward()
    optimizer.step()


def test_no_layer_is_hooked_that_singd_does_not_train():
    model = mlp()
    optimizer = SINGD(model, model[2].parameters(), **FAST)
    assert hooks(model[0]) == 0 and hooks(model[2]) > 0
    assert optimizer.param_groups


WITHOUT = """
import sys
sys.modules["singd"] = None
import torch
model = torch.load(sys.argv[1], weights_only=False)
assert model(torch.zeros(2, 5)).shape == (2, 3)
"""


@pytest.mark.parametrize("when", ["while it trains", "afterwards"])
def test_a_saved_model_needs_no_singd(tmp_path, when):
    model, optimizer = trained()
    if when == "afterwards":
        optimizer.detach()
    path = tmp_path / "model.pt"
    torch.save(model, path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", WITHOUT, str(path)], env=env, check=True)
    assert hooks(model) == 0 or when == "while it trains"


def test_a_model_and_its_optimizer_saved_together_train_on():
    model, optimizer = trained()
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    other, their = torch.load(file, weights_only=False)
    x = torch.randn(8, 5)
    for m, o in ((model, optimizer), (other, their)):
        o.zero_grad()
        m(x).square().mean().backward()
        o.step()
    for a, b in zip(optimizer.factors("0"), their.factors("0"), strict=True):
        assert torch.equal(a.dense(), b.dense())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("end", ["detach", "delete"])
def test_torchscript_after_training(end):
    model, optimizer = trained()
    optimizer.detach() if end == "detach" else None
    del optimizer
    gc.collect()
    scripted = torch.jit.script(model.eval())
    x = torch.randn(2, 5)
    torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantization_after_training():
    model, optimizer = trained()
    optimizer.detach()
    engines = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    torch.backends.quantized.engine = engines[-1]
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert quantized(torch.randn(2, 5)).shape == (2, 3)


def test_the_fast_path_of_the_transformer_after_training():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(3, 4, 8)
    optimizer = SINGD(layer, **FAST)
    layer(x).square().mean().backward()
    optimizer.step()
    optimizer.detach()
    layer.eval()
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(x)
    assert any("_transformer_encoder_layer_fwd" in e.key for e in profile.key_averages())
