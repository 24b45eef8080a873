"""`SINGD(model, lr=...)` without a word more: it trains, at AdamW's learning rates, and takes a blow."""

import copy
import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

x, y = load_digits(return_X_y=True)
X, Y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


class Tokens(nn.Module):
    """Rows of pixels as tokens: norms, a weight-shared layer, a loose parameter."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 10)
        self.mix = nn.Linear(32, 32)
        self.places = nn.Parameter(torch.zeros(8, 32))

    def forward(self, x):
        h = self.embed(x.view(-1, 8, 8)) + self.places
        return self.head(self.norm(h + torch.tanh(self.mix(h))).mean(1))


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    ),
    "tokens": Tokens,
}


def run(name, make, steps=200, seed=0, dtype=torch.float32, blow=lambda step: 1.0, scale=1.0):
    """The mean loss of the last ten steps, all losses, and the optimizer."""
    torch.manual_seed(seed)
    model = MODELS[name]().to(dtype)
    optimizer, losses = make(model), []
    batches = torch.Generator().manual_seed(seed)
    for step in range(steps):
        i = torch.randint(len(X), (100,), generator=batches)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X[i].to(dtype)).float(), Y[i])
        (scale * blow(step) * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10, losses, optimizer


def adamw(lr):
    return lambda model: torch.optim.AdamW(model.parameters(), lr=lr)


LRS = (3e-4, 1e-3, 3e-3, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_at_adamws_learning_rates(name, dtype):
    """At each of them, and at the best of them as far as AdamW at its own best."""
    ours = {lr: run(name, lambda m, lr=lr: SINGD(m, lr=lr), dtype=dtype)[:2] for lr in LRS}
    for end, losses in ours.values():
        assert all(torch.tensor(losses).isfinite()) and end < 0.95 * losses[0]
    theirs = min(run(name, adamw(lr), dtype=dtype)[0] for lr in LRS)
    assert min(end for end, _ in ours.values()) < 1.05 * theirs + 0.01


@pytest.mark.parametrize("c", [1e-6, 1e-3, 1e3, 1e6])
def test_the_scale_of_the_loss_does_not_matter(c):
    make = lambda m: SINGD(m.double(), lr=3e-3)  # noqa: E731
    ends = [run("mlp", make, steps=40, dtype=torch.float64, scale=scale)[1] for scale in (1.0, c)]
    assert max(abs(a - b) for a, b in zip(*ends, strict=True)) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_it_recovers_from_a_batch_whose_loss_is_a_thousand_times_too_large(name):
    """In as many steps as AdamW needs, to within a tenth of the undisturbed run."""
    after = {}
    for which, make in (("singd", lambda m: SINGD(m, lr=3e-3)), ("adamw", adamw(3e-3))):
        calm = run(name, make)[1]
        hit = run(name, make, blow=lambda step: 1e3 if step == 60 else 1.0)[1]
        means = [[sum(r[i : i + 10]) / 10 for i in range(61, 190)] for r in (calm, hit)]
        back = [b < 1.1 * a + 0.02 for a, b in zip(*means, strict=True)]
        after[which] = back.index(True) if True in back else len(back)
        assert all(torch.tensor(hit).isfinite())
    assert after["singd"] <= after["adamw"] + 20


@pytest.mark.parametrize(
    "structures", list(itertools.product(("dense", "block64diagonal", "diagonal"), repeat=2))
)
def test_no_factor_loses_its_inverse(structures):
    _, _, optimizer = run("mlp", lambda m: SINGD(m, lr=3e-3, structures=structures), steps=300)
    for layer in ("0", "2"):
        for F in optimizer.factors(layer):
            values = torch.linalg.svdvals(F.dense().double())
            assert values.min() > 1e-3 * values.max() > 0


@pytest.mark.parametrize("d_o", [64, 128, 512])
def test_the_whole_state_of_a_layer_is_below_adamws(d_o):
    model = nn.Linear(300, d_o, bias=False)
    optimizer = SINGD(model)
    for _ in range(2):
        model(torch.randn(8, 300)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    numbers = sum(
        t.numel() for t in optimizer.state[model.weight].values() if isinstance(t, torch.Tensor)
    )
    (block,) = optimizer._blocks
    kept = sum(
        t.numel()
        for A in block.factors._prepared[1] or ()
        if (form := getattr(A, "multiply", None)) is not None
        for t in form.__self__.tensors()
    )
    assert (kept > 0) == (d_o >= 128)
    assert numbers + kept <= 2 * model.weight.numel() + d_o + 300


def test_published_is_what_the_defaults_were():
    """A checkpoint of format 1 resumes as what it was, in an optimizer of the new defaults, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    twin = copy.deepcopy(model)
    old = SINGD(model, **PUBLISHED)
    new = SINGD(twin, structures=PUBLISHED["structures"], cache_products=True)
    saved = old.state_dict()
    for group in saved["param_groups"]:  # what format 1 did not know
        group["format"] = 1
        for option in (
            "rule",
            "relative_damping",
            "scaled_start",
            "fast_start",
            "momentum_on",
            "nesterov",
        ):
            del group[option]
        del group["match_rms"]
    new.load_state_dict(saved)
    for m, o in ((model, old), (twin, new)):
        for i in range(12):
            o.zero_grad()
            nn.functional.cross_entropy(
                m(X[i * 20 : i * 20 + 20].double()), Y[i * 20 : i * 20 + 20]
            ).backward()
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
