"""SINGD as published, in the place of its defaults: what the textbook and the papers' facts are held against."""

from __future__ import annotations

import singd

PUBLISHED = {"lr": 1e-3, **singd.PUBLISHED}
FAST = {**PUBLISHED, "lr": 0.1, "T": 1, "lr_cov": 0.1, "damping": 0.1}
"""Everything moves in a few steps."""


def SINGD(model, params=None, **options):
    """`singd.SINGD` with the published meaning and value of every option that is not given."""
    return singd.SINGD(model, params, **{**PUBLISHED, **options})
