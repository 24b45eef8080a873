r"""
What does it cost?
==================

Theory counts multiplications. This page shows what a structure costs in
practice: it reads one run of ``make bench``, in which SINGD, the published
package and six other optimizers took turns on three networks.

.. admonition:: What you will learn

   - **Read** an overhead over SGD, and where it comes from.
   - **Find** the width from which a structure is cheaper than dense.
   - **Tell** when another optimizer is cheaper.

   You should have read
   :ref:`sphx_glr_auto_gallery_4_structures_plot_44_choosing.py`.

What is counted
---------------

A layer has :math:`d_i` inputs, :math:`d_o` outputs and :math:`m` rows in its
batch. With dense factors one natural gradient and one update take about

.. math::

   2 d_i d_o (d_i + d_o) \quad\text{and}\quad
   3 m (d_i^2 + d_o^2) + 3 (d_i^3 + d_o^3)

operations; the update comes every :math:`T` steps. Times are CPU time of one
thread. An overhead is the time of an iteration minus that of SGD just before.
"""

import json
import pathlib

import matplotlib.pyplot as plt

FILE = "docs/_data/what_it_costs.json"  # in the repository; make bench writes
NETWORKS = {
    "mlp": "MLP 784-1024-1024-10",
    "cnn": "CNN of four convolutions",
    "vit": "ViT, four blocks of 192",
}
SHOWN = (
    "dense",
    "hierarchical15_15",
    "block30diagonal",
    "triltoeplitz",
    "diagonal",
)
COLORS = dict(zip(SHOWN, ("C0", "C5", "C4", "C8", "C9")))

# %%
# Where it was measured. The load says how much else ran there.

here = pathlib.Path.cwd()
root = next(p for p in (here, *here.parents) if (p / FILE).exists())
results = json.loads((root / FILE).read_text())
machine, trained = results["machine"], results["training"]
print(
    *(f"{key} {machine[key]}" for key in ("cpu", "torch", "threads", "load"))
)


def overhead(network, name):
    """The median overhead in percent of SGD's iteration."""
    rows = {r["name"]: r for r in trained[network]["contenders"]}
    sgd = trained[network]["sgd_ms"]["median"]
    return 100 * rows[name]["overhead_ms"]["median"] / sgd


# %%
# **Before you run on:** which of them is cheaper than SINGD with diagonal
# factors, which is dearer than SINGD with dense ones?
#
# The price of a step
# -------------------
#
# Blue is SINGD at :math:`T=10`, a ring is :math:`T=1`. Grey is all else, every
# ten steps too where it has a period. Muon takes matrices only.

others = (
    "AdamW",
    "Muon",
    "SOAP, T=10",
    "Shampoo, T=10",
    "textbook KFAC, T=10",
)
names = [*(f"{s}, T=10" for s in SHOWN), *others]
colors = ["C0"] * len(SHOWN) + ["C7"] * len(others)
fig, axes = plt.subplots(3, 1, figsize=(5.2, 8.4), sharex=True)
for ax, (network, title) in zip(axes, NETWORKS.items()):
    values = [max(overhead(network, name), 0.3) for name in names]
    ax.hlines(names, 0.3, values, color=colors, lw=1)
    ax.scatter(values, names, color=colors, zorder=3)
    often = [overhead(network, f"{s}, T=1") for s in SHOWN]
    ax.scatter(often, names[: len(SHOWN)], edgecolor="C1", facecolor="white")
    ax.set(xscale="log", xlim=(0.28, None), title=title)
    ax.invert_yaxis()
_ = axes[-1].set_xlabel("overhead, % of an iteration of SGD")

# sphinx_gallery_start_ignore
for network in NETWORKS:
    dense, often = (overhead(network, f"dense, T={T}") for T in (10, 1))
    assert dense < often / 2
    assert overhead(network, "diagonal, T=10") < dense
# sphinx_gallery_end_ignore

# %%
# On each network dense factors at :math:`T=10` cost less than half of
# :math:`T=1`, and diagonal ones less than dense ones. (What is at the left
# edge is too cheap to be measured.) Cheaper than diagonal factors are:

for network in NETWORKS:
    limit = overhead(network, "diagonal, T=10")
    print(network, [n for n in others if overhead(network, n) < limit])

