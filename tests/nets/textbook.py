"""The published rule for one layer, with dense matrices, one step at a time: what the nets compare with.

`tests/oracle.py` trains a whole model in one loop. Here layers come and go, and they are of any kind: the rows
of a layer's inputs are not unfolded as the library does it, but read off the layer itself, which is linear.
"""

from __future__ import annotations

import torch
from oracle import project
from torch import Tensor, nn
from torch.func import functional_call

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as a matrix, [d_o, d_in], in the library's order of columns."""
    if isinstance(layer, nn.Embedding):
        return weight.T
    if isinstance(layer, TRANSPOSED):  # of the convolution with the mirrored kernel
        weight = weight.flip(*range(2, weight.ndim)).unflatten(0, (layer.groups, -1))
        return weight.transpose(1, 2).flatten(0, 1).flatten(1)
    return weight.flatten(1)


def positions(layer: nn.Module, y: Tensor) -> Tensor:
    """Outputs, or their gradients, as [B, S, d_o]."""
    if isinstance(layer, nn.Linear | nn.Embedding):
        y = y if y.ndim > 1 else y[None]
        return y.reshape(y.shape[0], y.shape[1:-1].numel(), y.shape[-1])
    return y.flatten(2).mT


def inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """[B, S, d_in]: feature j is what the layer answers if column j of its matrix is all ones, the rest zeros.

    (Of a layer with groups of channels that is one number per group: their mean.)
    """
    places = matrix(layer, torch.arange(layer.weight.numel()).view(layer.weight.shape))
    without = {"bias": torch.zeros_like(layer.bias)} if _bias(layer) is not None else {}
    columns = []
    for j in range(places.shape[1]):
        weight = torch.zeros(layer.weight.numel(), dtype=layer.weight.dtype)
        weight[places[:, j]] = 1.0
        with torch.no_grad():
            weight = weight.view(layer.weight.shape)
            y = functional_call(layer, {"weight": weight, **without}, x)
        columns.append(positions(layer, y).mean(-1))
    return torch.stack(columns, -1)


def _bias(layer: nn.Module) -> Tensor | None:
    return getattr(layer, "bias", None)


