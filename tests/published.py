"""The published method with every option said, so that a test means the same whatever the defaults are."""

import singd

PAPER = dict(
    lr=1e-3,
    momentum=0.9,
    damping=1e-3,
    alpha1=0.5,
    weight_decay=0.0,
    T=10,
    loss_average="batch",
    lr_cov=1e-2,
    structures=("dense", "dense"),
    kfac_approx="expand",
    normalize_lr_cov=False,
    fallback=dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
)
PUBLISHED = {**PAPER, **getattr(singd, "PUBLISHED", {})}
FAST = {**PUBLISHED, "lr": 0.1, "T": 1, "lr_cov": 0.1, "damping": 0.1}
"""Everything moves in a few steps."""
