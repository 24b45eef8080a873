"""SINGD as a ``torch.optim.Optimizer``: groups, hooks and the step."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from singd import checkpoint, distributed, exchange, options, report, scaler, torch_steps
from singd.blocks import SIDES, Block, find_blocks, find_slots, unwrapped
from singd.ownership import Ownership
from singd.statistics import Statistics, accumulation_dtype, added, gather, watch, without_autocast
from singd.structures import StructuredMatrix
from singd.update import Outer, moved_factor, natural_gradient, riemannian_momenta
from singd.wrapping import Wrapping


class Factors(NamedTuple):
    """The preconditioner of one layer: its factors and their Riemannian momenta."""

    K: StructuredMatrix
    C: StructuredMatrix
    m_K: StructuredMatrix
    m_C: StructuredMatrix


class SINGD(torch.optim.Optimizer):
    r"""Structured inverse-free natural gradient descent.

    For a layer with weight matrix :math:`W` (the bias as its last column), inputs :math:`a` and output
    gradients :math:`g`, with :math:`U = \mathbb{E}[a a^\top]` and :math:`G = \mathbb{E}[g g^\top]`:

    .. math::
        \begin{aligned}
        &\textbf{every } T \textbf{ steps, from the old } K, C: \\
        &\quad H_K = P(K^\top U K), \qquad H_C = P(C^\top G C) \\
        &\quad m_K \leftarrow \alpha_1 m_K + \tfrac12 [\operatorname{tr}(H_C) H_K
            + \lambda \operatorname{tr}(C^\top C) P(K^\top K) - I] \\
        &\quad m_C \leftarrow \alpha_1 m_C + \tfrac12 [\operatorname{tr}(H_K) H_C
            + \lambda \operatorname{tr}(K^\top K) P(C^\top C) - I] \\
        &\quad K \leftarrow K - \beta_1 K m_K, \qquad C \leftarrow C - \beta_1 C m_C \\
        &\textbf{every step}: \\
        &\quad N = C C^\top\, \nabla_W \ell\; K K^\top + \gamma W \\
        &\quad M \leftarrow \alpha_2 M + N, \qquad W \leftarrow W - \beta_2 M
        \end{aligned}

    :math:`P` projects onto the structure, :math:`\operatorname{tr}` is the average trace. Parameters that
    are in no supported layer (norms, loose parameters, ...) train with AdamW, in a group of their own.

    Args:
        model: The model that is trained; its layers get forward hooks.
        params: Parameters or groups, as for any optimizer. None: all trainable ones of the model.
        lr: Step size on the weights, :math:`\beta_2`.
        momentum: Momentum on the weights, :math:`\alpha_2`.
        damping: Damping :math:`\lambda`.
        alpha1: Riemannian momentum :math:`\alpha_1` on the factors.
        weight_decay: :math:`\gamma`, added to the natural gradient.
        T: The factors are updated at steps 0, T, 2T, ...
        loss_average: What the loss averages over: None, "batch" or "batch+sequence".
        lr_cov: Step size on the factors :math:`\beta_1`: a number, or a callable of the step count.
        structures: The structures of K and C: names, or what :func:`~singd.structure` takes.
        kfac_approx: How layers with weight sharing are treated: "expand" or "reduce".
        warn_unsupported: Whether to warn of parameters that are left out (``fallback=None``).
        kfac_like: IKFAC: no coupling between K and C, and no Riemannian momentum.
        preconditioner_dtype: The factors' dtype, or a pair for K and C; None: the weight's.
        normalize_lr_cov: Normalise the factors' step by the largest entry of its momentum.
        fallback: Options of AdamW for all other parameters (lr, betas, eps, weight_decay); None: leave
            them out.
        grad_scaler: The :class:`torch.amp.GradScaler` that scales the loss, if one does.
        cache_products: Keep :math:`K K^\top` and :math:`C C^\top` between updates (T > 1) of all but diagonal and
            Toeplitz factors: of dense ones, half the cost of a step. It takes half of the factors' memory again.
        average_gradients: With several processes: average the gradients over them in ``step``. None: unless
            DistributedDataParallel has done it. (One that is built after SINGD is seen in its forwards, for
            a short message per step.)
            The loss of the whole is the mean of the ranks' losses: with unequal batches multiply a rank's mean
            by ``ranks * its samples / all samples``, and a sum over samples by ``ranks``.
        shard_factors: With several processes: each rank keeps and updates the factors of its share of the
            layers, and computes their natural gradients for all. Layers stay whole, so the result is the same.
            The factors take about 1/N of the memory; K and C of other ranks come for the time of an update
            (with ``T=1``, always).
            ``state_dict``, ``factors`` and ``stats`` gather from all ranks: call them on every rank. If you
            change ``T`` between steps, an update that it brings in the very next step is left out.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For an option out of range, or a parameter that isn't the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        damping: float = 1e-3,
        alpha1: float = 0.5,
        weight_decay: float = 0.0,
        T: int = 10,
        loss_average: str | None = "batch",
        lr_cov: float | Callable[[int], float] = 1e-2,
        structures: tuple[Any, Any] = ("dense", "dense"),
        kfac_approx: str = "expand",
        warn_unsupported: bool = True,
        kfac_like: bool = False,
        preconditioner_dtype: Any = None,
        normalize_lr_cov: bool = False,
        *,
        fallback: Mapping[str, Any] | None = options.ADAMW,
        grad_scaler: torch.amp.GradScaler | None = None,
        cache_products: bool = True,
        average_gradients: bool | None = None,
        shard_factors: bool = False,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}.")
        defaults = dict(
            lr=lr,
            momentum=momentum,
            damping=damping,
            alpha1=alpha1,
            weight_decay=weight_decay,
            T=T,
            loss_average=loss_average,
            lr_cov=lr_cov,
            structures=structures,
            kfac_approx=kfac_approx,
            kfac_like=kfac_like,
            preconditioner_dtype=preconditioner_dtype,
            normalize_lr_cov=normalize_lr_cov,
            algorithm="singd",
            format=options.FORMAT,
        )
        options.check_singd(defaults)
        self._fallback = options.fallback_options(fallback)
        model, averaged = unwrapped(model)
        self.average_gradients = (
            False if averaged and average_gradients is None else average_gradients
        )
        self._wrapping = Wrapping()
        self._ownership = Ownership(shard_factors)
        self._slots = find_slots(model)
        self._blocks, self._reasons = find_blocks(model)
        self._names = {p: n for n, p in model.named_parameters()}
        self._statistics: dict[Block, Statistics] = {}
        # the blocks that statistics came from, or that a warning was given for
        self._heard: set[Block] = set()
        self.grad_scaler = grad_scaler
        self.cache_products = cache_products
        if params is None:
            groups = self._everything(model, warn_unsupported)
        else:
            params = list(params)
            groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        groups = [{**g, "params": _as_list(g.get("params", ()))} for g in groups]
        self._announced = {p for g in groups for p in map(_parameter, g["params"])}
        super().__init__(groups, defaults)
        self._announced = set()

    # -- groups ----------------------------------------------------------------------------------

    def _everything(self, model: nn.Module, warn_unsupported: bool) -> list[dict[str, Any]]:
        """One group of all trainable parameters (``add_param_group`` splits off the fallback's)."""
        trainable = [p for p in model.parameters() if p.requires_grad]
        if self._fallback is not None:
            return [{"params": trainable}]
        ours = {p for b in self._blocks if b.weight.requires_grad for p in (b.weight, b.own_bias)}
        left = [self._names[p] for p in trainable if p not in ours]
        if left and warn_unsupported:
            warnings.warn(
                f"SINGD leaves out parameters that are in no supported layer: {', '.join(left)}.",
                stacklevel=3,
            )
        return [{"params": [p for p in trainable if p in ours]}]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those that SINGD can't precondition go to a fallback group of their own.

        Args:
            param_group: As for any optimizer. ``algorithm="adamw"`` sends all of it to the fallback.

        Raises:
            TypeError: For an option of the wrong type.
            ValueError: For an option out of range or a parameter that isn't the model's.
        """
        self._follow()
        group = {**param_group, "params": _as_list(param_group["params"])}
        options.check_singd({**self.defaults, **group})
        algorithm = group.get("algorithm", "singd")
        if algorithm not in options.ALGORITHMS:
            choices = ", ".join(map(repr, options.ALGORITHMS))
            raise ValueError(f"algorithm must be one of {choices}, got {algorithm!r}.")
        for p in map(_parameter, group["params"]):
            if p not in self._names:
                raise ValueError(
                    f"A parameter of shape {tuple(getattr(p, 'shape', ()))} isn't one of the model's."
                )
        ours, rest = self._split(group["params"], algorithm)
        if rest and self._fallback is None and algorithm != "adamw":
            names = ", ".join(self._names[_parameter(p)] for p in rest)
            raise ValueError(
                f"SINGD can't precondition {names}, and fallback=None leaves them no other algorithm."
            )
        if rest:
            adam = {**(self._fallback or options.ADAMW), "algorithm": "adamw"}
            if algorithm == "adamw":
                adam |= group
            options.check_adamw(adam)
        if ours or not rest:
            super().add_param_group({**group, "params": ours})
        if rest:
            super().add_param_group({**group, **adam, "params": rest})
        handed = set(map(_parameter, ours))
        for block in self._blocks:
            block.active |= block.weight in handed
            if block.own_bias in handed:
                block.bias = block.own_bias
            if block.active:
                for layer in block.modules:
                    watch(layer, self)
        self._index()

    def _split(self, params: list[Any], algorithm: str) -> tuple[list[Any], list[Any]]:
        """Parameters that get a Kronecker-factored block, and all others."""
        handed = set(map(_parameter, params)) | self._announced
        handed |= {p for g in self.param_groups if g["algorithm"] == "singd" for p in g["params"]}
        ours = set()
        if algorithm == "singd":
            for block in self._blocks:
                if block.weight not in handed:
                    continue
                if block.own_bias in set(map(_parameter, params)) and block.frozen_shape:
                    raise ValueError(
                        f"The bias of layer {block.name!r} can't join its matrix after the first step; "
                        "add it with algorithm='adamw', or build SINGD with it."
                    )
                ours |= {block.weight, block.own_bias}
        split: tuple[list[Any], list[Any]] = ([], [])
        for p in params:
            split[_parameter(p) not in ours].append(p)
        return split

    def _index(self) -> None:
        """Look up once what hooks and steps need: each block's group and each layer's block."""
        self._group_of = {p: g for g in self.param_groups for p in g["params"]}
        self._block_of = {}
        for block in self._blocks:
            if block.active and block.weight in self._group_of:
                block.group = self._group_of[block.weight]
                self._block_of.update(dict.fromkeys(block.modules, block))

    def _follow(self) -> None:
        """Take up parameters that were replaced in the model, e.g. by ``load_state_dict(assign=True)``."""
        heirs: dict[nn.Parameter, nn.Parameter] = {}
        for slot in self._slots:
            old, new = slot.param, slot.current()
            if (
                new is None
                or new is old
                or (hasattr(old, "full_tensor") and not hasattr(new, "full_tensor"))
            ):
                continue  # (FSDP shows the gathered weight in a forward; the sharded one is the parameter)
            if heirs.setdefault(old, new) is not new:
                raise RuntimeError(
                    f"The weight {self._names[heirs[old]]!r} was tied to another one when SINGD was built and is "
                    "not any more; tie them again after load_state_dict(assign=True)."
                )
            slot.param = new
            if old not in self._names:
                continue  # a tied one, already replaced
            self._names[new] = self._names.pop(old)
            if old in self.state:
                self.state[new] = self.state.pop(old)
            for group in self.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            for block in self._blocks:
                for name in ("weight", "bias", "own_bias"):
                    if getattr(block, name) is old:
                        setattr(block, name, new)
        if heirs:
            self._index()

    # -- statistics --------------------------------------------------------------------------------

    def _due(self, layer: nn.Module) -> Block | None:
        """The layer's block if its factors are updated in this step."""
        block = self._block_of.get(layer)
        if block is None:
            return None
        state = self.state.get(block.weight, {})
        due = state.get("step", 0) % block.group["T"] == 0 and self._ownership.ready(block, state)
        return block if due else None

    @torch.no_grad()
    def _gather(self, block: Block, layer: nn.Module, x: Tensor, g: Tensor) -> None:
        if self._due(layer) is None:  # there was a step between this forward and its backward
            return
        scale = None
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            scale = self.grad_scaler.scale(torch.ones((), device=g.device))
        with without_autocast(g.device):
            new = gather(
                block, layer, self._factor(block, "K"), self._factor(block, "C"), x, g, scale
            )
        old = self._statistics.get(block)
        self._heard.add(block)
        cleared = layer.weight.grad is None and not hasattr(block.weight, "full_tensor")
        if old is None or (cleared and old.backward != new.backward):
            self._statistics[block] = new
        else:
            self._statistics[block] = added(old, new, block.group["loss_average"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and, with them, the statistics of the same backward passes."""
        self._follow()
        super().zero_grad(set_to_none)
        self._statistics.clear()
        self._wrapping.clear()

    def _factor(self, block: Block, key: str) -> StructuredMatrix:
        """A view on the state; before the first step, the identity. For gathering, also another rank's."""
        state = self.state.get(block.weight, {})
        if key not in state:
            handed = self._ownership.handed.get(block)
            if handed is None:
                return block.identity(key)
            return block.blueprint(key).from_flat(handed[key].to(block.weight.device))
        if state[key].device != block.weight.device:  # the model was moved
            state[key] = state[key].to(block.weight.device)
        return block.view(key, state[key])

    def _outer(self, block: Block, side: str) -> Outer:
        """A factor for the natural gradient, as its product where ``cache_products`` keeps it."""
        factor = self._factor(block, side)  # moves the state to the weight's device
        return (
            block.product(side, self.state[block.weight][side]) if self.cache_products else factor
        )

    # -- the step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all parameters that have a gradient.

        Args:
            closure: Re-evaluates the model, calls backward and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If a gradient scaler steps SINGD that it wasn't built with, or if weights that were
                tied are not any more.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_before_step()
        self._follow()
        lr_covs = self._lr_covs()
        rehearsal = checkpoint.is_rehearsal(self)
        self._ownership.assign(self._blocks)
        if distributed.world_size() > 1 and not rehearsal:
            exchange.start(self).finish()
        used = self._used_blocks()
        with without_autocast(*(block.weight.device for block in used)):
            for block in used:
                self._advance(block, lr_covs.get(block))
            self._statistics.clear()
            self._wrapping.clear()
            torch_steps.sgd_steps(self._directions(used, rehearsal), self._group_of, self.state)
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                params = [p for p in group["params"] if p.grad is not None]
                torch_steps.adamw_step(group, params, self.state)
        if rehearsal:
            checkpoint.rewind(self)
        else:
            self._ownership.hand_out(self._blocks, used, self.state)
        return loss

    def _lr_covs(self) -> dict[Block, float]:
        """The steps on the factors that are due: a schedule's bad value is seen before anything changes."""
        return {
            block: options.step_size(
                block.group["lr_cov"], self.state.get(block.weight, {}).get("step", 0)
            )
            for block in self._blocks
            if self._due(block.modules[0]) is block
        }

    def _used_blocks(self) -> list[Block]:
        return [b for b in self._blocks if b.active and any(p.grad is not None for p in b.params)]

    def _check_before_step(self) -> None:
        scaler.check(self)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        f"The gradient of {self._names[p]!r} is sparse; SINGD needs dense ones (sparse=False)."
                    )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # False: the scaler unscales and skips, as for any optimizer. True, said to an unknown scaler alone,
        # makes it show itself; others who ask (Lightning) would take it for a refusal to clip.
        asking = sys._getframe(1).f_locals.get("self")
        return self.grad_scaler is None and isinstance(asking, torch.amp.GradScaler)

    def _advance(self, block: Block, lr_cov: float | None) -> None:
        """Count a step of the block, and update its factors if they are due and kept here."""
        state = self.state[block.weight]
        if "step" not in state:
            self._ownership.initialise(block, state)
        statistics = self._statistics.get(block)
        if lr_cov is not None:
            if statistics is not None:
                self._update_factors(block, state, statistics, lr_cov)
            elif not self._ownership.keeps(block):
                state["last_update"] = state["step"]  # its owner does it
            elif block not in self._heard and _has_some(block.weight.grad):
                self._heard.add(block)
                warnings.warn(
                    f"Layer {block.name!r} has a gradient but its forward and backward were not seen, so its "
                    "factors stay as they are; build SINGD before the first call of a compiled model, call the "
                    "layer itself, and let backward() fill in the gradients.",
                    stacklevel=4,
                )
        state["step"] += 1

    def _directions(
        self, blocks: list[Block], rehearsal: bool
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The blocks' parameters that have a gradient, each with its natural gradient."""
        found = self._natural_gradients(blocks, rehearsal)
        for block, N in self._ownership.natural_gradients(found, rehearsal):
            parts = block.kind.from_matrix(block.modules[0], N, block.bias is not None)
            for p, d in zip(block.params, parts, strict=False):
                if d is not None and p.grad is not None:
                    yield p, distributed.placed_like(d.to(p.dtype), p)

    def _natural_gradients(
        self, blocks: list[Block], rehearsal: bool
    ) -> Iterator[tuple[Block, Tensor | None]]:
        """That of each block, [d_o, d_i]; None of one that another rank owns."""
        for block, whole in distributed.whole_gradients(blocks):
            dW = block.gradient(whole)
            if rehearsal:
                yield block, dW  # it is zero
            elif not self._ownership.keeps(block):
                yield block, None
            else:
                K, C = (self._outer(block, side) for side in SIDES)
                yield block, natural_gradient(K, C, dW, overwrite=block.bias is not None)

    def _update_factors(
        self, block: Block, state: dict[str, Any], statistics: Statistics, lr_cov: float
    ) -> None:
        group = block.group
        factors = [self._factor(block, key) for key in checkpoint.FACTORS]
        K, C, m_K, m_C = (F.to(dtype=accumulation_dtype(F.dtype)) for F in factors)
        H_K, H_C, some = statistics.normalised()
        new_m_K, new_m_C = riemannian_momenta(
            *(K, C, m_K, m_C, H_K, H_C),
            damping=group["damping"],
            alpha1=group["alpha1"],
            normalize=group["normalize_lr_cov"],
            kfac_like=group["kfac_like"],
            weight=some,  # nothing finite was seen: stay
        )
        step = {"lr_cov": lr_cov, "normalize": group["normalize_lr_cov"], "weight": some}
        new = (moved_factor(K, new_m_K, **step), moved_factor(C, new_m_C, **step), new_m_K, new_m_C)
        for key, matrix in zip(checkpoint.FACTORS, new, strict=True):
            matrix = matrix.to(dtype=state[key].dtype)
            state[key] = matrix.flat()
            block.remember(key, state[key], matrix)
        state["last_update"] = state["step"]

    # -- checkpoints and copies ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in torch, of plain values only, and a snapshot: training on does not change it.

        With ``shard_factors`` it holds the factors of all ranks, and every rank must call it.
        """
        self._follow()
        return checkpoint.pack(self, super().state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch, but the factors keep their own dtype, and what doesn't fit is refused.

        With ``shard_factors`` each rank keeps its share; saved by how many ranks, does not matter.

        Args:
            state_dict: From :meth:`state_dict`; it is not changed.

        Raises:
            ValueError: If a layer's structures or shapes differ from the checkpoint's, in one sentence
                that names the layer; nothing is loaded then.
        """
        self._follow()
        checkpoint.check(self, state_dict)
        super().load_state_dict(checkpoint.complete(self, state_dict))
        checkpoint.restore(self, state_dict)
        self._statistics.clear()
        self._index()
        self._ownership.assign(self._blocks)
        self._ownership.keep_own(self._blocks, self.state)

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "_fallback",
            "_slots",
            "_blocks",
            "_reasons",
            "_names",
            "_heard",
            "_announced",
            "grad_scaler",
            "cache_products",
            "average_gradients",
            "_ownership",
            "_wrapping",
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_blocks" in state:  # a copy or an unpickled optimizer, not torch's load_state_dict
            self._statistics = {}
            for block in self._blocks:
                if block.active:
                    for layer in block.modules:
                        watch(layer, self)
            self._index()

    # -- looking inside --------------------------------------------------------------------------------

    def factors(self, layer: nn.Module | str) -> Factors:
        """A layer's preconditioner as structured matrices; copies, which training does not change.

        With ``shard_factors`` every rank must ask for it: its owner hands it out.

        Args:
            layer: The layer, or its name in the model.

        Raises:
            ValueError: If SINGD doesn't precondition that layer.
        """
        self._follow()
        for block in self._blocks:
            if block.active and (layer in block.names or any(layer is m for m in block.modules)):
                if block.weight not in self.state:
                    zero = {s: block.identity(s) * 0.0 for s in SIDES}
                    return Factors(block.identity("K"), block.identity("C"), zero["K"], zero["C"])
                flat = self._ownership.gathered([block], checkpoint.FACTORS, self.state, "factors")
                return Factors(
                    *(block.blueprint(key[-1]).from_flat(v.clone()) for key, v in flat[0].items())
                )
        known = ", ".join(repr(n) for b in self._blocks if b.active for n in b.names)
        raise ValueError(f"SINGD doesn't precondition layer {layer!r}; choose from {known}.")

    def stats(self) -> dict[str, dict[str, float]]:
        """Diagnostics of every layer after a step, as plain numbers; see :func:`singd.report.stats`.

        With ``shard_factors``, and of a model under ``fully_shard``, every rank must ask for them.
        """
        return report.stats(self)

    def __repr__(self) -> str:
        return report.table(self)

    def _repr_html_(self) -> str:
        return report.html_table(self)


def _parameter(p: Any) -> Any:
    """The parameter of an entry that may be a (name, parameter) pair, as in torch."""
    return p[1] if isinstance(p, tuple) else p


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _has_some(grad: Tensor | None) -> bool:
    """Whether a gradient is anything but zero (a frozen or an unused layer's is not)."""
    return grad is not None and bool(grad.any())
