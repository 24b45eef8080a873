r"""
Stop, save, resume: is it the same run, to the last bit?
========================================================

A long run will be stopped: by a time limit, by a crash, by you. A checkpoint
is good if the resumed run cannot be told from one that never stopped. This
page saves, loads, and compares every bit.

.. admonition:: What you will learn

   - **Save** so that a kill at any moment leaves a whole file.
   - **Resume** to the same bits.
   - **Recognise** what a checkpoint must hold besides weights.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_11_replace_adamw.py`.

What has to be saved
--------------------

A step reads more than the weights :math:`W`. It reads the factors, their
momenta, the momentum of the weights, and the number of steps so far,

.. math::

   (W,\; K,\; C,\; m_K,\; m_C,\; \text{buf},\; t) ,

because the factors are updated at the steps :math:`t = 0, T, 2T, \dots`. Your
own loop adds the state of the random generator that draws the batches.
"""

import io
import os
import pathlib
import tempfile

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

STEPS, STOP, BATCH = 90, 45, 64
OPTIONS = PUBLISHED | dict(lr=3e-3, T=2, lr_cov=0.2, normalize_lr_cov=True)
_ = torch.set_num_threads(1)  # the same digits on every machine
folder = tempfile.TemporaryDirectory()  # removed when Python ends
path = pathlib.Path(folder.name) / "checkpoint.pt"

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 16


