"""What goes into a checkpoint, what may be loaded from one, and how the factors keep their dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from singd import options
from singd.blocks import Block
from singd.structures import from_recursive_layout

if TYPE_CHECKING:
    from singd.optimizer import SINGD

FACTORS = ("K", "C", "m_K", "m_C")
OWN_DTYPE = (*FACTORS, "exp_avg", "exp_avg_sq")  # may differ from the parameter's


def pack(optimizer: SINGD, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A snapshot of torch's state dict: tensors copied, options as plain values, the factors of all ranks."""
    packed = {
        **state_dict,
        "state": {index: _copied(entry) for index, entry in state_dict["state"].items()},
        "param_groups": [_copied(options.saved(group)) for group in state_dict["param_groups"]],
    }
    ownership = optimizer._ownership
    if ownership.divided:
        blocks = [b for b in optimizer._blocks if "step" in optimizer.state.get(b.weight, {})]
        factors = ownership.gathered(blocks, FACTORS, optimizer.state, "state_dict")
        found = dict(zip((b.weight for b in blocks), factors, strict=True))
        for p, entry, _ in _pairs(optimizer, packed):
            entry.update(_copied(found.get(p, {})))
    return packed


def _copied(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in entry.items()}


def _pairs(
    optimizer: SINGD, state_dict: Mapping[str, Any]
) -> Iterator[tuple[nn.Parameter, dict[str, Any], dict[str, Any]]]:
    """(parameter, its saved state, its saved group), matched by position as torch does."""
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for index, p in zip(saved["params"], group["params"], strict=True):
            yield p, state_dict["state"].get(index, {}), saved


def check(optimizer: SINGD, state_dict: Mapping[str, Any]) -> None:
    """Refuse what doesn't fit, before anything is changed.

    Raises:
        ValueError: In one sentence that names the layer or the group.
    """
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved_groups]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The checkpoint has groups of {sizes[1]} parameters, but this optimizer has groups of {sizes[0]}."
        )
    for i, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if saved.get("format", options.FORMAT) > options.FORMAT:
            raise ValueError(
                f"The checkpoint has format {saved['format']}; this version of singd reads up to {options.FORMAT}."
            )
        if saved.get("algorithm", group["algorithm"]) != group["algorithm"]:
            raise ValueError(
                f"Group {i} of the checkpoint is trained by {saved['algorithm']!r}, "
                f"but by {group['algorithm']!r} in this optimizer."
            )
    blocks = {b.weight: b for b in optimizer._blocks if b.active}
    for p, state, saved in _pairs(optimizer, state_dict):
        name = optimizer._names[p]
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            if key in state and tuple(state[key].shape) != tuple(p.shape):
                raise ValueError(
                    f"The checkpoint's {key} of {name!r} has shape {tuple(state[key].shape)}, "
                    f"but the parameter has {tuple(p.shape)}."
                )
        if p in blocks:
            _check_block(blocks[p], state, saved)


def _check_block(block: Block, state: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    mine = tuple(s.name for s in options.resolve(block.group["structures"]))
    theirs = tuple(saved.get("structures", mine))
    if theirs != mine:
        raise ValueError(
            f"The checkpoint has structures {theirs} for layer {block.name!r}, but this optimizer has {mine}."
        )
    for key in FACTORS:
        expected = block.blueprint(key[-1]).numel
        if state and (key not in state or state[key].numel() != expected):
            found = f"{state[key].numel()} numbers" if key in state else "nothing"
            raise ValueError(
                f"The checkpoint has {found} for {key} of layer {block.name!r}, which needs {expected}."
            )


def complete(optimizer: SINGD, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict for torch to load.

    With the options that it does not hold (callables, structures with code of their own), with copies of its
    tensors, because torch would go on training in those of the caller, and without those of a dtype of their own.
    """
    groups = []
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        mine = {name: value for name, value in group.items() if name != "params"}
        kept = {"structures": group["structures"], "format": options.FORMAT}
        groups.append({**mine, **_copied(saved), **kept})
    state = {}
    for index, entry in state_dict["state"].items():
        state[index] = _copied({name: v for name, v in entry.items() if name not in OWN_DTYPE})
    return {**state_dict, "state": state, "param_groups": groups}


def restore(optimizer: SINGD, state_dict: Mapping[str, Any]) -> None:
    """Load what has a dtype of its own: torch would cast it to the parameter's."""
    blocks = {b.weight: b for b in optimizer._blocks if b.active}
    for p, state, saved in _pairs(optimizer, state_dict):
        for key in OWN_DTYPE:
            if key in state:
                value = state[key].to(p.device, copy=True)
                if key in FACTORS and saved.get("format", 1) < 2:
                    value = from_recursive_layout(blocks[p].blueprint(key[-1]), value)
                optimizer.state[p][key] = value


def is_rehearsal(optimizer: SINGD) -> bool:
    """Whether this is the step on nothing by which torch.distributed.checkpoint fills an empty state.

    It sets gradients and learning rates to zero for one call of ``step`` where there is no state yet. A first
    step of training was preceded by a backward pass, or by none through any layer but then by a gradient.
    """
    groups = optimizer.param_groups
    if optimizer.state or optimizer._heard or any(float(g["lr"]) != 0 for g in groups):
        return False
    grads = [p.grad for g in groups for p in g["params"] if p.grad is not None]
    return not any(bool(getattr(g, "_local_tensor", g).any()) for g in grads)


def rewind(optimizer: SINGD) -> None:
    """Take a rehearsal back, but for the state that it made: the first step is still to come."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"] * 0
        if "last_update" in state:
            state["last_update"] = -1
        if "momentum_buffer" in state:  # it holds the weight decay already
            state["momentum_buffer"].zero_()


def state_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors in a parameter's state."""
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
