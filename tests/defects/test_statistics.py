"""Statistics hold every row once, counted as the loss counts, or a warning says what is missing."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from published import FAST
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from singd import SINGD

F64 = torch.float64


def assert_same_factors(optimizer, layer, other, their_layer, atol=1e-12):
    for a, b in zip(optimizer.factors(layer), other.factors(their_layer), strict=True):
        torch.testing.assert_close(a.dense(), b.dense(), rtol=0, atol=atol)


class Once(nn.Module):
    """The reference: the layer sees all rows in one call."""

    def __init__(self, layer, forward=None):
        super().__init__()
        self.layer = layer
        self.run = forward or (lambda layer, x: layer(x))

    def forward(self, x):
        return self.run(self.layer, x)


def pair(forward, layer=None, **options):
    """A model that calls its layer as ``forward`` does, and one that calls it once, with optimizers."""
    layer = (layer or nn.Linear(5, 3)).to(F64)
    model, twin = Once(layer, forward), Once(copy.deepcopy(layer))
    options = {**FAST, **options}
    return model, SINGD(model, **options), twin, SINGD(twin, **options)


def one_step(model, optimizer, x, loss=lambda y: y.square().sum(-1).mean()):
    loss(model(x)).backward()
    optimizer.step()


# -- rows that were lost -----------------------------------------------------------------------------


def test_a_plain_call_beside_a_reentrant_checkpoint_loses_no_row():
    def forward(layer, x):
        first, second, third = x.split(16)
        y = layer(first)
        inner = checkpoint(layer, second.clone().requires_grad_(), use_reentrant=True)
        return torch.cat([y, inner, layer(third)])

    model, optimizer, twin, other = pair(forward)
    x = torch.randn(48, 5, dtype=F64)
    one_step(model, optimizer, x.clone())
    one_step(twin, other, x)
    assert_same_factors(optimizer, "layer", other, "layer")


def pruned(layer):
    prune.identity(layer, "weight")


class Same(nn.Module):
    """A parametrization that makes a new tensor of the same numbers."""

    def forward(self, weight):
        return weight * 1.0


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Same())


@pytest.mark.filterwarnings("ignore:.*non-leaf Tensor")
@pytest.mark.parametrize("change", [pruned, parametrized])
def test_micro_batches_of_a_layer_whose_weight_is_computed_add_up(change):
    """It was an ordinary layer when SINGD was built."""
    model, optimizer, twin, other = pair(None)
    change(model.layer)
    x = torch.randn(12, 5, dtype=F64)
    for part in x.split(3):
        (model(part).square().sum() / 12).backward()
    optimizer.step()
    one_step(twin, other, x)
    assert_same_factors(optimizer, "layer", other, "layer")


# -- what is taken for the layer ---------------------------------------------------------------------


def test_a_hook_that_scales_the_output_is_not_the_layer():
    model, _, twin, other = pair(None)
    plain = Once(copy.deepcopy(model.layer))
    plain.layer._forward_hooks.clear()
    plain.layer.register_forward_hook(lambda layer, args, output: output * 0.1)
    optimizer = SINGD(plain, **FAST)
    x = torch.randn(12, 5, dtype=F64)
    one_step(plain, optimizer, x)
    one_step(twin, other, x, loss=lambda y: (0.1 * y).square().sum(-1).mean())
    assert_same_factors(optimizer, "layer", other, "layer")


@pytest.mark.parametrize(
    "hook",
    [lambda m, a, y: (y, None), lambda m, a, y: y.sum(-1, keepdim=True), lambda m, a, y: {"y": y}],
    ids=["a tuple", "another shape", "a dict"],
)
def test_a_hook_that_returns_something_else_is_no_trouble(hook):
    layer = nn.Linear(5, 3).to(F64)
    layer.register_forward_hook(hook)
    optimizer = SINGD(layer, **FAST)
    y = layer(torch.randn(4, 5, dtype=F64))
    y = y["y"] if isinstance(y, dict) else y[0] if isinstance(y, tuple) else y
    y.square().mean().backward()
    optimizer.step()
    assert not torch.equal(optimizer.factors("").K.dense(), torch.eye(6, dtype=F64))


@pytest.mark.parametrize(
    "hook",
    [
        lambda m, a, y: 0.1 * y,
        lambda m, a, y: (0.1 * y, None),
        lambda m, a, y: (0.1 * y).sum(-1, keepdim=True),
        lambda m, a, y: {"y": 0.1 * y},
    ],
    ids=["scaled", "a tuple", "another shape", "a dict"],
)
def test_a_hook_that_was_put_in_front_afterwards_is_not_the_layer(hook):
    """Ours goes to the front again; it cannot tell what the first output was, and a warning names the layer."""
    model, optimizer, twin, other = pair(None)
    model.layer.register_forward_hook(hook, prepend=True)
    x = torch.randn(12, 5, dtype=F64)

    def loss(y):
        y = y["y"] if isinstance(y, dict) else y[0] if isinstance(y, tuple) else y
        return y.square().sum(-1).mean()

    with pytest.warns(UserWarning, match="Layer 'layer' .* not seen"):
        one_step(model, optimizer, x, loss)
    optimizer.zero_grad()
    twin.load_state_dict(model.state_dict())
    one_step(model, optimizer, x, loss)
    one_step(twin, other, x, lambda y: loss(hook(None, None, y)))
    assert_same_factors(optimizer, "layer", other, "layer")


def test_a_factor_that_is_edited_in_place_is_the_one_that_is_used():
    moves = []
    for cache in (True, False):
        torch.manual_seed(0)
        model, optimizer, *_ = pair(None, T=10, cache_products=cache, momentum=0.0)
        x = torch.randn(12, 5, dtype=F64)
        one_step(model, optimizer, x)
        optimizer.state[model.layer.weight]["K"].mul_(2.0)
        before = model.layer.weight.clone()
        one_step(model, optimizer, x)
        moves.append(model.layer.weight - before)
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-12, atol=0)


# -- what is not seen --------------------------------------------------------------------------------


def beside_a_function(layer, x):
    return layer(x[::2]) + F.linear(x[1::2], layer.weight, layer.bias)


def beside_its_forward(layer, x):
    return layer(x[::2]) + layer.forward(x[1::2])


@pytest.mark.parametrize("forward", [beside_a_function, beside_its_forward])
def test_a_layer_that_is_seen_in_part_is_named_once(forward):
    model, optimizer, *_ = pair(forward)
    x = torch.randn(12, 5, dtype=F64)
    with pytest.warns(UserWarning, match="Layer 'layer'.*(part|not all|only some)"):
        one_step(model, optimizer, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(model, optimizer, x)


GROUPED = {
    "conv": (nn.Conv1d(4, 6, 2, groups=2), torch.randn(12, 4, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), torch.randn(12, 4, 5, 5)),
    "transposed": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), torch.randn(12, 4, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["linear", *GROUPED])
def test_a_layer_of_any_kind_that_is_seen_in_part_is_named(name, dtype):
    layer, x = GROUPED.get(name, (nn.Linear(5, 3), torch.randn(12, 5)))
    layer, x = copy.deepcopy(layer).to(dtype), x.to(dtype)
    for forward in (None, beside_its_forward):
        model = Once(layer, forward)
        optimizer = SINGD(model, **FAST)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for part in x.split(6):
                model(part).square().mean().backward()
            optimizer.step()
        assert [str(w.message)[:29] for w in told] == ["Layer 'layer' is seen in part"] * (
            forward is not None
        )


def test_looking_at_layers_leaves_the_users_random_numbers_alone():
    model, optimizer, *_ = pair(None)
    x = torch.randn(12, 5, dtype=F64)
    before = torch.get_rng_state()
    one_step(model, optimizer, x)
    assert torch.equal(torch.get_rng_state(), before)


# -- what the loss averages over ---------------------------------------------------------------------


def test_inputs_with_the_batch_second_are_counted_by_their_batch():
    """[S, B, d], as ``nn.Transformer`` and recurrent layers have it by default."""
    model, _, twin, other = pair(lambda layer, x: layer(x.transpose(0, 1)))
    optimizer = SINGD(model, **{**FAST, "batch_first": False})
    x = torch.randn(4, 7, 5, dtype=F64)  # [B, S, d]
    one_step(model, optimizer, x, loss=lambda y: y.square().sum((0, 2)).mean())
    one_step(twin, other, x, loss=lambda y: y.square().sum((1, 2)).mean())
    assert_same_factors(optimizer, "layer", other, "layer")


def steps_of_a_sequence(layer, x):
    return torch.stack([layer(part) for part in x.unbind(1)], 1)


def test_a_layer_called_at_each_step_of_a_sequence_is_one_called_on_the_sequence():
    model, optimizer, twin, other = pair(steps_of_a_sequence, repeated_calls="positions")
    x = torch.randn(4, 7, 5, dtype=F64)
    for m, o in ((model, optimizer), (twin, other)):
        one_step(m, o, x, loss=lambda y: y.square().sum((1, 2)).mean())
    assert_same_factors(optimizer, "layer", other, "layer")


def test_a_layer_called_many_times_is_named_unless_its_calls_were_explained():
    x = torch.randn(4, 7, 5, dtype=F64)
    model, optimizer, *_ = pair(steps_of_a_sequence)
    with pytest.warns(UserWarning, match="Layer 'layer' .*repeated_calls"):
        one_step(model, optimizer, x)
    for said in ("examples", "positions"):
        model, optimizer, *_ = pair(steps_of_a_sequence, repeated_calls=said)
        one_step(model, optimizer, x)


def test_a_thousand_micro_batches_in_bfloat16_are_not_a_quarter_of_them():
    """Adding to a sum of 256 changes nothing in bfloat16 where one is added."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    layers = layer.bfloat16(), copy.deepcopy(layer).bfloat16()
    one, many = (SINGD(layer, **FAST) for layer in layers)
    x = torch.randn(4, 5).bfloat16()
    layers[0](x).square().mean().backward()
    for _ in range(1000):
        (layers[1](x).square().mean() / 1000).backward()
    one.step()
    many.step()
    for name in ("m_K", "K"):
        a, b = (getattr(o.factors(""), name).dense().float() for o in (one, many))
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
