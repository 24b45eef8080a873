"""A step that fails has happened or has not, layer by layer, and the optimizer goes on."""

import copy
import itertools
import warnings
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from published import FAST, PUBLISHED
from torch import nn

import singd
from singd import SINGD, register_structure
from singd.structures import Dense

F64 = torch.float64


class Faulty(Dense):
    """A dense factor that fails when it is told to: out of memory, say, or Ctrl-C."""

    method: ClassVar[str] = "compose"  # the product that moves a factor
    fails_at: ClassVar[int | None] = None  # which of its next calls fails
    error: ClassVar[type[BaseException]] = MemoryError

    @classmethod
    def eye(cls, n, **kw):
        if torch.device(kw.get("device") or "cpu").type != "meta":
            cls.fail("eye")
        return super().eye(n, **kw)

    def compose(self, other):
        self.fail("compose")
        return self.from_flat(
            super().compose(other).flat()
        )  # of this class, where that gives a Dense

    @staticmethod
    def fail(method):
        if method != Faulty.method or Faulty.fails_at is None:
            return
        Faulty.fails_at -= 1
        if Faulty.fails_at < 0:
            Faulty.fails_at = None
            raise Faulty.error("in the middle of an update")


@pytest.fixture(autouse=True)
def _no_fault_is_left():
    register_structure("faulty", Faulty)
    yield
    Faulty.method, Faulty.fails_at, Faulty.error = "compose", None, MemoryError


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def build():
    torch.manual_seed(0)
    model = mlp().to(F64)
    return model, SINGD(model, **{**FAST, "structures": ("faulty", "faulty")})


def backward(model, optimizer, step):
    torch.manual_seed(100 + step)
    optimizer.zero_grad()
    x = torch.randn(8, 5, dtype=F64)
    nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()


PRODUCTS = 2 * 3  # one per factor


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("fails_at", range(PRODUCTS))
def test_a_step_that_failed_can_be_taken_again(when, fails_at, error):
    """In the first step, when nothing has state yet, and later; the result is as if nothing had been."""
    Faulty.error = error
    model, optimizer = build()
    twin, other = build()
    for step in range(4):
        backward(model, optimizer, step)
        if step == when:
            Faulty.fails_at = fails_at
            with pytest.raises(error, match="in the middle"):
                optimizer.step()
        optimizer.step()
        backward(twin, other, step)
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    for name in ("0", "2", "4"):
        for a, b in zip(optimizer.factors(name), other.factors(name), strict=True):
            assert torch.equal(a.dense(), b.dense())


@pytest.mark.parametrize("fails_at", range(PRODUCTS))
def test_a_failed_step_moves_no_weight(fails_at):
    model, optimizer = build()
    backward(model, optimizer, 0)
    before = copy.deepcopy(model.state_dict())
    Faulty.fails_at = fails_at
    with pytest.raises(Faulty.error):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("fails_at", range(PRODUCTS))
def test_a_checkpoint_of_a_failed_first_step_loads(fails_at):
    model, optimizer = build()
    backward(model, optimizer, 0)
    Faulty.fails_at = fails_at
    with pytest.raises(Faulty.error):
        optimizer.step()
    other, resumed = build()
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (other, resumed)):
        backward(m, o, 1)
        o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.isfinite(p).all()
        assert torch.equal(p, q)


@pytest.mark.parametrize("fails_at", range(2 * PRODUCTS))
def test_identities_that_could_not_be_made_are_made_later(fails_at):
    """They are made at the first backward or the first step, which is where memory ends."""
    model, optimizer = build()
    Faulty.method, Faulty.fails_at = "eye", fails_at
    try:
        backward(model, optimizer, 0)
        optimizer.step()
    except MemoryError:
        pass
    saved = optimizer.state_dict()
    for step in range(3):
        backward(model, optimizer, step)
        optimizer.step()
    build()[1].load_state_dict(saved)
    build()[1].load_state_dict(optimizer.state_dict())
    K, C, *_ = optimizer.factors("2")
    assert not any(torch.equal(F.dense(), torch.eye(F.n, dtype=F64)) for F in (K, C))


@pytest.mark.parametrize("momentum_on", ["direction", "gradient"])
def test_a_weight_that_cannot_be_moved_leaves_the_others_moved_once(momentum_on):
    """The error comes from torch itself, in the middle of the weights."""

    def ready():
        model, _ = build()
        optimizer = SINGD(model, **{**FAST, "momentum_on": momentum_on})
        backward(model, optimizer, 0)
        optimizer.step()
        backward(model, optimizer, 1)
        return model, optimizer

    (model, optimizer), (twin, other) = ready(), ready()
    weight = model[2].weight
    right = weight.data
    weight.data = torch.ones(1, 1, dtype=F64).expand(4, 4)  # which cannot be written to
    for _ in range(2):
        with pytest.raises(RuntimeError, match="single memory location"):
            optimizer.step()
    weight.data = right
    optimizer.step()
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


