"""Autocast and gradient scalers: the statistics see the gradients as if nothing had been scaled."""

import copy
import pickle

import pytest
import torch
from models import assert_same, model_and_batches
from published import SINGD
from torch import nn

FAST = dict(lr=0.1, T=1, lr_cov=0.1, damping=0.1)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def float_model(name="mlp", steps=4):
    model, batches = model_and_batches(name, steps=steps, batch=8)
    return model.float(), [(x.float(), y) for x, y in batches]


def scaler_of(scale=2.0**10, **kw):
    return torch.amp.GradScaler("cpu", init_scale=scale, **kw)


def scaled_step(model, optimizer, scaler, batches, clip=None):
    """One step as torch's AMP recipe has it, the batches accumulated."""
    optimizer.zero_grad()
    for batch in batches:
        scaler.scale(loss_of(model, batch) / len(batches)).backward()
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


def plain_step(model, optimizer, batches, clip=None):
    optimizer.zero_grad()
    for batch in batches:
        (loss_of(model, batch) / len(batches)).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


# -- a scaler, in float32, where a power of two as scale is exact --------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "shared"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_known_scaler_changes_nothing(name, clip, parts):
    model, batches = float_model(name)
    twin = copy.deepcopy(model)
    scaler = scaler_of(growth_interval=2)  # the scale grows on the way
    optimizer, other = SINGD(model, **FAST, grad_scaler=scaler), SINGD(twin, **FAST)
    for i in range(0, 4, parts):
        scaled_step(model, optimizer, scaler, batches[i : i + parts], clip)
        plain_step(twin, other, batches[i : i + parts], clip)
    assert scaler.get_scale() > 2.0**10
    assert_same(model, optimizer, twin, other, atol=1e-7 if clip else 0.0)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("backwards_clears", [False, True])
def test_a_skipped_step_is_no_step(clip, backwards_clears):
    model, batches = float_model(steps=4)
    twin = copy.deepcopy(model)
    scaler = scaler_of()
    optimizer, other = SINGD(model, **FAST, grad_scaler=scaler), SINGD(twin, **FAST)
    scaled_step(model, optimizer, scaler, batches[:1], clip)
    before, state = copy.deepcopy(model.state_dict()), optimizer.state_dict()["state"]
    x, y = batches[1]
    scaled_step(model, optimizer, scaler, [(x * float("inf"), y)], clip)
    assert scaler.get_scale() == 2.0**9  # it did skip
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    after = optimizer.state_dict()["state"]
    for index, entry in state.items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[index][key])), key
    if backwards_clears:
        model.zero_grad()
    for batch in batches[2:]:
        scaled_step(model, optimizer, scaler, [batch], clip)
    for batch in (batches[0], *batches[2:]):
        plain_step(twin, other, [batch], clip)
    assert_same(model, optimizer, twin, other, atol=1e-7 if clip else 0.0)


def test_an_overflow_in_one_of_two_micro_batches_leaves_the_other_ones_statistics():
    model, batches = float_model(steps=3)
    scaler = scaler_of()
    optimizer = SINGD(model, **FAST, grad_scaler=scaler)
    x, y = batches[1]
    scaled_step(model, optimizer, scaler, [batches[0], (x * float("nan"), y)])
    scaled_step(model, optimizer, scaler, [batches[2]])
    assert all(torch.isfinite(f.dense()).all() for f in optimizer.factors("0"))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_disabled_scaler_is_none():
    model, batches = float_model()
    twin = copy.deepcopy(model)
    scaler = scaler_of(enabled=False)
    optimizer, other = SINGD(model, **FAST, grad_scaler=scaler), SINGD(twin, **FAST)
    unknown = SINGD(model, **FAST)
    for batch in batches:
        scaled_step(model, optimizer, scaler, [batch])
        plain_step(twin, other, [batch])
    assert_same(model, optimizer, twin, other)
    scaled_step(model, unknown, scaler, batches[:1])


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_scaler_that_singd_was_not_told_of_is_a_clear_error(clip):
    model, batches = float_model()
    before = copy.deepcopy(model.state_dict())
    optimizer, scaler = SINGD(model, **FAST), scaler_of()
    with pytest.raises(
        RuntimeError, match=r"build it with SINGD\(..., grad_scaler=scaler\)"
    ) as raised:
        scaled_step(model, optimizer, scaler, batches[:1], clip)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plain_step(model, optimizer, batches[:1])  # and the optimizer is as before
    twin = copy.deepcopy(model)
    twin.load_state_dict(before)
    other = SINGD(twin, **FAST)
    plain_step(twin, other, batches[:1])
    assert_same(model, optimizer, twin, other)


