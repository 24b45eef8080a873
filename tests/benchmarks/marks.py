"""The marks: how much of the published package's overhead over SGD ours may cost at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """One case of the comparison with the published package.

    Attributes:
        workload: "mlp", "cnn" or "vit".
        structure: Of both factors.
        T: The factors are updated every T steps.
        share: Ours may cost at most this share of the published overhead.
    """

    workload: str
    structure: str
    T: int
    share: float


MARKS = (
    Mark("mlp", "dense", 1, 1.0),
    Mark("mlp", "dense", 10, 0.6),
    Mark("mlp", "diagonal", 10, 0.9),
    Mark("mlp", "block30diagonal", 10, 0.6),
    Mark("mlp", "triltoeplitz", 10, 0.005),
    Mark("cnn", "dense", 1, 0.35),
    Mark("cnn", "dense", 10, 0.45),
    Mark("cnn", "diagonal", 1, 0.08),
    Mark("cnn", "block30diagonal", 1, 0.35),
    Mark("cnn", "hierarchical15_15", 1, 0.3),
    Mark("vit", "dense", 10, 0.6),
    Mark("vit", "diagonal", 10, 0.6),
    Mark("vit", "hierarchical15_15", 10, 0.6),
    Mark("vit", "block30diagonal", 10, 0.6),
)
STATE_SHARE = 0.51  # of AdamW's state, for diagonal and Toeplitz factors on the ViT
PEAK_SHARE = 1 / 3  # of the published peak while the statistics of a convolution are gathered
