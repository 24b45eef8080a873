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

# %%
# The file says on which machine it was measured.

here = pathlib.Path.cwd()
root = next(p for p in (here, *here.parents) if (p / FILE).exists())
results = json.loads((root / FILE).read_text())
machine, trained = results["machine"], results["training"]
print(machine["cpu"], "torch", machine["torch"], "threads", machine["threads"])


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
# Blue is SINGD at :math:`T=10`, orange dots are :math:`T=1`. Grey is all else,
# every ten steps too where it has a period. Muon takes matrices only: of the
# CNN it gets the last layer, AdamW the rest. The textbook's KFAC is our own.

others = (
    "AdamW",
    "Muon",
    "SOAP, T=10",
    "Shampoo, T=10",
    "textbook KFAC, T=10",
)
fig, axes = plt.subplots(1, 3, figsize=(9.6, 4.2), sharey=True)
names = [*(f"{s}, T=10" for s in SHOWN), *others]
for ax, (network, title) in zip(axes, NETWORKS.items()):
    values = [overhead(network, name) for name in names]
    colors = ["C0"] * len(SHOWN) + ["C7"] * len(others)
    ax.barh(names, [max(v, 0.3) for v in values], color=colors)
    often = [overhead(network, f"{s}, T=1") for s in SHOWN]
    ax.plot(often, range(len(SHOWN)), "o", color="C1", ms=5)
    ax.set(xscale="log", xlim=(0.3, None), title=title)
    ax.set_xlabel("overhead, % of SGD")
axes[0].invert_yaxis()

for network in NETWORKS:
    assert (
        overhead(network, "dense, T=10") < overhead(network, "dense, T=1") / 2
    )
    cheap = overhead(network, "diagonal, T=10")
    assert cheap < overhead(network, "dense, T=10")

# %%
# On each network dense factors at :math:`T=10` cost less than half of
# :math:`T=1`, and diagonal ones less than dense ones.
# These are cheaper than diagonal ones, if any:

for network in NETWORKS:
    limit = overhead(network, "diagonal, T=10")
    print(network, [n for n in others if overhead(network, n) < limit])

# %%
# Next to the published package
# -----------------------------
#
# Each bar is our overhead over that of ``singd`` 0.0.5, the black line the
# mark that we set ourselves. The dots are the least work that we know a way
# for, at the speed of one large matrix product.

marks = [r for r in results["marks"] if "share" in r]
fig, ax = plt.subplots(figsize=(7.4, 4.6))
labels = [f"{r['workload']} {r['structure']}, T={r['T']}" for r in marks]
ax.barh(labels, [r["share"] for r in marks], color="C0", label="ours")
limits = [r["mark"] for r in marks]
ax.scatter(limits, labels, marker="|", s=160, color="black", label="mark")
floors = [r["floor_ms"] / r["published_ms"] for r in marks]
ax.scatter(floors, labels, color="C1", s=20, label="floor", zorder=3)
ax.set(xscale="log", xlabel="share of the published overhead")
ax.invert_yaxis()
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))

dense = [r for r in marks if r["structure"] == "dense"]
assert all(r["share"] < 1 for r in dense)
assert all(r["times_floor"] < 5 for r in dense)
dearer = [t for t, r in zip(labels, marks) if r["share"] > 1]
print("dearer than published:", *dearer or ["none"], sep="\n  ")
missed = [t for t, r in zip(labels, marks) if r["share"] > r["mark"]]
print("marks that are missed:", *missed or ["none"], sep="\n  ")

# %%
# Dense factors cost less than published ones, and less than five times their
# floor. Others, as diagonals, move memory and make calls instead.
#
# Against the width
# -----------------
#
# The update of a layer with :math:`d` inputs, :math:`d` outputs and 128 rows,
# and :math:`K K^\top` times 128 vectors. On logarithmic axes an exponent is a
# slope.

widths, costs = results["widths"]["widths"], results["widths"]["structures"]
fig, axes = plt.subplots(1, 2, figsize=(9.2, 4), sharey=True)
parts = {"update": "update", "gradient": "$K K^\\top$ times 128 vectors"}
for ax, (part, title) in zip(axes, parts.items()):
    for name in SHOWN:
        ax.plot(widths, costs[name][f"{part}_ms"], "o-", ms=4, label=name)
    ax.set(xscale="log", yscale="log", xlabel="width $d$", title=title)
    ax.set_xticks(widths, widths, rotation=45)
    ax.minorticks_off()
axes[0].set_ylabel("CPU time, ms")
axes[0].legend(fontsize=8)

for name in SHOWN:
    fits = [costs[name][f"{p}_exponent"] for p in parts]
    theory = [costs[name][f"{p}_exponent_in_theory"] for p in parts]
    print(f"{name:17} fitted {fits[0]:.1f} and {fits[1]:.1f}, ", end="")
    print(f"in theory {theory[0]:.1f} and {theory[1]:.1f}")
    assert all(f < t + 0.5 for f, t in zip(fits, theory))

# %%
# No exponent is more than 0.5 above the theory's. Below it, calls cost more
# than numbers. So a structure pays from some width on only, once for updates
# and once for :math:`K K^\top` (64 is the smallest measured):

for name in SHOWN[1:]:
    starts = [costs[name][f"{p}_below_dense_from"] for p in parts]
    assert all(s is not None for s in starts)
    print(
        f"{name:17} cheaper than dense from {starts[0]:.0f}, {starts[1]:.0f}"
    )

# %%
# Memory
# ------
#
# Bytes that are kept between steps on the ViT, over what AdamW keeps. Dense
# factors keep their products :math:`K K^\top` too, unless
# ``cache_products=False``.

memory = results["memory"]
kept = {r["name"]: r["bytes"] for r in memory["kept_on_vit"]}
bars = [
    "SGD",
    *others,
    *(f"{s}, T=10" for s in SHOWN),
    "dense without cache, T=10",
]
fig, ax = plt.subplots(figsize=(7, 4.2))
colors = ["C7"] * (1 + len(others)) + ["C0"] * (1 + len(SHOWN))
ax.barh(bars, [kept[b] / kept["AdamW"] for b in bars], color=colors)
ax.axvline(1, color="black", lw=1)
ax.set(
    xlabel="bytes kept, AdamW = 1", title="From half of AdamW's to many times"
)
ax.invert_yaxis()

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

# %%
# In the layers that SINGD preconditions, diagonal and Toeplitz factors need
# less than 0.51 of AdamW's state; dense ones more than four times as much.
# ``preconditioner_dtype=torch.bfloat16`` halves the factors. The peak of the
# CNN's updates is less than a third of the published package's.
#
# When not to use this
# --------------------
#
# Another optimizer is the better buy where
#
# - your loss falls as fast with AdamW, which is simpler;
# - your network is tiny: calls are all that costs, and updates make many;
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