def test_another_scaler_than_the_known_one_is_a_clear_error():
    model, batches = float_model()
    optimizer = SINGD(model, **FAST, grad_scaler=scaler_of())
    with pytest.raises(
        RuntimeError, match=r"that scaler did not unscale the gradients of this step"
    ):
        scaled_step(model, optimizer, scaler_of(8.0), batches[:1])
    with pytest.raises(RuntimeError, match=r"use scaler.step\(optimizer\)"):
        plain_step(model, optimizer, batches[:1])


def test_a_known_scaler_survives_copies_and_checkpoints():
    model, batches = float_model()
    scaler = scaler_of()
    optimizer = SINGD(model, **FAST, grad_scaler=scaler)
    scaled_step(model, optimizer, scaler, batches[:1])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scaler.state_dict()))
    twins = (
        copy.deepcopy((model, optimizer, scaler)),
        pickle.loads(pickle.dumps((model, optimizer, scaler))),
    )
    resumed = copy.deepcopy(model), scaler_of()
    resumed = (resumed[0], SINGD(resumed[0], **FAST, grad_scaler=resumed[1]), resumed[1])
    for target, value in zip(resumed, saved, strict=True):
        target.load_state_dict(value)
    for batch in batches[1:]:
        for triple in ((model, optimizer, scaler), *twins, resumed):
            scaled_step(*triple, [batch])
    for twin, other, _ in (*twins, resumed):
        assert_same(model, optimizer, twin, other)


# -- autocast ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_is_close_to_float32(name, dtype, backward_inside):
    """In one step from the same weights, the factors differ by the rounding of what they are made of."""
    model, batches = float_model(name, steps=1)
    twin = copy.deepcopy(model)
    scaler = scaler_of(2.0**8, enabled=dtype is torch.float16)
    optimizer = SINGD(model, **FAST, grad_scaler=scaler)
    other = SINGD(twin, **FAST)
    with torch.autocast("cpu", dtype):
        loss = scaler.scale(loss_of(model, batches[0]))
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    scaler.step(optimizer)
    plain_step(twin, other, batches)
    layer = next(n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    for mine, theirs in zip(optimizer.factors(layer), other.factors(layer), strict=True):
        mine, theirs = mine.dense(), theirs.dense()
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 4 * torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype):
    model, batches = float_model(steps=1)
    scaler = scaler_of(2.0**16, enabled=dtype is torch.float16)
    optimizer = SINGD(model, **FAST, grad_scaler=scaler)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, batches[0])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


def test_float16_gradients_too_small_for_float16_still_count():
    """g^T g of scaled gradients that are just in range; unscaled and squared they would all be zero in float16."""
    model, batches = float_model(steps=1)
    twin = copy.deepcopy(model)
    scaler = scaler_of(2.0**12)
    optimizer = SINGD(model, **FAST, grad_scaler=scaler)
    other = SINGD(twin, **FAST)
    x, y = batches[0]
    with torch.autocast("cpu", torch.float16):
        scaler.scale(loss_of(model, (x, y)) * 1e-5).backward()
    (loss_of(twin, (x, y)) * 1e-5).backward()
    mine, theirs = (
        o._collector.statistics[o._blocks[0]].normalised()[0].H_C.dense()
        for o in (optimizer, other)
    )
    assert 0 < theirs.max() < torch.finfo(torch.float16).smallest_normal ** 2
    assert (mine - theirs).norm() < 4 * torch.finfo(torch.float16).eps * theirs.norm()


def test_an_input_changed_in_place_after_an_autocast_layer():
    """Legal in torch: the layer kept a copy of lower precision."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = x * 2
            x += self.inner(x)
            return self.head(x)

    model = Residual()
    _, batches = float_model(steps=3)
    optimizer = SINGD(model, **FAST)
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
    K = optimizer.factors("inner").K.dense()
    assert not torch.equal(K, torch.eye(7))
