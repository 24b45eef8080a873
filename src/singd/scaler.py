"""SINGD beside a gradient scaler: the errors that keep a wrong scale out of the statistics.

Statistics are quadratic in the gradient, and they are gathered during the backward pass, before a scaler
unscales anything. SINGD therefore has to know the scaler; it must not guess.
"""

from __future__ import annotations

from typing import Any

import torch

from singd.torch_private import scaler_of_this_step


def check(optimizer: torch.optim.Optimizer, scaler: Any) -> None:
    """Refuse a step whose statistics have another scale than its gradients.

    Raises:
        RuntimeError: If a scaler steps that SINGD was not built with, or if the one that it was built with
            does not.
    """
    found_inf = getattr(optimizer, "found_inf", None)  # set by a scaler for the time of its step
    if found_inf is not None:
        optimizer.found_inf = optimizer.grad_scale = None  # type: ignore[attr-defined]
        raise RuntimeError(
            "A GradScaler steps this optimizer without being known to it, so that its statistics would "
            "be off by the squared scale; build it with SINGD(..., grad_scaler=scaler)."
        )
    if scaler is None or not scaler.is_enabled():
        return
    # A scaler notes for each device whether it found an inf, right before it steps.
    if scaler_of_this_step(scaler, optimizer) is False:
        raise RuntimeError(
            "SINGD was built with a grad_scaler, but that scaler did not unscale the gradients of this step; "
            "use scaler.step(optimizer)."
        )


def check_averaging(scaler: torch.amp.GradScaler | None) -> None:
    """Refuse to average gradients after a scaler looked at them: each rank would decide for itself.

    Raises:
        RuntimeError: If there is a scaler that is enabled.
    """
    if scaler is not None and scaler.is_enabled():
        raise RuntimeError(
            "SINGD averages gradients in step, after the grad_scaler looked for overflows, so that ranks could "
            "disagree on whether to step; wrap the model in DistributedDataParallel before building SINGD, or "
            "pass average_gradients=False where something else averages them."
        )