def build():
    """A model, its optimizer, and the generator of the batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = SINGD(model, **OPTIONS)
    return model, optimizer, torch.Generator().manual_seed(1)


def train(model, optimizer, shuffle, steps):
    losses = []
    for _ in range(steps):
        batch = torch.randint(0, 1797, (BATCH,), generator=shuffle)
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
# Save by renaming
# ----------------
#
# Never write onto the last good checkpoint. Write beside it, force it to disk,
# then rename. Renaming is atomic: a reader finds the old file or the new one,
# never a part of one.


def save(model, optimizer, shuffle):
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "shuffle": shuffle.get_state(),
    }
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def resume(keys=("model", "optimizer", "shuffle")):
    model, optimizer, shuffle = build()
    checkpoint = torch.load(path, weights_only=True)
    if "model" in keys:
        model.load_state_dict(checkpoint["model"])
    if "optimizer" in keys:
        optimizer.load_state_dict(checkpoint["optimizer"])
    if "shuffle" in keys:
        shuffle.set_state(checkpoint["shuffle"])
    return model, optimizer, shuffle


# %%
# ``weights_only=True`` reads plain tensors and numbers, and runs no code from
# the file. That is all a checkpoint of SINGD consists of.
#
# One run never stops. The other one stops in the middle.

never, *rest = build()
unbroken = train(never, *rest, STEPS)

run = build()
first = train(*run, STOP)
save(*run)

model, *rest = resume()
second = train(model, *rest, STEPS - STOP)

pairs = zip(model.parameters(), never.parameters())
assert all(torch.equal(a, b) for a, b in pairs)
assert first + second == unbroken

# %%
# The weights are the same to the last bit, and so are all losses. In the
# figure the resumed run lies on the unbroken one.

fig, ax = plt.subplots(figsize=(5.4, 3.2))
ax.plot(unbroken, color="C7", linewidth=4, alpha=0.5, label="unbroken")
ax.plot(first, color="C0", label="until the stop")
ax.plot(range(STOP, STEPS), second, color="C1", label="resumed")
ax.set(xlabel="step", ylabel="training loss", yscale="log")
ax.set_title("A resumed run is the same run")
_ = ax.legend()

# %%
# **Before you run on:** a part of the checkpoint gets lost. Does the run find
# its way back, or does it become another run? Does it matter which part?

PARTS = {
    "without the shuffle": ("model", "optimizer"),
    "without the optimizer": ("model", "shuffle"),
}
steps = range(STOP, STEPS)
fig, ax = plt.subplots(figsize=(5.4, 3.2))
for (name, keys), color in zip(PARTS.items(), ("C2", "C3")):
    other = train(*resume(keys), STEPS - STOP)
    gap = [abs(a - b) for a, b in zip(other, second)]
    ax.plot(steps, gap, label=name, color=color)
    assert max(gap) > 0.1
ax.plot(steps, [0.0] * len(second), color="C1", label="the whole checkpoint")
ax.set(xlabel="step", ylabel="difference of the losses")
ax.set_title("Only the whole checkpoint resumes the run")
_ = ax.legend()

# %%
# Both are another run from then on. Without the optimizer's state the factors
# even start again as identities. Neither is an error that anyone reports to
# you.
#
# A kill while saving
# -------------------
#
# Is renaming worth its two lines? We cut the file that we have just written
# after a share of its bytes, as a kill in the midst of writing would, and try
# to load what is there.

whole = path.read_bytes()


def loads(content):
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # of several kinds, by the place of the cut
        return False
    return True


percent = range(0, 101, 5)
good = [loads(whole[: len(whole) * share // 100]) for share in percent]
fig, ax = plt.subplots(figsize=(5.4, 3.2))
renamed = [STEPS if ok else STOP for ok in good]
in_place = [STEPS if ok else 0 for ok in good]
ax.plot(percent, renamed, "o-", label="beside it, then renamed")
ax.plot(percent, in_place, "s-", label="onto the last good file")
ax.set(xlabel="written when the kill comes (%)", yticks=(0, STOP, STEPS))
ax.set(ylabel="step to resume from", title="Renaming keeps the last file")
ax.legend(loc="center left", bbox_to_anchor=(0, 0.75))
assert good == [False] * 20 + [True]

# %%
# No part of a file loads. Whoever writes onto the last checkpoint, of step 45,
# starts again from step 0 then.
#
# What it weighs
# --------------
#
# The state is kept for each layer. With dense factors, :math:`K` and its
# momentum weigh most here, more than the weights.

state = torch.load(path, weights_only=True)["optimizer"]["state"]
sizes = dict.fromkeys(("K", "C", "m_K", "m_C", "momentum_buffer"), 0)
for entry in state.values():
    for key in sizes:
        sizes[key] += entry[key].nbytes if key in entry else 0
print(sizes)
assert sizes["K"] == sizes["m_K"] == max(sizes.values())

# %%
# Another optimizer's checkpoint
# ------------------------------
#
# A checkpoint that does not fit is refused with the layer's name, and nothing
# has changed then.

DIAGONAL = OPTIONS | dict(structures=("diagonal", "dense"))
other = SINGD(build()[0], **DIAGONAL)
try:
    other.load_state_dict(torch.load(path, weights_only=True)["optimizer"])
except ValueError as error:
    message = str(error)
print(message)
assert "layer '0'" in message

# %%
# When not to use it
# ------------------
#
# Bit-same resumption needs the same machine, the same number of threads and
# the same versions. Elsewhere the resumed run is as good, but not the same.
#
# .. admonition:: Lessons learned
#
#    - Save model, optimizer, generators; and a scheduler or scaler if you have
#      one.
#    - Write beside the old file, then rename.
#    - A schedule in ``lr_cov`` is a function; it is not saved. Pass it again.
#    - Compare a resumed run with an unbroken one once, before you rely on it.
#
# .. admonition:: Exercise
#
#    Resume twice from the same file. Do the two runs agree?
#
# .. dropdown:: Solution
#
#    They do. Loading copies the tensors, so the first run does not train in
#    those of the checkpoint.
#
#    .. code-block:: python
#
#        runs = [train(*resume(), 20) for _ in range(2)]
#        assert runs[0] == runs[1] == second[:20]
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_26_micro_batches.py` splits a
# batch,
# :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py` shows smaller
# factors, and
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` reads a run.