# %%
# What the defaults cost
# ----------------------
#
# Over 1,000 steps of the default schedule, an iteration beside AdamW's.
# Products :math:`K K^\top` are kept with ``cache_products=True``.

defaults = results["defaults"]
fig, ax = plt.subplots(figsize=(5.2, 3.4))
for network, marker in zip(NETWORKS, "osD"):
    cost = {r["name"]: r["ms"] for r in defaults[network]["contenders"]}
    shares = {n: ms / cost["AdamW"] for n, ms in cost.items() if n != "AdamW"}
    ax.plot(shares.values(), shares.keys(), marker, label=network)
    print(network, *(f"{s:6.2f}  {n}" for n, s in shares.items()), sep="\n")
ax.axvline(1, color="C7", ls=":")
ax.set(xscale="log", title="The defaults", xlabel="iteration, AdamW = 1")
ax.set_xticks(ticks := (1, 1.5, 2, 5, 10), ticks)
ax.minorticks_off()
_ = ax.legend()
tiny = defaults["tiny"]
ratio = tiny["SINGD step_ms"] / tiny["AdamW step_ms"]
print(f"a thousand layers of 8 x 8: {ratio:.1f} times AdamW's step")
# sphinx_gallery_start_ignore
assert ratio < 2
for network in NETWORKS:
    cost = {r["name"]: r["ms"] for r in defaults[network]["contenders"]}
    assert cost["diagonal"] < 1.1 * cost["AdamW"]
    limit = 1.5 if network == "mlp" else 1.25
    assert cost["as they are"] < limit * cost["AdamW"]
# sphinx_gallery_end_ignore
# %%
# An iteration takes less than 1.1 of AdamW's with diagonal factors, and with
# the default ones less than 1.5; on the larger networks less than 1.25. A
# thousand tiny layers share calls, and take less than twice AdamW's step.
#
# Next to the published package
# -----------------------------
#
# Our overhead over that of ``singd`` 0.0.5, same structure and :math:`T`.

pairs = [r for r in results["marks"] if "share" in r]
pairs.sort(key=lambda r: -r["share"])
labels = [f"{r['workload']} {r['structure']}, T={r['T']}" for r in pairs]
fig, ax = plt.subplots(figsize=(5.2, 4.4))
ax.plot([r["share"] for r in pairs], labels, "o")
ax.axvline(1, color="C7", ls=":")
ax.set(xscale="log", xlim=(0.004, 2), xlabel="our overhead / published")
ax.set_title("Most cost less than 60 % of it")
ax.grid(axis="y", alpha=0.3)

dense = [r for r in pairs if r["structure"] == "dense"]
assert all(r["share"] < 1 for r in dense)
half = sum(r["share"] < 0.6 for r in pairs)
print(f"{half} of {len(pairs)} are below 60 %")
assert half > len(pairs) / 2
print("dearer:", *[t for t, r in zip(labels, pairs) if r["share"] > 1])

# %%
# Against the width
# -----------------
#
# The update of a layer with :math:`d` inputs, :math:`d` outputs and 128 rows,
# and :math:`K K^\top` times 128 vectors. On logarithmic axes an exponent is a
# slope.

widths, costs = results["widths"]["widths"], results["widths"]["structures"]
fig, axes = plt.subplots(2, 1, figsize=(5.2, 6.4), sharex=True)
parts = {"update": "update", "gradient": "K Kᵀ times 128 vectors"}
for ax, (part, title) in zip(axes, parts.items()):
    for name in SHOWN:
        values, look = costs[name][f"{part}_ms"], COLORS[name] + "o-"
        ax.plot(widths, values, look, ms=4, label=name)
    ax.set(xscale="log", yscale="log", ylabel="CPU time, ms", title=title)
    ax.set_xticks(widths, widths)
    ax.minorticks_off()
axes[1].set_xlabel("width $d$")
axes[0].legend()

for name in SHOWN:
    fits = [costs[name][f"{p}_exponent"] for p in parts]
    theory = [costs[name][f"{p}_exponent_in_theory"] for p in parts]
    print(f"{name:17} fitted {fits[0]:.1f} and {fits[1]:.1f}, ", end="")
    print(f"in theory {theory[0]:.1f} and {theory[1]:.1f}")

