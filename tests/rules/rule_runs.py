"""Runs of the optimizer beside the textbook, and what ends the comparison."""

import copy
import functools

import rule_textbook
import torch
from models import model_and_batches, train
from torch import nn

from singd import SINGD, rules
from singd.rules import registered_rules

FAST = dict(lr=0.05, lr_cov=0.2, T=1, damping=0.1)
PLAIN = dict(
    momentum=0.9, alpha1=0.5, normalize_lr_cov=False, relative_damping=False, scaled_start=False,
    fast_start=False, momentum_on="direction", nesterov=False, match_rms=None, loss_average="batch",
    structures=("dense", "dense"), kfac_approx="expand", weight_decay=0.0,
)  # fmt: skip
"""Every option of a rule in its published meaning, so that these tests outlive a change of the defaults."""

RULES = {name: name for name in ("singd", "ikfac", "kfac", "shampoo")}
RULES["kfac without pi"] = rules.Kfac(pi=False)


def mean_or_sum(options):
    """The loss that an option speaks of: a mean over the batch, or a sum (scaled, so that steps are alike)."""
    if options.get("loss_average", "batch") is not None:
        return nn.functional.cross_entropy
    return lambda output, y: nn.functional.cross_entropy(output, y, reduction="sum") / 10


def beside_the_textbook(rule, name="mlp", steps=6, **options):
    """Train one model by the optimizer, its copy by the textbook; returns the largest difference of any number."""
    model, batches = model_and_batches(name, steps=steps)
    twin = copy.deepcopy(model)
    options = {**PLAIN, **FAST, **options}
    optimizer = SINGD(model, rule=RULES[rule], **options)
    train(model, optimizer, batches, mean_or_sum(options))

    states = rule_textbook.train(twin, batches, mean_or_sum(options), rule, **options)
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    layers = dict(zip(twin.modules(), model.modules(), strict=True))
    for layer, state in states.items():
        kept = optimizer.factors(layers[layer])._asdict()
        pairs += [(A.dense(), state[key]) for key, A in kept.items()]
        assert not torch.allclose(
            state[next(iter(kept))], torch.eye(len(pairs[-len(kept)][0])).double()
        )
    return max((a - b).abs().max().item() for a, b in pairs)


@functools.cache
def structures_of(rule):
    """Names of the structures that a rule works with."""
    from singd import registered_structures, structure

    found = [
        n
        for n in registered_structures()
        if registered_rules()[rule].refusal(structure(n)(2)) is None
    ]
    assert found
    return found
