"""What must hold on an accelerator: `make gpu` runs it where there is one. SINGD_DEVICE names another device."""

import copy
import os

import pytest
import torch
from models import MODELS, model_and_batches, train
from published import SINGD as Published
from torch import nn

from singd import SINGD, kernels, registered_structures, structure
from singd.rows import DenseRows

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("SINGD_DEVICE", "cuda"))
RULES = ("singd", "ikfac", "kfac", "shampoo")


def on_device(batches):
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches]


@pytest.mark.parametrize("name", registered_structures())
@pytest.mark.parametrize("n", [1, 7, 40, 200])
def test_products_and_projections_are_those_of_the_cpu(name, n):
    eye = structure(name)(n, dtype=torch.float64)
    A, X = eye + eye.map(torch.randn_like) * 0.1, torch.randn(n, 5, dtype=torch.float64)
    rows = torch.randn(9, n, dtype=torch.float64)
    B, Y = A.to(device=DEVICE), X.to(DEVICE)
    for there, here in (
        (B.mm(Y), A.mm(X)),
        (B.tmm(Y), A.tmm(X)),
        (B.mm_AAt(Y), A.mm_AAt(X)),
        ((B @ B).dense(), (A @ A).dense()),
        (B.gram().dense(), A.gram().dense()),
        (
            B.project_congruence(DenseRows(rows.to(DEVICE))).dense(),
            A.project_congruence(DenseRows(rows)).dense(),
        ),
        (B.spectral_norm(), A.spectral_norm()),
    ):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [SINGD, Published], ids=["defaults", "published"])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_that_of_the_cpu(name, make, rule):
    model, batches = model_and_batches(name, steps=6)
    twin = copy.deepcopy(model).to(DEVICE)
    options = dict(lr=1e-2, rule=rule, structures=("block3diagonal", "diagonal"))
    train(model, make(model, **options), batches)
    train(twin, make(twin, **options), on_device(batches))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_no_step_waits_for_the_device(name):
    model, batches = model_and_batches(name, steps=4)
    model, batches = model.to(DEVICE), on_device(batches)
    optimizer = SINGD(model, lr=1e-3)
    train(model, optimizer, batches[:2])
    (x, y) = batches[2]
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
        optimizer.step()
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_half_precision_and_a_scaler_stay_finite():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)).to(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE.type)
    optimizer = SINGD(model, lr=3e-3, grad_scaler=scaler)
    x, losses = torch.randn(64, 20, device=DEVICE), []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(
            DEVICE.type, torch.float16 if DEVICE.type == "cuda" else torch.bfloat16
        ):
            loss = (model(x) - x[:, :4]).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_there_for_speed_changes_nothing():
    model, batches = model_and_batches("cnn", steps=4)
    twin = copy.deepcopy(model)
    model, twin, batches = model.to(DEVICE), twin.to(DEVICE), on_device(batches)
    train(model, SINGD(model, lr=1e-2), batches)
    with kernels.use("plain"):
        train(twin, SINGD(twin, lr=1e-2), batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8)