# sphinx_gallery_start_ignore
for cost, p in ((costs[name], p) for name in SHOWN for p in parts):
    assert cost[f"{p}_exponent"] < cost[f"{p}_exponent_in_theory"] + 0.5
    assert cost is costs["dense"] or cost[f"{p}_below_dense_from"] is not None
# sphinx_gallery_end_ignore

# %%
# No exponent is more than 0.5 above the theory's. Below it, starting operators
# costs more than their work. So a structure pays from some width on only, once
# for updates and once for :math:`K K^\top` (64 is the smallest measured):

for name in SHOWN[1:]:
    starts = [costs[name][f"{p}_below_dense_from"] for p in parts]
    print(
        f"{name:17} cheaper than dense from {starts[0]:.0f}, {starts[1]:.0f}"
    )

# %%
# Memory
# ------
#
# Bytes that are kept between steps on the ViT, over what AdamW keeps, with
# ``singd.PUBLISHED``: it keeps products, too, unless ``cache_products=False``.

memory = results["memory"]
kept = {r["name"]: r["bytes"] for r in memory["kept_on_vit"]}
kinds = [
    "SGD",
    *others,
    *(f"{s}, T=10" for s in SHOWN),
    "dense without cache, T=10",
]
kinds.sort(key=lambda name: -kept[name])
fig, ax = plt.subplots(figsize=(5.2, 4))
for name in kinds:
    share, ours = kept[name] / kept["AdamW"], name.startswith(SHOWN)
    ax.plot(share, name, "o", color="C0" if ours else "C7")
    ax.annotate(f"  {share:.2g}", (share, name), va="center")
ax.axvline(1, color="C7", ls=":")
ax.set(xscale="log", xlim=(0.4, 14), xlabel="bytes kept, AdamW = 1")
ax.set_title("State kept on the ViT")

# sphinx_gallery_start_ignore
layers = memory["layers_on_vit"]
for name in ("diagonal", "triltoeplitz"):
    assert layers[name]["share_of_adamw"] < 0.51
    assert kept[f"{name}, T=10"] < 0.52 * kept["AdamW"]
assert layers["dense"]["share_of_adamw"] > 4
half = [r["factors_bfloat16"] / r["factors"] for r in layers.values()]
assert set(half) == {0.5}
peak = {r["name"]: r["bytes"] for r in memory["peak_on_cnn"]}
ours = [n for n in peak if f"published {n}" in peak]
assert all(peak[n] < peak[f"published {n}"] / 3 for n in ours)
# sphinx_gallery_end_ignore

# %%
# In the layers that SINGD preconditions, diagonal and Toeplitz factors need
# less than 0.51 of AdamW's state; dense ones more than four times as much.
# ``preconditioner_dtype=torch.bfloat16`` halves the factors. The peak of the
# CNN's updates is less than a third of the published package's.
#
# When not to use this
# --------------------
#
# Take another optimizer where
#
# - your loss falls as fast with AdamW, which is simpler;
# - your layers are tiny: starting operators is all that costs;
# - only dense factors help, and your layers are wide.
#
# A cost says nothing about what a step is worth.
#
# Measure it yourself
# -------------------
#
# ``make bench`` takes 15 minutes on two idle cores. It writes the file that
# this page reads, with all structures and quartiles, and renews the notebook.
#
# .. admonition:: Lessons learned
#
#    - The update is what costs; a larger :math:`T` divides it.
#    - Structure pays from some width on, not below.
#    - Memory is exact: choose by it first, if it is short.
#
# .. admonition:: Exercise
#
#    How many steps of SGD does one update with dense factors cost on the ViT?
#
# .. dropdown:: Solution
#
#    Each row holds the overhead of a step with and without an update.
#
#    .. code-block:: python
#
#        rows = {r["name"]: r for r in trained["vit"]["contenders"]}
#        dense = rows["dense, T=10"]
#        update = dense["update_step_ms"] - dense["other_step_ms"]
#        assert update > trained["vit"]["sgd_ms"]["median"] / 4
#
# Where to go next: :doc:`/structures` has the counts, :doc:`/comparison` what
# other optimizers have and lack, :class:`~singd.SINGD` all arguments.
