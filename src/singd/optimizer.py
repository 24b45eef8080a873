"""SINGD as a ``torch.optim.Optimizer``: groups and the step."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from singd import checkpoint, groups, plan, report, scaler, torch_private
from singd.advance import advance
from singd.blocks import Block
from singd.hooks import Collector
from singd.precision import without_autocast
from singd.processes import collectives, exchange
from singd.processes.ownership import Ownership
from singd.weight_steps import WeightSteps


@cache
def _named(names: tuple[str, ...]) -> Any:
    return namedtuple("Factors", names)


Factors = _named(("K", "C", "m_K", "m_C"))
"""What ``factors`` returns: the factors of one layer by the names of the rule, here those of SINGD."""


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

    :math:`P` projects onto the structure, :math:`\operatorname{tr}` is the average trace. This is the method as
    published. By default the momentum averages gradients, before the factors, and the step is scaled to a size
    of its own (``momentum_on``, ``match_rms``). Parameters that are in no supported layer (norms, loose
    parameters, ...) train with AdamW, in a group of their own.

    Args:
        model: The model that is trained; its layers get forward hooks.
        params: Parameters or groups, as for any optimizer. None: all trainable ones of the model.
        lr: Step size on the weights, :math:`\beta_2`.
        momentum: Momentum on the weights, :math:`\alpha_2`.
        damping: Damping :math:`\lambda`.
        alpha1: Riemannian momentum :math:`\alpha_1` on the factors.
        weight_decay: :math:`\gamma`, added to the natural gradient.
        T: The factors are updated at steps 0, T, 2T, ...; or a callable of the step count that says how many
            steps lie between two updates, such as the default, :class:`~singd.Growing` with 10.
        loss_average: What the loss averages over: None, "batch" or "batch+sequence".
        batch_first: Whether inputs of linear layers and embeddings are [batch, sequence, ...]; False: [sequence,
            batch, ...], as ``nn.Transformer`` and recurrent layers have it unless told otherwise.
        repeated_calls: What several calls of a layer in one forward are: more "examples", or "positions" of the
            same ones, as in a loop over a sequence. With ``loss_average="batch"`` this decides how large the batch
            was. None: examples, but a layer that is called more than twice warns.
        lr_cov: Step size on the factors :math:`\beta_1`: a number, or a callable of the step count.
        structures: The structures of K and C: names, or what :func:`~singd.structure` takes.
        kfac_approx: How layers with weight sharing are treated: "expand" or "reduce".
        warn_unsupported: Whether to warn of parameters that are left out (``fallback=None``).
        kfac_like: The same as ``rule="ikfac"``.
        preconditioner_dtype: The factors' dtype, or a pair for K and C; None: the weight's.
        normalize_lr_cov: True: normalise the factors' step by the largest entry of its momentum, as published.
            "spectral": bound it, so that no factor can lose its inverse. Both average the momentum with
            :math:`1 - \alpha_1`.
        rule: What moves the factors: "singd", "ikfac", "kfac", "shampoo", or an object of a :class:`~singd.Rule`.
        relative_damping: Whether ``damping`` is multiplied by the layer's average curvature tr(U) tr(G), so
            that the loss times a constant gives the same preconditioner up to scale.
        scaled_start: Whether K and C start at the scale that the first curvature asks for, instead of at I.
        fast_start: Whether the t-th update has a step of at least 1 / (t + 1), at most 1/2, so that the first
            statistics count in full; ``lr_cov`` is the least step then.
        momentum_on: What the momentum averages: "direction", the natural gradient, as published; or
            "gradient", before the preconditioner.
        nesterov: Whether the momentum is Nesterov's.
        match_rms: Scale the direction of each parameter to this root mean square, so that learning rates of AdamW
            carry over: with 1, a step moves weights by ``lr`` on average. (Muon's 0.2 is for long runs of
            large models.)
            None: as it is.
        fallback: Options of AdamW for all other parameters (lr, betas, eps, weight_decay). Its lr is that of SINGD
            unless given; by default none is. None: leave them out.
        grad_scaler: The :class:`torch.amp.GradScaler` that scales the loss, if one does.
        cache_products: Keep :math:`K K^\top` and :math:`C C^\top` between updates of all but diagonal and Toeplitz
            factors: of dense ones, half the cost of a step, for as much memory as K and C take. None: where
            they take at most half as much as the weight.
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
        damping: float = 0.03,
        alpha1: float = 0.0,
        weight_decay: float = 0.0,
        T: int | Callable[[int], int] = groups.GROWING,
        loss_average: str | None = "batch",
        lr_cov: float | Callable[[int], float] = 0.1,
        structures: tuple[Any, Any] = ("block64diagonal", "diagonal"),
        kfac_approx: str = "expand",
        warn_unsupported: bool = True,
        kfac_like: bool = False,
        preconditioner_dtype: Any = None,
        normalize_lr_cov: bool | str = "spectral",
        *,
        batch_first: bool = True,
        repeated_calls: str | None = None,
        rule: Any = "singd",
        relative_damping: bool = True,
        scaled_start: bool = True,
        fast_start: bool = True,
        momentum_on: str = "gradient",
        nesterov: bool = True,
        match_rms: float | None = 1.0,
        fallback: Mapping[str, Any] | None = groups.SAME,
        grad_scaler: torch.amp.GradScaler | None = None,
        cache_products: bool | None = None,
        average_gradients: bool | None = None,
        shard_factors: bool = False,
    ):
        given = dict(locals())
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}.")
        defaults = groups.plain({name: given[name] for name in groups.OPTIONS})
        defaults |= {"algorithm": "singd", "format": groups.FORMAT}
        groups.check_singd(defaults)
        groups.check_whole(given)
        model, averaged = plan.unwrapped(model)
        wrapped = averaged and average_gradients is None
        self.average_gradients = False if wrapped else average_gradients
        self.cache_products = cache_products
        self._ownership = Ownership(shard_factors)
        self._plan = plan.Plan(model, groups.fallback_options(fallback, lr))
        self._blocks, self._names = self._plan.blocks, self._plan.names
        self._checked: dict[int, Any] = {}
        self._group_of: dict[Any, dict[str, Any]] = {}
        if params is None:
            new = [{"params": self._plan.trainable(defaults, warn_unsupported)}]
        else:
            new = groups.as_groups(params)
        self._collector = Collector(grad_scaler)
        ours = [g["params"] for g in new if g.get("algorithm", "singd") == "singd"]
        self._plan.announced = {groups.parameter(p) for params in ours for p in params}
        super().__init__(new, defaults)
        self._plan.announced = set()

    # -- groups ----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those that SINGD can't precondition go to a fallback group of their own.

        Args:
            param_group: As for any optimizer. ``algorithm="adamw"`` sends all of it to the fallback.

        Raises:
            TypeError: For an option of the wrong type.
            ValueError: For an option out of range or a parameter that isn't the model's.
        """
        self._rebind_parameters()
        group = groups.plain(groups.as_groups([param_group])[0])
        options = {**self.defaults, **group}
        groups.check_names(group, self.defaults)
        groups.check_choices(options, ["algorithm"])
        groups.check_singd(options)
        new = self._plan.split(group, options)
        before = len(self.param_groups)
        try:
            for one in new:
                super().add_param_group(one)
        except BaseException:
            del self.param_groups[before:]
            raise
        self._plan.take(self.param_groups[before:])
        self._index()

    def _index(self) -> None:
        """Look up once what hooks and steps need: each block's group, and each layer's block."""
        group_of = {p: g for g in self.param_groups for p in g["params"]}
        for block in self._blocks:
            block.join(self.state, group_of)
        self._group_of = group_of
        self._ours = {p for block in self._blocks if block.active for p in block.params}
        self._collector.watch(self._blocks, self._group_of)

    @property
    def _active(self) -> dict[nn.Parameter, Block]:
        return {b.weight: b for b in self._blocks if b.active}

    def _rebind_parameters(self) -> None:
        """Take up what changed: groups, and parameters that ``load_state_dict(assign=True)`` replaced."""
        found = self._plan.replaced()
        for old, new in found.items():
            if old in self.state:
                self.state[new] = self.state.pop(old)
            for group in self.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
        if found or sum(len(g["params"]) for g in self.param_groups) != len(self._group_of):
            self._index()

    # -- statistics --------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and, with them, the statistics of the same backward passes."""
        self._rebind_parameters()
        super().zero_grad(set_to_none)
        self._collector.clear()

    @contextmanager
    def collecting(self, enabled: bool) -> Iterator[None]:
        """Whether backward passes inside give the factors their statistics; ``False`` for all but one's own.

        For the Monte-Carlo Fisher matrix, after a backward on :func:`~singd.sample_labels` and ``zero_grad``,
        go with the loss's own backward into ``with optimizer.collecting(False):``. What was collected stays.

        Args:
            enabled: Whether statistics are collected.
        """
        before = self._collector.collecting
        self._collector.collect(enabled)
        try:
            yield
        finally:
            self._collector.collecting = before

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
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._rebind_parameters()
        if self.grad_scaler is not None or getattr(self, "found_inf", None) is not None:
            scaler.check(self, self.grad_scaler)
        groups.check_before_step(self.param_groups, self._checked, self._names, self._ours)
        self._collector.check_sampled()
        lr_covs = {}
        for block in self._blocks:
            if block.active and block.due:
                lr_covs[block] = groups.step_size(block.group, block.state)
        fresh = not (self.state or self._collector.heard)
        rehearsal = fresh and checkpoint.is_rehearsal(self.param_groups)
        if self._ownership.wanted:
            self._ownership.assign(self._blocks)
        owners = self._ownership if self._ownership.ranks > 1 else None
        statistics = self._collector.statistics
        if collectives.world_size() > 1 and not rehearsal:
            statistics = exchange.exchanged(
                *(list(self._group_of), lr_covs, statistics, self._collector.ddp),
                *(self.average_gradients, self._ownership.owner, self.grad_scaler),
            )
        used = [b for b in self._blocks if b.used]
        with without_autocast(*(block.weight.device for block in used)):
            for block in used:
                mine = owners is None or owners.keeps(block)
                of = (lr_covs.get(block), statistics.get(block), mine, self._collector)
                advance(block, self.state[block.weight], *of)
            how = owners, self.cache_products, rehearsal
            steps = WeightSteps(self.state, self._group_of, self._collector.attempt, *how)
            steps.take(used)
        for block in used:
            lr = block.group["lr"]
            block.last_lr = lr.clone() if isinstance(lr, Tensor) else lr
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                steps.adamw(group)
        if rehearsal:
            checkpoint.rewind(self.state)
        elif owners is not None:
            owners.broadcast_factors(self._blocks, used, self.state)
        return self._collector.finish(loss)

    @property
    def grad_scaler(self) -> Any:
        """The gradient scaler that scales the loss, or None."""
        return self._collector.grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, value: Any) -> None:
        self._collector.grad_scaler = value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # False: the scaler unscales and skips, as for any optimizer. True, said to an unknown scaler alone,
        # makes it show itself; others who ask (Lightning) would take it for a refusal to clip.
        return self.grad_scaler is None and isinstance(torch_private.caller(), torch.amp.GradScaler)

    # -- checkpoints and copies ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in torch, of plain values only, and a snapshot: training on does not change it.

        With ``shard_factors`` it holds the factors of all ranks, and every rank must call it.
        """
        self._rebind_parameters()
        packed = checkpoint.pack(super().state_dict())
        if self._ownership.divided:
            blocks = [b for b in self._blocks if "step" in self.state.get(b.weight, {})]
            found = self._ownership.gathered(blocks, self.state, "state_dict")
            by_weight = dict(zip((b.weight for b in blocks), found, strict=True))
            for p, entry, _ in checkpoint.pairs(self.param_groups, packed):
                entry.update(checkpoint.copied(by_weight.get(p, {})))
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch, but the factors keep their own dtype, and what doesn't fit is refused.

        With ``shard_factors`` each rank keeps its share; saved by how many ranks, does not matter.

        Args:
            state_dict: From :meth:`state_dict`; it is not changed.

        Raises:
            ValueError: If a layer's structures or shapes differ from the checkpoint's, in one sentence
                that names the layer; nothing is loaded then.
        """
        checkpoint.check_form(state_dict)
        self._rebind_parameters()
        loaded: dict[str, Any] = {}

        def before(_: Any, final: Any) -> dict[str, Any]:  # after all that a user's hooks change
            checkpoint.check_form(final)
            loaded.update(checkpoint.upgraded(final, self.param_groups, self._active))
            checkpoint.check(self.param_groups, self._active, self._names, loaded)
            return checkpoint.complete(self.param_groups, loaded)

        def after(_: Any) -> None:  # before all that a user's hooks see
            self._index()
            checkpoint.restore(self.param_groups, self._active, self.state, loaded)
            self._collector.clear()
            self._ownership.assign(self._blocks)
            self._ownership.keep_own(self._blocks, self.state)

        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            for handle in handles:
                handle.remove()
            self._index()  # also where an exception came between torch's loading and ours

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in self.__dict__.items() if name in _COPIED}
        return {**super().__getstate__(), **own, "grad_scaler": self.grad_scaler}

    def __setstate__(self, state: dict[str, Any]) -> None:
        grad_scaler = state.pop("grad_scaler", None)
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it to every copy
        if "_plan" in state:  # a copy or an unpickled optimizer, not torch's load_state_dict
            self._collector, self._checked = Collector(grad_scaler), {}
            self._index()

    def detach(self) -> None:
        """Take all hooks off the model, for good: it can be scripted and quantised as if SINGD had never been."""
        self._collector.detach()

    # -- looking inside --------------------------------------------------------------------------------

    def factors(self, layer: nn.Module | str) -> Any:
        """What the rule keeps of a layer, as structured matrices by its names.

        They are copies, which training does not change.

        With ``shard_factors`` every rank must ask for it: its owner hands it out.

        Args:
            layer: The layer, or its name in the model.

        Raises:
            ValueError: If SINGD doesn't precondition that layer.
        """
        self._rebind_parameters()
        for block in self._active.values():
            if layer in block.names or any(layer is m for m in block.modules):
                found = block.start()
                if "step" in block.state:
                    (flat,) = self._ownership.gathered([block], self.state, "factors")
                    found = {n: block.blueprints()[n].from_flat(v.clone()) for n, v in flat.items()}
                return _named(tuple(found))(**found)
        known = ", ".join(repr(n) for b in self._active.values() for n in b.names)
        raise ValueError(f"SINGD doesn't precondition layer {layer!r}; choose from {known}.")

    def stats(self) -> dict[str, dict[str, float]]:
        """Diagnostics of every layer after a step, as plain numbers; see :func:`singd.report.stats`.

        With ``shard_factors``, and of a model under ``fully_shard``, every rank must ask for them.
        """
        blocks = list(self._active.values())
        return report.stats(blocks, self.state, self._group_of, self._ownership)

    def _rows(self) -> list[tuple[str, ...]]:
        blocks = list(self._active.values())
        return report.rows(blocks, self._names, self._plan.reasons, self.param_groups, self.state)

    def __repr__(self) -> str:
        return report.table(self._rows())

    def _repr_html_(self) -> str:
        return report.html_table(self._rows())


_COPIED = ("_plan", "_blocks", "_names", "cache_products", "average_gradients", "_ownership")