# -- what is not finite ------------------------------------------------------------------------------


def all_finite(optimizer):
    tensors = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return all(bool(t.isfinite().all()) for t in tensors)


def test_a_float16_factor_never_becomes_infinite():
    """Its momentum would pass 65,504, the largest number of the format."""
    model = nn.Sequential(nn.Linear(5, 3))
    optimizer = SINGD(
        model, **{**FAST, "lr": 1e-6}, kfac_like=True, preconditioner_dtype=torch.float16
    )
    x = 500 * torch.randn(16, 5)

    def run():
        for _ in range(3):
            optimizer.zero_grad()
            (1e-6 * model(x).square().mean()).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="layer '0'") as told:
        run()
    assert sum("layer '0'" in str(w.message) for w in told) == 1
    assert all_finite(optimizer)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings(
    "ignore:The factors of layer"
)  # the published step on them has no bound
@pytest.mark.parametrize("options", [{}, FAST], ids=["defaults", "published"])
def test_a_gradient_that_float16_cannot_hold_spoils_no_weight(options):
    """The factors are narrower than the gradient that they precondition."""
    model = nn.Sequential(nn.Linear(5, 3))
    optimizer = singd.SINGD(model, **options, preconditioner_dtype=torch.float16)
    (1e3 * model(500 * torch.randn(16, 5)).square().mean()).backward()
    assert model[0].weight.grad.isfinite().all() and model[0].weight.grad.abs().max() > 65_504
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all_finite(optimizer)


def one_loss_too_large(**options):
    """The warnings of a run with it, the model, and the largest growth of a factor's norm at each step."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = SINGD(model, **{**PUBLISHED, "T": 1, "lr_cov": 0.05, **options})
    told, norms = [], []
    for step in range(200):
        x = torch.randn(32, 5)
        loss = 10 * nn.functional.cross_entropy(model(x), x.argmax(1) % 3)
        optimizer.zero_grad()
        (loss * (100.0 if step == 20 else 1.0)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told += [str(w.message) for w in caught]
        stats = optimizer.stats()
        norms.append([line[key] for line in stats.values() for key in ("norm_K", "norm_C")])
    for name in ("0", "2", "4"):
        assert all(F.dense().isfinite().all() for F in optimizer.factors(name))
    growth = [
        max(new / old for old, new in zip(*pair, strict=True)) for pair in itertools.pairwise(norms)
    ]
    return told, model, growth


def test_one_loss_a_hundred_times_too_large_is_told_of_once_per_layer_with_the_remedy():
    told, _, growth = one_loss_too_large()
    assert any("layer '" in message for message in told)
    assert all("lr_cov" in message for message in told)  # the remedy
    assert len(told) == len(set(told)) <= 3
    assert growth[19] > 10 > growth[18]  # what `stats` shows where nothing warns


def test_the_remedy_for_a_loss_that_is_too_large():
    told, model, growth = one_loss_too_large(normalize_lr_cov="spectral")
    assert not told
    assert max(growth) < 2
    assert all(p.isfinite().all() for p in model.parameters())


# -- several processes -------------------------------------------------------------------------------


@pytest.fixture
def _two_processes(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *a: 2)
    monkeypatch.setattr(dist, "get_rank", lambda *a: 0)


def failing_step(monkeypatch, error):
    def all_reduce(*args, **kw):
        raise error

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    model, optimizer = build()
    backward(model, optimizer, 0)
    optimizer.step()


@pytest.mark.usefixtures("_two_processes")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
        RuntimeError("Tensors must be contiguous"),
    ],
    ids=["memory", "another"],
)
def test_an_error_that_is_no_lost_process_is_not_called_one(monkeypatch, error):
    with pytest.raises(type(error)) as raised:
        failing_step(monkeypatch, error)
    assert raised.value is error


@pytest.mark.usefixtures("_two_processes")
@pytest.mark.parametrize(
    "error",
    [
        dist.DistNetworkError("The client socket has failed to connect"),
        RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms for recv"),
    ],
    ids=["network", "closed", "timeout"],
)
def test_a_lost_process_is_called_one(monkeypatch, error):
    with pytest.raises(RuntimeError, match="Rank 0 of 2 lost another process"):
        failing_step(monkeypatch, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 8, 80])
def test_a_gradient_of_zeros_leaves_the_weights_as_they_are(dtype, width):
    """Its direction has no size, so that none can be given to it."""
    torch.manual_seed(0)
    model = nn.Linear(width, width, dtype=dtype)
    optimizer = SINGD(model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.randn(3, width, dtype=dtype)) * 0.0).sum().backward()
        optimizer.step()
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name])
