"""Statistics live as long as gradients do, whatever runs backward: and how often, and how badly."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from models import assert_same, model_and_batches, train
from published import SINGD
from torch import nn

FAST = dict(lr=0.1, T=1, lr_cov=0.1, damping=0.1)


def loss_of(model, batch, terms=None):
    x, y = batch
    if terms is None:
        return nn.functional.cross_entropy(model(x), y)
    return nn.functional.cross_entropy(model(x), y, reduction="sum") / terms


def pair(name="mlp", steps=3, batch=6, **options):
    model, batches = model_and_batches(name, steps=steps, batch=batch)
    twin = copy.deepcopy(model)
    options = {**FAST, **options}
    return model, SINGD(model, **options), twin, SINGD(twin, **options), batches


# -- several backward passes ---------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "shared"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("loss_average", [None, "batch", "batch+sequence"])
@pytest.mark.parametrize("kfac_like", [False, True])
@pytest.mark.parametrize("cuts", [(0, 1, 4, 6), (0, 1, 24, 30)])  # few and many rows
def test_unequal_micro_batches_are_one_batch(name, kfac_approx, loss_average, kfac_like, cuts):
    options = dict(kfac_approx=kfac_approx, loss_average=loss_average, kfac_like=kfac_like)
    model, optimizer, twin, other, batches = pair(name, batch=cuts[-1], **options)
    for x, y in batches:
        optimizer.zero_grad()
        for start, stop in itertools.pairwise(cuts):
            loss_of(model, (x[start:stop], y[start:stop]), terms=cuts[-1]).backward()
        optimizer.step()
        other.zero_grad()
        loss_of(twin, (x, y), terms=cuts[-1]).backward()
        other.step()
    assert_same(model, optimizer, twin, other, atol=1e-10)


def test_a_module_called_several_times_in_one_forward_is_all_its_calls():
    class Both(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return torch.cat([self.layer(x[:2]), self.layer(x[2:])])

    _, batches = model_and_batches("mlp")
    layer = nn.Linear(6, 3).double()
    model, twin = Both(layer), nn.Sequential(copy.deepcopy(layer))
    optimizer, other = SINGD(model, **FAST), SINGD(twin, **FAST)
    train(model, optimizer, batches)
    train(twin, other, batches)
    for a, b in zip(optimizer.factors("layer"), other.factors("0"), strict=True):
        torch.testing.assert_close(a.dense(), b.dense(), rtol=0, atol=1e-12)


def test_retain_graph_counts_every_pass():
    model, optimizer, twin, other, batches = pair()
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        other.zero_grad()
        for _ in range(2):
            loss_of(twin, batch).backward()
        other.step()
    assert_same(model, optimizer, twin, other)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
def test_create_graph_is_an_ordinary_backward():
    model, optimizer, twin, other, batches = pair()
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward(create_graph=True)
        optimizer.step()
    train(twin, other, batches)
    assert_same(model, optimizer, twin, other)


@pytest.mark.filterwarnings(
    "ignore:Layer '.*' is seen in part"
)  # and it is: the penalty's part is not
def test_a_gradient_penalty_trains():
    model, batches = model_and_batches("mlp", steps=8)
    optimizer = SINGD(model, **FAST)
    losses = []
    for x, y in batches[:1] * 8:
        optimizer.zero_grad()
        x = x.clone().requires_grad_()
        loss = loss_of(model, (x, y))
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = loss + grad.square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_backward_that_is_thrown_away_leaves_nothing():
    model, optimizer, twin, other, batches = pair()
    for batch in batches:
        for clear in (
            optimizer.zero_grad,
            model.zero_grad,
            lambda: optimizer.zero_grad(set_to_none=False),
        ):
            loss_of(model, (batch[0] * 3, batch[1])).backward()
            clear()
        loss_of(model, batch).backward()
        optimizer.step()
        model.zero_grad()
    train(twin, other, batches)
    assert_same(model, optimizer, twin, other)


def test_a_skipped_step_then_zero_grad_leaves_nothing():
    model, optimizer, twin, other, batches = pair()
    loss_of(model, batches[0]).backward()  # and no step, as in a loop that skips what is not finite
    train(model, optimizer, batches)
    train(twin, other, batches)
    assert_same(model, optimizer, twin, other)


# -- other users of autograd ---------------------------------------------------


def _input_gradient(model, batch):
    x = batch[0].clone().requires_grad_()
    torch.autograd.grad(loss_of(model, (x, batch[1])), x)


def _weight_gradients(model, batch):
    torch.autograd.grad(loss_of(model, batch), list(model.parameters()))


def _one_weight_gradient(model, batch):
    torch.autograd.grad(loss_of(model, batch), model[0].weight)


def _backward_to_the_input(model, batch):
    x = batch[0].clone().requires_grad_()
    loss_of(model, (x, batch[1])).backward(inputs=[x])


def _functional_gradient(model, batch):
    params = {k: p.detach() for k, p in model.named_parameters()}

    def loss(p):
        return nn.functional.cross_entropy(torch.func.functional_call(model, p, batch[0]), batch[1])

    torch.func.grad(loss)(params)


def _per_sample_gradients(model, batch):
    params = {k: p.detach() for k, p in model.named_parameters()}

    def loss(p, x, y):
        out = torch.func.functional_call(model, p, x[None])
        return nn.functional.cross_entropy(out, y[None])

    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, *batch)


def _jvp(model, batch):
    params = {k: p.detach() for k, p in model.named_parameters()}
    torch.func.jvp(lambda p: torch.func.functional_call(model, p, batch[0]), (params,), (params,))


def _hessian_vector_product(model, batch):
    params = {k: p.detach() for k, p in model.named_parameters()}

    def loss(p):
        return nn.functional.cross_entropy(torch.func.functional_call(model, p, batch[0]), batch[1])

    torch.func.jvp(torch.func.grad(loss), (params,), (params,))


def _forward_mode(model, batch):
    with torch.autograd.forward_ad.dual_level():
        model(torch.autograd.forward_ad.make_dual(batch[0], torch.ones_like(batch[0])))


def _other_weights(model, batch):
    """A teacher of the same architecture, trained by somebody else."""
    params = {k: (2 * p.detach()).requires_grad_() for k, p in model.named_parameters()}
    nn.functional.cross_entropy(
        torch.func.functional_call(model, params, batch[0]), batch[1]
    ).backward()


def _no_grad(model, batch):
    with torch.no_grad():
        model(batch[0] * 5)
    with torch.inference_mode():
        model(batch[0] * 5)


def _forward_only(model, batch):
    model(batch[0] * 5)


BESIDE = [
    _input_gradient, _weight_gradients, _one_weight_gradient, _backward_to_the_input, _functional_gradient,
    _per_sample_gradients, _jvp, _hessian_vector_product, _forward_mode, _other_weights, _no_grad, _forward_only,
]  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # jvp's own
@pytest.mark.parametrize("beside", BESIDE, ids=lambda f: f.__name__.strip("_"))
def test_beside_training(beside):
    """What doesn't add to the weights' gradients doesn't add to the statistics either."""
    model, optimizer, twin, other, batches = pair()
    for batch in batches:
        optimizer.zero_grad()
        beside(model, batch)
        loss_of(model, batch).backward()
        beside(model, batch)
        optimizer.step()
        beside(model, batch)
    train(twin, other, batches)
    assert_same(model, optimizer, twin, other)


