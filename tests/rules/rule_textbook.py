"""The rules as textbooks have them: dense matrices, explicit masks and inverses, in float64.

Nothing of ``singd.rules`` is used. A rule is a function that moves a dictionary of dense matrices, and one that
makes a direction of them. ``train`` is the loop around it.
"""

from __future__ import annotations

import math

import torch
from oracle import gradient_matrix, layer_rows, project
from torch import Tensor, nn


def mask(name: str, n: int) -> Tensor:
    """The entries that a dense, diagonal or block-diagonal matrix has: the projection keeps them as they are."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    k = {"dense": n, "diagonal": 1}.get(name) or int(
        name.removeprefix("block").removesuffix("diagonal")
    )
    return (i // k == j // k).double()


# -- KFAC --------------------------------------------------------------------------------------------


def kfac(s, U, G, dW, *, pi=True, damping=1e-3, lr_cov=1e-2, structures=("dense", "dense"), **_):
    U, G = (M * mask(name, len(M)) for M, name in zip((U, G), structures, strict=True))
    b = 1.0 if "U" not in s else lr_cov
    s["U"] = (1 - b) * s.get("U", 0 * U) + b * U
    s["G"] = (1 - b) * s.get("G", 0 * G) + b * G
    ratio = (s["U"].trace() / len(U)) / (s["G"].trace() / len(G))
    pi = math.sqrt(ratio) if pi else 1.0
    s["U_inv"] = torch.linalg.inv(s["U"] + pi * math.sqrt(damping) * torch.eye(len(U)).to(U))
    s["G_inv"] = torch.linalg.inv(s["G"] + math.sqrt(damping) / pi * torch.eye(len(G)).to(G))


def kfac_without_pi(s, U, G, dW, **options):
    kfac(s, U, G, dW, pi=False, **options)


def kfac_direction(s, dW):
    return s["G_inv"] @ dW @ s["U_inv"]


# -- factors that follow an inverse, and their start ---------------------------------------------------


def started(s, U, G, square, *, rule, damping, scaled_start, relative_damping):
    """K = k I and C = c I at the first update, k and c from the average traces; the damping of K and of C."""
    u, g = U.trace() / len(U), G.trace() / len(G)
    if rule == "ikfac":
        lambdas = (damping * u, damping * g) if relative_damping else (damping, damping)
        scales = (u + lambdas[0]) ** -0.5, (g + lambdas[1]) ** -0.5
    else:
        product = square if rule == "shampoo" else u * g
        lambdas = (damping * product if relative_damping else damping,) * 2
        scales = ((product + lambdas[0]) ** -0.25,) * 2
    if "K" not in s:
        k, c = scales if scaled_start else (1.0, 1.0)
        s["K"], s["C"] = k * torch.eye(len(U)).to(U), c * torch.eye(len(G)).to(G)
        s["m_K"], s["m_C"], s["t"] = 0 * U, 0 * G, 0
    return lambdas


def inverse_free(rule):
    """The rule of singd, ikfac or shampoo."""

    def update(
        s, U, G, dW, *, damping=1e-3, lr_cov=1e-2, alpha1=0.5, structures=("dense", "dense"), scaled_start=False,
        relative_damping=False, fast_start=False, normalize_lr_cov=False,
    ):  # fmt: skip
        start = dict(scaled_start=scaled_start, relative_damping=relative_damping)
        square = dW.square().mean()
        l_K, l_C = started(s, U, G, square, rule=rule, damping=damping, **start)
        K, C, t = s["K"], s["C"], s["t"]
        d_o, d_i = dW.shape
        P_K, P_C = (lambda N, name=name: project(name, N) for name in structures)
        I_K, I_C = torch.eye(d_i).to(U), torch.eye(d_o).to(U)
        half = 0.5 * (1 - alpha1) if normalize_lr_cov else 0.5

        def tr(M):
            return M.trace() / len(M)

        if rule == "ikfac":
            m_K = 0.5 * (P_K(K.T @ U @ K) + l_K * P_K(K.T @ K) - I_K)
            m_C = 0.5 * (P_C(C.T @ G @ C) + l_C * P_C(C.T @ C) - I_C)
        else:
            if rule == "singd":
                to_K = tr(P_C(C.T @ G @ C)) * P_K(K.T @ U @ K)
                to_C = tr(P_K(K.T @ U @ K)) * P_C(C.T @ G @ C)
            else:
                to_K = P_K(K.T @ dW.T @ C @ C.T @ dW @ K) / d_o
                to_C = P_C(C.T @ dW @ K @ K.T @ dW.T @ C) / d_i
            bracket_K = to_K + l_K * tr(C.T @ C) * P_K(K.T @ K) - I_K
            bracket_C = to_C + l_C * tr(K.T @ K) * P_C(C.T @ C) - I_C
            m_K = alpha1 * s["m_K"] + half * bracket_K
            m_C = alpha1 * s["m_C"] + half * bracket_C
        b = max(lr_cov, min(0.5, 1 / (t + 1))) if fast_start else lr_cov
        entry = [
            max(1.0, m.abs().max().item()) if normalize_lr_cov is True else 1.0 for m in (m_K, m_C)
        ]
        s.update(
            m_K=m_K, m_C=m_C, K=K - b / entry[0] * K @ m_K, C=C - b / entry[1] * C @ m_C, t=t + 1
        )

    return update


def inverse_free_direction(s, dW):
    return s["C"] @ s["C"].T @ dW @ s["K"] @ s["K"].T


RULES = {
    "kfac": (kfac, kfac_direction),
    "kfac without pi": (kfac_without_pi, kfac_direction),
    "singd": (inverse_free("singd"), inverse_free_direction),
    "ikfac": (inverse_free("ikfac"), inverse_free_direction),
    "shampoo": (inverse_free("shampoo"), inverse_free_direction),
}


# -- the weights -------------------------------------------------------------------------------------


def move(p, direction, s, *, lr, momentum, weight_decay, nesterov):
    """Momentum on the direction, as torch's SGD has it."""
    d = direction + weight_decay * p
    s["buffer"] = momentum * s["buffer"] + d if "buffer" in s else d
    return p - lr * (d + momentum * s["buffer"] if nesterov else s["buffer"])


