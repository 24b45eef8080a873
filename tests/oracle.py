"""The textbook: SINGD with dense matrices and explicit projections, in float64, to hold the optimizer against.

Nothing of the optimizer is used, only each structure's list of basis matrices for the projection.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from singd import structure


@functools.cache
def projector(name: str, n: int) -> Tensor:
    """P as an [n*n, n*n] matrix, by its definition 1/2 P(N) = argmin over members M of ||M + M^T - N||."""
    eye = structure(name)(n, dtype=torch.float64)
    flat = eye.flat()
    basis = []
    for i in range(len(flat)):
        unit = torch.zeros_like(flat)
        unit[i] = 1.0
        basis.append(eye.from_flat(unit).dense())
    B = torch.stack([M.flatten() for M in basis], 1)
    S = torch.stack([(M + M.T).flatten() for M in basis], 1)
    return 2 * B @ torch.linalg.pinv(S)


def project(name: str, N: Tensor) -> Tensor:
    n = len(N)
    return (projector(name, n) @ N.flatten()).view(n, n)


def layer_rows(
    layer: nn.Module, x: Tensor, g: Tensor, approx: str
) -> tuple[Tensor, Tensor, int, int]:
    """[B, S, d] inputs and gradients of a linear layer or a convolution with integer zero padding."""
    if isinstance(layer, nn.Conv2d):
        x = x.unflatten(1, (layer.groups, -1)).mean(1)
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        g = g.flatten(2).mT
    else:
        x, g = x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
    B, S = x.shape[:2]
    a, g = (x.flatten(0, 1), g.flatten(0, 1)) if approx == "expand" else (x.mean(1), g.sum(1))
    if layer.bias is not None:
        a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
    return a, g, B, S


def gradient_matrix(layer: nn.Module) -> Tensor:
    parts = [layer.weight.grad.flatten(1)] + (
        [layer.bias.grad[:, None]] if layer.bias is not None else []
    )
    return torch.cat(parts, 1)


def train(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    loss_function,
    *,
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
    kfac_like=False,
    normalize_lr_cov=False,
) -> dict[nn.Module, dict[str, Tensor]]:
    """Train all linear and convolution layers of a model in place; returns each layer's K, C, m_K, m_C."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    calls: dict[nn.Module, list] = {}
    hooks = [
        m.register_forward_hook(lambda m, i, o: (o.retain_grad(), calls[m].append((i[0], o)))[1])
        for m in layers
    ]
    states: dict[nn.Module, dict] = {}
    for step, (x, y) in enumerate(batches):
        calls.update({m: [] for m in layers})
        model.zero_grad()
        loss_function(model(x), y).backward()
        for layer in layers:
            dW = gradient_matrix(layer)
            d_o, d_i = dW.shape
            s = states.setdefault(
                layer,
                {
                    "K": torch.eye(d_i).to(dW), "C": torch.eye(d_o).to(dW), "m_K": torch.zeros(d_i, d_i).to(dW),
                    "m_C": torch.zeros(d_o, d_o).to(dW), "buffer": torch.zeros_like(dW),
                },
            )  # fmt: skip
            if step % T == 0:
                rows = [layer_rows(layer, i, o.grad, kfac_approx) for i, o in calls[layer]]
                U = sum(a.T @ a for a, *_ in rows) / sum(len(a) for a, *_ in rows)
                terms = {
                    None: 1,
                    "batch": sum(r[2] for r in rows),
                    "batch+sequence": sum(r[2] * r[3] for r in rows),
                }
                G = terms[loss_average] * sum(g.T @ g for _, g, *_ in rows)
                K, C = s["K"], s["C"]
                P_K, P_C = (functools.partial(project, name) for name in structures)
                H_K, H_C = P_K(K.T @ U @ K), P_C(C.T @ G @ C)
                tr = (lambda M: 1.0) if kfac_like else (lambda M: M.trace() / len(M))
                a1 = 0.0 if kfac_like else alpha1
                half = 0.5 * (1 - a1) if normalize_lr_cov else 0.5
                s["m_K"] = a1 * s["m_K"] + half * (
                    tr(H_C) * H_K + damping * tr(C.T @ C) * P_K(K.T @ K) - torch.eye(d_i).to(K)
                )
                s["m_C"] = a1 * s["m_C"] + half * (
                    tr(H_K) * H_C + damping * tr(K.T @ K) * P_C(C.T @ C) - torch.eye(d_o).to(C)
                )
                for F_, m in (("K", "m_K"), ("C", "m_C")):
                    size = max(1.0, s[m].abs().max().item()) if normalize_lr_cov else 1.0
                    beta = lr_cov(step) if callable(lr_cov) else lr_cov
                    s[F_] = s[F_] - beta / size * s[F_] @ s[m]
            N = s["C"] @ s["C"].T @ dW @ s["K"] @ s["K"].T
            bias = [] if layer.bias is None else [layer.bias[:, None]]
            N = N + weight_decay * torch.cat([layer.weight.flatten(1), *bias], 1).detach()
            s["buffer"] = momentum * s["buffer"] + N
            with torch.no_grad():
                layer.weight -= lr * s["buffer"][:, : layer.weight[0].numel()].view_as(layer.weight)
                if layer.bias is not None:
                    layer.bias -= lr * s["buffer"][:, -1]
    for hook in hooks:
        hook.remove()
    return states
