"""Labels drawn from the model's own predictions, for the Monte-Carlo Fisher matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIKELIHOODS = ("softmax", "gaussian")
DRAWS = [0]
"""How often labels were sampled, to notice where their curvature gets lost."""


@torch.no_grad()
def sample_labels(
    outputs: Tensor,
    likelihood: str = "softmax",
    *,
    variance: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Labels drawn from the distribution that the model predicts.

    With gradients g of the loss on such labels, E[g g^T] is the Fisher matrix; on the labels of the data it is the
    *empirical* Fisher matrix, which is another one.

    Args:
        outputs: Logits ``[..., classes]``, or means of any shape.
        likelihood: "softmax" draws classes, for ``cross_entropy``; "gaussian" draws targets around the outputs.
        variance: Of the Gaussian: 1 belongs to the loss 1/2 (y - f)^2, and 1/2 to (y - f)^2.
        generator: Where the random numbers come from; None: torch's own.

    Returns:
        Classes ``[...]`` as integers, or targets of the outputs' shape. (``cross_entropy`` wants the classes
        of images and sequences in dimension 1: move them to the end before, ``outputs.movedim(1, -1)``.)

    Raises:
        ValueError: For another likelihood, logits without classes, or a variance that is none.

    Example:
        >>> import torch
        >>> from singd import sample_labels
        >>> sample_labels(torch.tensor([[0.0, 100.0], [100.0, 0.0]]))
        tensor([1, 0])
    """
    if likelihood not in LIKELIHOODS:
        choices = ", ".join(map(repr, LIKELIHOODS))
        raise ValueError(f"likelihood must be one of {choices}, got {likelihood!r}.")
    if likelihood == "softmax" and (outputs.ndim == 0 or outputs.shape[-1] == 0):
        raise ValueError(
            f"outputs must have classes in the last dimension, got shape {tuple(outputs.shape)}."
        )
    if not 0 <= variance < math.inf:
        raise ValueError(f"variance must be a finite number >= 0, got {variance!r}.")
    DRAWS[0] += 1
    if likelihood == "gaussian":
        noise = torch.randn(
            outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device
        )
        return outputs + variance**0.5 * noise
    probabilities = outputs.reshape(-1, outputs.shape[-1]).float().softmax(-1)
    classes = torch.multinomial(probabilities, 1, generator=generator)
    return classes.view(outputs.shape[:-1])
