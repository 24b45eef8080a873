r"""
A language model on Python's own manual
=======================================

The standard library contains a book: ``pydoc_data.topics``, the text behind
Python's ``help()``. This page trains a small character model on it, with SINGD
and with AdamW. Two of its choices matter in every language model:
``kfac_approx`` and ``loss_average``.

.. admonition:: What you will learn

   - **Set** ``kfac_approx`` and ``loss_average`` for a loss per position.
   - **See** that an embedding gets a diagonal input factor.
   - **Compare** SINGD and AdamW on text.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py`.

Positions count like examples
-----------------------------

Each of the :math:`B` sequences in a batch has :math:`S` characters, and every
one predicts the next. The loss is a mean over :math:`B S` terms. In the
*expand* setting each position is a row of its own:

.. math::

   U = \frac{1}{B S} \sum_r a_r a_r^\top , \qquad
   G = B S \sum_r g_r g_r^\top .

The factor :math:`B S` undoes the mean in the loss. It is what
``loss_average="batch+sequence"`` says.
"""

import pydoc_data.topics

import matplotlib.pyplot as plt
import torch
from torch import nn

from singd import SINGD

STEPS, BATCH, LENGTH, CONTEXT = 120, 16, 32, 8
_ = torch.set_num_threads(1)

# %%
# The text, as numbers. We keep printable ASCII only.

text = "".join(pydoc_data.topics.topics.values())
text = "".join(c for c in text if c == "\n" or " " <= c <= "~")
alphabet = sorted(set(text))
index = {c: i for i, c in enumerate(alphabet)}
codes = torch.tensor([index[c] for c in text])
assert len(text) > 300_000

# %%
# The model: an embedding, a causal convolution that sees eight characters, and
# two linear layers.


class Model(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.embed = nn.Embedding(len(alphabet), 24)
        self.look_back = nn.Conv1d(24, width, CONTEXT)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, len(alphabet))

    def forward(self, x):
        x = self.embed(x).transpose(1, 2)
        x = nn.functional.pad(x, (CONTEXT - 1, 0))
        x = torch.relu(self.look_back(x)).transpose(1, 2)
        return self.head(torch.relu(self.hidden(x)))


def singd(model):
    return SINGD(
        model,
        lr=3e-3,
        damping=1e-2,
        T=1,
        lr_cov=0.2,
        normalize_lr_cov=True,
        kfac_approx="expand",
        loss_average="batch+sequence",
    )


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def batch():
    start = torch.randint(len(codes) - LENGTH - 1, (BATCH, 1))
    block = codes[start + torch.arange(LENGTH + 1)]
    return block[:, :-1], block[:, 1:]