def test_gradients_filled_in_by_hand_train_and_warn_that_the_factors_stay():
    model, batches = model_and_batches("mlp", steps=2)
    optimizer = SINGD(model, **FAST)
    before = copy.deepcopy(model.state_dict())
    for p, g in zip(
        model.parameters(),
        torch.autograd.grad(loss_of(model, batches[0]), list(model.parameters())),
        strict=True,
    ):
        p.grad = g
    with pytest.warns(UserWarning, match="let backward\\(\\) fill in the gradients"):
        optimizer.step()
    assert not any(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_activations_in_place():
    model, batches = model_and_batches("mlp")
    for i in (1, 3):
        model[i] = nn.ReLU(inplace=True)
    twin = copy.deepcopy(model)
    for i in (1, 3):
        twin[i] = nn.ReLU()
    optimizer, other = SINGD(model, **FAST), SINGD(twin, **FAST)
    train(model, optimizer, batches)
    train(twin, other, batches)
    assert_same(model, optimizer, twin, other)


def test_clipping_is_of_gradients_alone():
    for clip in (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_):
        model, optimizer, twin, other, batches = pair(steps=1)
        loss_of(model, batches[0]).backward()
        clip(model.parameters(), 0.01)
        optimizer.step()
        train(twin, other, batches)
        for a, b in zip(optimizer.factors("0"), other.factors("0"), strict=True):
            assert torch.equal(a.dense(), b.dense())
        step, full = model[0].weight.grad, twin[0].weight.grad
        assert 0 < step.abs().max() <= 0.01 < full.abs().max()
        assert not torch.equal(model[0].weight, twin[0].weight)


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    model, optimizer, twin, other, batches = pair()
    for batch in batches:
        calls = []

        def closure(batch=batch, calls=calls):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            calls.append(loss)
            return loss

        with torch.no_grad():
            assert optimizer.step(closure) is calls[0]
        assert len(calls) == 1
    train(twin, other, batches)
    assert_same(model, optimizer, twin, other)


# -- bad and empty batches -----------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e200])
@pytest.mark.parametrize("structure", ["dense", "diagonal", "block3diagonal", "triltoeplitz"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_bad_micro_batch_among_good_ones(bad, structure, position):
    model, optimizer, twin, other, batches = pair(structures=(structure, structure))
    batches = [(x.float(), y) for x, y in batches]
    model.float(), twin.float()
    for i, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        if i == position:
            spoilt = x.clone().double()
            spoilt[1, 2] = bad
            loss_of(model, (spoilt.float(), y)).backward()
            model.zero_grad()  # the user throws the gradients away, but the statistics are guarded too
        loss_of(model, (x, y)).backward()
        optimizer.step()
    train(twin, other, batches)
    assert_same(model, optimizer, twin, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "loss"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "shared"])
def test_factors_with_a_bad_batch_are_those_of_the_good_ones_alone(bad, where, name):
    """The gradients of both are accumulated, and only those are spoilt."""
    model, optimizer, twin, other, (good, again) = pair(name, steps=2)
    spoilt = good[0].clone()
    if where == "input":
        spoilt.view(len(spoilt), -1)[1] = bad  # tanh hides an inf of one entry from later layers
    loss_of(model, good).backward()
    loss = loss_of(model, (spoilt, good[1]))
    (loss * bad if where == "loss" else loss).backward()
    loss_of(model, again).backward()
    for batch in (good, again):
        loss_of(twin, batch).backward()
    assert not all(torch.isfinite(p.grad).all() for p in model.parameters())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad.copy_(q.grad)
    optimizer.step(), other.step()
    assert_same(model, optimizer, twin, other)


def test_a_batch_that_is_bad_alone_leaves_the_factors_as_they_are():
    model, batches = model_and_batches("mlp", steps=2)
    optimizer = SINGD(model, **FAST)
    train(model, optimizer, batches[:1])
    before = [f.dense() for f in optimizer.factors("0")]
    optimizer.zero_grad()
    (loss_of(model, batches[1]) * float("nan")).backward()
    optimizer.step()
    assert all(
        torch.equal(f.dense(), b) for f, b in zip(optimizer.factors("0"), before, strict=True)
    )


@pytest.mark.parametrize("name", ["mlp", "cnn", "shared"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_an_empty_batch_adds_nothing(name, kfac_approx):
    model, optimizer, twin, other, batches = pair(name, kfac_approx=kfac_approx)
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model, (x[:0], y[:0]), terms=6).backward()
        loss_of(model, (x, y), terms=6).backward()
        loss_of(model, (x[:0], y[:0]), terms=6).backward()
        optimizer.step()
        other.zero_grad()
        loss_of(twin, (x, y), terms=6).backward()
        other.step()
    assert_same(model, optimizer, twin, other)


def test_an_empty_batch_alone_changes_no_factor():
    model, batches = model_and_batches("mlp", steps=2)
    optimizer = SINGD(model, **FAST, weight_decay=0.0)
    train(model, optimizer, batches[:1])
    before = [f.dense() for f in optimizer.factors("0")]
    optimizer.zero_grad()
    loss_of(model, (batches[1][0][:0], batches[1][1][:0]), terms=6).backward()
    optimizer.step()
    assert all(
        torch.equal(f.dense(), b) for f, b in zip(optimizer.factors("0"), before, strict=True)
    )
    assert all(torch.isfinite(p).all() for p in model.parameters())


# -- memory --------------------------------------------------------------------


def test_inputs_are_let_go_with_the_backward_even_if_the_loss_is_kept():
    model, batches = model_and_batches("mlp", steps=1)
    optimizer = SINGD(model, **FAST)
    seen = []
    model[2].register_forward_pre_hook(
        lambda m, args: seen.append(weakref.ref(args[0].untyped_storage()))
    )
    loss = loss_of(model, batches[0])
    gc.collect()
    assert seen[0]() is not None
    loss.backward()
    assert seen[0]() is None
    optimizer.step()


def test_a_forward_without_backward_is_let_go_without_the_garbage_collector():
    model, batches = model_and_batches("mlp", steps=1)
    optimizer = SINGD(model, **FAST)
    seen = []
    model[2].register_forward_pre_hook(
        lambda m, args: seen.append(weakref.ref(args[0].untyped_storage()))
    )
    gc.disable()
    try:
        loss = loss_of(model, batches[0])
        assert seen[0]() is not None
        del loss
        assert seen[0]() is None
    finally:
        gc.enable()
    assert optimizer._collector.statistics == {}


def test_an_optimizer_that_is_gone_leaves_the_model_alone():
    model, batches = model_and_batches("mlp")
    optimizer = SINGD(model, **FAST)
    alive = weakref.ref(optimizer)
    train(model, optimizer, batches[:1])
    del optimizer
    gc.collect()
    assert alive() is None
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches[1:])


def test_two_optimizers_of_one_model_one_after_the_other():
    model, optimizer, twin, other, batches = pair()
    train(model, optimizer, batches[:1])
    train(twin, other, batches[:1])
    optimizer, other = SINGD(model, **FAST), SINGD(twin, **FAST)
    del other
    other = SINGD(twin, **FAST)
    train(model, optimizer, batches[1:])
    train(twin, other, batches[1:])
    assert_same(model, optimizer, twin, other)