def averaged(g, s, *, momentum, nesterov):
    """Momentum on the gradient: a running average, which the first gradient starts."""
    s["average"] = momentum * s["average"] + (1 - momentum) * g if "average" in s else g
    return momentum * s["average"] + (1 - momentum) * g if nesterov else s["average"]


def matched(direction, rms):
    return direction * (rms / direction.square().mean().sqrt()) if rms else direction


def train(
    model: nn.Module,
    batches,
    loss_function,
    rule: str,
    *,
    lr=1e-3,
    momentum=0.9,
    weight_decay=0.0,
    T=1,
    loss_average="batch",
    kfac_approx="expand",
    momentum_on="direction",
    nesterov=False,
    match_rms=None,
    **options,
) -> dict[nn.Module, dict[str, Tensor]]:
    """Train all linear and convolution layers in place; returns what the rule keeps of each.

    Rows are gathered over all backward passes of a step: a batch may be a list of micro-batches.
    """
    update, direction = RULES[rule]
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    calls: dict[nn.Module, list] = {}
    hooks = [
        m.register_forward_hook(
            lambda m, i, o: (o.retain_grad(), calls[m].append((i[0].detach(), o)))[1]
        )
        for m in layers
    ]
    states: dict[nn.Module, dict] = {}
    buffers: dict[tuple, dict] = {}
    due = 0
    for step, (x, y) in enumerate(batches):
        calls.update({m: [] for m in layers})
        model.zero_grad()
        loss_function(model(x), y).backward()
        every = T(step) if callable(T) else T
        update_now = step == 0 or (step - due >= every if callable(T) else step % T == 0)
        due = step if update_now else due
        for layer in layers:
            dW, s = gradient_matrix(layer), states.setdefault(layer, {})
            if update_now:
                rows = [layer_rows(layer, i, o.grad, kfac_approx) for i, o in calls[layer]]
                B, BS = sum(r[2] for r in rows), sum(r[2] * r[3] for r in rows)
                U = sum(a.T @ a for a, *_ in rows) / sum(len(a) for a, *_ in rows)
                G = {None: 1, "batch": B, "batch+sequence": BS}[loss_average] * sum(
                    g.T @ g for _, g, *_ in rows
                )
                update(s, U, G, dW, **options)
            params = [layer.weight] + ([layer.bias] if layer.bias is not None else [])
            if momentum_on == "gradient":
                average = dict(momentum=momentum, nesterov=nesterov)
                vs = [
                    averaged(p.grad, buffers.setdefault((layer, i), {}), **average)
                    for i, p in enumerate(params)
                ]
                dW = torch.cat([vs[0].flatten(1), *(v[:, None] for v in vs[1:])], 1)
            N = direction(s, dW)
            after = momentum if momentum_on == "direction" else 0.0
            parts = [N[:, : layer.weight[0].numel()].view_as(layer.weight), N[:, -1]]
            for i, p in enumerate(params):
                d, buffer = matched(parts[i], match_rms), buffers.setdefault((layer, i), {})
                step_options = dict(lr=lr, momentum=after, weight_decay=weight_decay)
                with torch.no_grad():
                    p.copy_(move(p, d, buffer, nesterov=nesterov and after > 0, **step_options))
    for hook in hooks:
        hook.remove()
    return states