class Textbook:
    """The factors of one layer, and the steps on them and on its parameters.

    Args:
        layer: A layer, which gets a forward hook that notes its calls.
        options: Those of SINGD, all of them; they may be changed between steps.
    """

    def __init__(self, layer: nn.Module, options: dict) -> None:
        self.layer, self.options = layer, options
        d_o, d_i = self.joined(layer.weight, _bias(layer)).shape
        eye, zero = (lambda n: torch.eye(n).to(layer.weight)), layer.weight.new_zeros
        self.K, self.C, self.m_K, self.m_C = eye(d_i), eye(d_o), zero(d_i, d_i), zero(d_o, d_o)
        self.buffer, self.steps = zero(d_o, d_i), 0
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.largest = 1.0  # entry that ever was: a run that diverges is no test of rounding
        self._hook = layer.register_forward_hook(self._saw)

    def _saw(self, layer, args, y):
        if y.requires_grad:
            y.retain_grad()
            self.calls.append((args[0].detach(), y))

    def joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        parts = [matrix(self.layer, weight)] + ([] if bias is None else [bias[:, None]])
        return torch.cat(parts, 1)

    def rows(self) -> tuple[Tensor, Tensor, float]:
        """U, [d_i, d_i], G, [d_o, d_o], of all calls since the last step."""
        A, B, batch, terms = [], [], 0, 0
        for x, y in self.calls:
            if y.grad is None:
                continue
            a, g = inputs(self.layer, x), positions(self.layer, y.grad)
            batch, terms = batch + a.shape[0], terms + a.shape[0] * a.shape[1]
            if isinstance(self.layer, nn.Embedding) or self.options["kfac_approx"] == "expand":
                a, g = a.flatten(0, 1), g.flatten(0, 1)
            else:
                a, g = a.mean(1), g.sum(1)
            ones = [] if _bias(self.layer) is None else [a.new_ones(len(a), 1)]
            A.append(torch.cat([a, *ones], 1))
            B.append(g)
        A, B = torch.cat(A), torch.cat(B)
        count = {None: 1, "batch": batch, "batch+sequence": terms}[self.options["loss_average"]]
        return A.T @ A / len(A), count * B.T @ B

    def step(self) -> None:
        """As `SINGD.step`, for this layer; nothing where no parameter has a gradient."""
        o, layer, bias = self.options, self.layer, _bias(self.layer)
        params = [layer.weight] + ([] if bias is None else [bias])
        if all(p.grad is None for p in params):
            return
        if self.steps % o["T"] == 0 and any(y.grad is not None for _, y in self.calls):
            self._update(*self.rows())
        self.steps += 1
        dW = self.joined(*(torch.zeros_like(p) if p.grad is None else p.grad for p in params)) \
            if bias is not None else matrix(layer, layer.weight.grad)  # fmt: skip
        N = self.C @ self.C.T @ dW @ self.K @ self.K.T
        with torch.no_grad():
            N = N + o["weight_decay"] * self.joined(layer.weight, bias)
            if o["momentum"] != 0:  # without it, torch's SGD leaves the buffer alone
                self.buffer = N = o["momentum"] * self.buffer + N
            moved = self.joined(layer.weight, bias) - o["lr"] * N
            n = matrix(layer, layer.weight).shape[1]
            places = matrix(layer, torch.arange(layer.weight.numel()).view(layer.weight.shape))
            layer.weight.view(-1)[places.flatten()] = moved[:, :n].flatten()
            if bias is not None:
                bias.copy_(moved[:, -1])
        self.largest = max(self.largest, *(t.abs().max() for t in (self.K, self.C, moved, N)))

    def _update(self, U: Tensor, G: Tensor) -> None:
        o, K, C = self.options, self.K, self.C
        structure_K = "diagonal" if isinstance(self.layer, nn.Embedding) else o["structures"][0]
        P_K, P_C = (lambda N: project(structure_K, N)), (lambda N: project(o["structures"][1], N))
        H_K, H_C, KK, CC = P_K(K.T @ U @ K), P_C(C.T @ G @ C), K.T @ K, C.T @ C
        I_K, I_C = torch.eye(len(K)).to(K), torch.eye(len(C)).to(C)
        alpha1, half = 0.0 if o["kfac_like"] else o["alpha1"], 0.5

        def trace(M):
            return 1.0 if o["kfac_like"] else M.trace() / len(M)

        if o["normalize_lr_cov"]:
            half *= 1 - alpha1
        new_K = trace(H_C) * H_K + o["damping"] * trace(CC) * P_K(KK) - I_K
        new_C = trace(H_K) * H_C + o["damping"] * trace(KK) * P_C(CC) - I_C
        self.m_K = alpha1 * self.m_K + half * new_K
        self.m_C = alpha1 * self.m_C + half * new_C
        beta_K = beta_C = o["lr_cov"]
        if o["normalize_lr_cov"]:
            beta_K = beta_K / max(1.0, self.m_K.abs().max().item())
            beta_C = beta_C / max(1.0, self.m_C.abs().max().item())
        self.K = K - beta_K * K @ self.m_K
        self.C = C - beta_C * C @ self.m_C

    def clear(self) -> None:
        """The calls are used up, or their gradients were thrown away."""
        self.calls.clear()


def assert_same(books, optimizer, rtol: float = 1e-9) -> None:
    """The optimizer's factors and layers are those of the books.

    Args:
        books: Textbooks with the layer of the optimizer's model that each one answers for.
        optimizer: SINGD.
        rtol: Relative to the largest number that ever was.
    """
    for book, layer in books:
        tolerance = dict(rtol=0, atol=rtol * float(book.largest))
        for name, factor in optimizer.factors(layer)._asdict().items():
            torch.testing.assert_close(factor.dense(), getattr(book, name), **tolerance, msg=name)
        for p, q in zip(layer.parameters(), book.layer.parameters(), strict=True):
            torch.testing.assert_close(p, q, **tolerance)