def fit(make):
    torch.manual_seed(0)
    model = Model()
    optimizer = make(model)
    losses = []
    for _ in range(STEPS):
        x, y = batch()
        optimizer.zero_grad()
        output = model(x).flatten(0, 1)
        loss = nn.functional.cross_entropy(output, y.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, torch.tensor(losses)


# %%
# **Before you run on:** a guess at random has a loss of the logarithm of the
# number of characters. How far below it does the frequency of single letters
# bring you, and how far will the models come?

runs = {"SINGD": fit(singd), "AdamW": fit(adamw)}
chance = torch.tensor(float(len(alphabet))).log().item()
frequency = torch.bincount(codes) / len(codes)
letters = -(frequency * frequency.clamp(min=1e-9).log()).sum().item()

fig, ax = plt.subplots()
for name, (_, _, losses) in runs.items():
    ax.plot(losses.unfold(0, 10, 1).mean(1), label=name)
ax.axhline(chance, color="C7", ls=":", label="guess at random")
ax.axhline(letters, color="C7", ls="--", label="single letters")
ax.set(xlabel="step", ylabel="loss per character (mean of 10)")
ax.set_title("Both models learn more than single letters")
ax.legend()

for _, _, losses in runs.values():
    assert losses[-20:].mean() < letters < chance
late = {name: run[2][-20:].mean() for name, run in runs.items()}
assert late["AdamW"] < late["SINGD"]

# %%
# Both fall below the entropy of single letters, so they use what came before.
# AdamW is ahead all the way in this short run: SINGD's factors start from the
# identity, and first have to learn their scale.
#
# What SINGD learned about characters
# -----------------------------------
#
# The input of an embedding is one character, 1 in one place and 0 elsewhere.
# So :math:`U` is diagonal: the frequencies. :math:`K` is diagonal, too, and
# frequent characters get a small entry, since their rows see many gradients.

model, optimizer, _ = runs["SINGD"]
print(optimizer)
K = optimizer.factors("embed").K
assert K.numel == len(alphabet)

scale = K.dense().diagonal()
fig, ax = plt.subplots(figsize=(6, 3.6))
ax.semilogx(frequency, scale, "o", alpha=0.5)
for c in "eqZ":
    ax.annotate(c, (frequency[index[c]], scale[index[c]]), fontsize=14)
ax.set(xlabel="frequency of a character", ylabel="its entry in K")
ax.set_title("Rare characters take larger steps")

rare, frequent = frequency.argsort()[[5, -1]]
assert scale[rare] > scale[frequent]

# %%
# Let it write
# ------------
#
# Draw one character after another. After 120 steps it is no prose, and there
# are too few spaces. But the common letters come up about as often as they
# should.

torch.manual_seed(0)
written = codes[:CONTEXT].tolist()
with torch.no_grad():
    for _ in range(100):
        logits = model(torch.tensor([written[-CONTEXT:]]))[0, -1]
        written.append(torch.multinomial(logits.softmax(0), 1).item())
spaces = sum(alphabet[i] == " " for i in written) / len(written)
assert spaces < frequency[index[" "]]

counts = torch.bincount(torch.tensor(written), minlength=len(alphabet))
top = frequency.argsort(descending=True)[:12].tolist()
names = [repr(alphabet[i]) for i in top]
fig, ax = plt.subplots(figsize=(6, 3))
ax.bar(names, frequency[top], width=-0.4, align="edge", label="the manual")
ax.bar(names, counts[top] / 108, width=0.4, align="edge", label="the model")
ax.set(
    xlabel="character",
    ylabel="share",
    title="Letters come, spaces are too few",
)
_ = ax.legend()

# %%
# When not to use this
# --------------------
#
# With a vocabulary of 50,000, the head's :math:`C` has 50,000 rows. Give it
# the structure ``diagonal``. And 120 steps say nothing about long training.
#
# .. admonition:: Lessons learned
#
#    - A loss per position: ``kfac_approx="expand"``.
#    - A mean over positions: ``loss_average="batch+sequence"``.
#    - An embedding's :math:`K` is diagonal, one number per token.
#
# .. admonition:: Exercise
#
#    Sum the loss over positions and average over sequences. Which argument
#    changes, and to what?
#
# .. dropdown:: Solution
#
#    ``loss_average="batch"``: the loss divides by the :math:`B` sequences
#    only. The loss, its gradient and :math:`G` all become :math:`S` times as
#    large. The natural gradient stays, up to the damping.
#
#    .. code-block:: python
#
#        def G_of_head(loss_average, positions):
#            torch.manual_seed(0)
#            model = Model()
#            options = dict(T=1, lr_cov=0.1, damping=0.0, kfac_like=True)
#            optimizer = SINGD(model, loss_average=loss_average, **options)
#            x, y = batch()
#            output = model(x).flatten(0, 1)
#            loss = nn.functional.cross_entropy(output, y.flatten())
#            (positions * loss).backward()
#            optimizer.step()
#            C = optimizer.factors("head").C.dense()  # I - 0.05 (G - I)
#            eye = torch.eye(len(C))
#            return (eye - C) / 0.05 + eye
#
#
#        mean = G_of_head("batch+sequence", 1)
#        total = G_of_head("batch", LENGTH)
#        assert torch.allclose(total, LENGTH * mean, rtol=1e-3, atol=1e-3)
#
# Where to go next: :doc:`/choosing` for the arguments, :doc:`/concepts` for
# shared weights, :doc:`/structures` for a smaller head.
