"""What goes into a checkpoint, what may be loaded from one, and how the factors keep their own dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from singd import groups
from singd.blocks import Block
from singd.groups import Group, Groups
from singd.state import COUNTERS, States
from singd.structures import from_recursive_layout
from singd.torch_private import local_part
from singd.weight_steps import MOMENTS

Blocks: TypeAlias = Mapping[nn.Parameter, Block]
StateDict: TypeAlias = Mapping[str, Any]
OF_ADAMW = ("step", *MOMENTS)
"""What AdamW keeps of a parameter."""


def copied(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tensors of its own."""
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in entry.items()}


def pack(state_dict: StateDict) -> dict[str, Any]:
    """A snapshot of torch's state dict: tensors copied, options as plain values."""
    return {
        **state_dict,
        "state": {index: copied(entry) for index, entry in state_dict["state"].items()},
        "param_groups": [copied(groups.saved(group)) for group in state_dict["param_groups"]],
    }


def pairs(
    param_groups: Groups, state_dict: StateDict
) -> Iterator[tuple[nn.Parameter, dict[str, Any], dict[str, Any]]]:
    """(parameter, its saved state, its saved group), matched by position as torch does."""
    for saved, group in zip(state_dict["param_groups"], param_groups, strict=True):
        for index, p in zip(saved["params"], group["params"], strict=True):
            yield p, state_dict["state"].get(index, {}), saved


def check_form(state_dict: Any) -> None:
    """Refuse what is no state dict of an optimizer, or one of a later version.

    Raises:
        ValueError: In one sentence.
    """
    known = state_dict if isinstance(state_dict, Mapping) else {}
    for name, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if not isinstance(known.get(name), kind):
            raise ValueError(
                "A checkpoint must be the state_dict of an optimizer, with 'state' and 'param_groups'; "
                f"{name!r} is missing."
            )
    for saved in state_dict["param_groups"]:
        if not isinstance(saved, Mapping) or "params" not in saved:
            raise ValueError(f"A group of the checkpoint has no 'params': {saved!r}.")
        version = saved.get("format", groups.FORMAT)
        if not isinstance(version, int) or version > groups.FORMAT:
            raise ValueError(
                f"The checkpoint has format {version!r}; this version of singd reads up to {groups.FORMAT}."
            )


def upgraded(state_dict: StateDict, param_groups: Groups, blocks: Blocks) -> dict[str, Any]:
    """A state dict of any format as one of this version's.

    Format 1 stored bordered factors block by block, counted no updates, and knew the published method only.
    """
    state = {index: dict(entry) for index, entry in state_dict["state"].items()}
    new = {**state_dict, "state": state}
    if _sizes(state_dict["param_groups"]) != _sizes(param_groups):
        return new  # which `check` refuses
    for p, entry, saved in pairs(param_groups, new):
        if saved.get("format", 1) > 1 or p not in blocks or "last_update" not in entry:
            continue
        for name, blueprint in blocks[p].blueprints().items():
            flat = entry.get(name)
            if isinstance(flat, Tensor) and flat.numel() == blueprint.numel:
                entry[name] = from_recursive_layout(blueprint, flat)
        entry["updates"] = entry["last_update"] // saved.get("T", 1) + 1
    return new


def _sizes(param_groups: Groups) -> list[int]:
    return [len(group["params"]) for group in param_groups]


def check(
    param_groups: Groups, blocks: Blocks, names: Mapping[Any, str], state_dict: StateDict
) -> None:
    """Refuse what doesn't fit, before anything is changed.

    Raises:
        ValueError: In one sentence that names the layer or the group.
    """
    saved_groups = state_dict["param_groups"]
    mine, theirs = _sizes(param_groups), _sizes(saved_groups)
    if mine != theirs:
        raise ValueError(
            f"The checkpoint has groups of {theirs} parameters, but this optimizer has groups of {mine}."
        )
    for i, (saved, group) in enumerate(zip(saved_groups, param_groups, strict=True)):
        if saved.get("algorithm", group["algorithm"]) != group["algorithm"]:
            raise ValueError(
                f"Group {i} of the checkpoint is trained by {saved['algorithm']!r}, "
                f"but by {group['algorithm']!r} in this optimizer."
            )
    for p, state, saved in pairs(param_groups, state_dict):
        for key in ("momentum_buffer", *MOMENTS):
            if key in state:
                what = f"{key} of {names[p]!r}"
                _check_tensor(what, state[key], tuple(p.shape), p.is_complex())
        if p in blocks:
            _check_block(blocks[p], state, saved)
        elif not state.keys().isdisjoint(OF_ADAMW):
            _check_adamw(names[p], state)
    for saved, group in zip(saved_groups, param_groups, strict=True):
        groups.check_names(saved, group)
        check_one = groups.check_values if group["algorithm"] == "singd" else groups.check_adamw
        try:
            check_one({**group, **saved})
        except TypeError as error:
            raise ValueError(f"An option of the checkpoint has a wrong type: {error}") from error


def _check_tensor(what: str, tensor: Any, shape: tuple[int, ...], of_complex: bool = False) -> None:
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ValueError(f"The checkpoint's {what} has {found}, but this optimizer needs {shape}.")
    values = local_part(tensor)
    held = values.layout == torch.strided and not values.is_meta
    numbers = values.is_floating_point() or (of_complex and values.is_complex())
    if not held or not numbers or not bool(values.isfinite().all()):
        why = f"{values.dtype} or not finite" if held else "sparse or on the meta device"
        raise ValueError(
            f"The checkpoint's {what} is {why}; it must hold finite floating-point numbers."
        )


def _check_adamw(name: str, state: Mapping[str, Any]) -> None:
    """Its averages come together, with a count that torch keeps as a tensor, or kept as a number."""
    step = state.get("step")
    whole = all(key in state for key in MOMENTS)
    if isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta:
        step = step.item()
    if not whole or not isinstance(step, int | float) or not 0 <= step < math.inf or step is True:
        raise ValueError(
            f"The checkpoint must have {', '.join(OF_ADAMW)} of {name!r}, step a count, got step {step!r} and "
            f"{', '.join(key for key in state if key != 'step') or 'nothing else'}."
        )


def _check_block(block: Block, state: Mapping[str, Any], saved: Group) -> None:
    mine = tuple(s.name for s in groups.resolve(block.group["structures"])), block.rule.spelling
    rule = "ikfac" if saved.get("kfac_like") else saved.get("rule", "singd")
    theirs = tuple(saved.get("structures", mine[0])), rule
    for what, my, their in zip(("structures", "the rule"), mine, theirs, strict=True):
        if my != their:
            raise ValueError(
                f"The checkpoint has {what} {their!r} for layer {block.name!r}, but this optimizer has {my!r}."
            )
    for name, blueprint in block.blueprints().items() if state else ():
        flat = state.get(name)
        if not isinstance(flat, Tensor) or flat.numel() != blueprint.numel:
            found = f"{flat.numel()} numbers" if isinstance(flat, Tensor) else "nothing"
            raise ValueError(
                f"The checkpoint has {found} for {name} of layer {block.name!r}, which needs {blueprint.numel}."
            )
        _check_tensor(f"{name} of layer {block.name!r}", flat, (blueprint.numel,))
    for name in COUNTERS if state else ():
        count = state.get(name)
        if type(count) is not int or count < (-1 if name == "last_update" else 0):
            raise ValueError(
                f"The checkpoint's {name} of layer {block.name!r} must be a count, got {count!r}."
            )


def complete(param_groups: Groups, state_dict: StateDict) -> dict[str, Any]:
    """A state dict for torch to load.

    With the options that it does not hold: callables and structures with code of their own are this
    optimizer's, and what an older version did not know has its published meaning. With copies of its tensors,
    because torch would go on training in those of the caller.
    """
    completed = []
    for saved, group in zip(state_dict["param_groups"], param_groups, strict=True):
        mine = {name: value for name, value in group.items() if name != "params"}
        if saved.get("format", 1) == 1:
            mine |= {name: v for name, v in groups.PUBLISHED.items() if name in group}
        own = {"structures": group["structures"], "rule": group["rule"], "format": groups.FORMAT}
        completed.append({**mine, **copied(saved), **own})
    state = {index: copied(entry) for index, entry in state_dict["state"].items()}
    for entry in state.values():
        if "exp_avg" in entry:  # torch's kernels take a tensor of this kind only
            step = torch.as_tensor(entry["step"], dtype=torch.float32, device="cpu")
            entry["step"] = step.reshape(())
    return {**state_dict, "state": state, "param_groups": completed}


def restore(param_groups: Groups, blocks: Blocks, states: States, state_dict: StateDict) -> None:
    """Give back the dtype to what has one of its own: torch casts all to the parameter's."""
    for p, saved, _ in pairs(param_groups, state_dict):
        own = (*blocks[p].blueprints(), *MOMENTS) if p in blocks else MOMENTS
        for name in own:
            if name in saved:
                states[p][name] = saved[name].to(p.device, copy=True)
        if p in blocks:
            blocks[p].blueprints()
            blocks[p].factors.adopt(states.get(p, {}))


def is_rehearsal(param_groups: Groups) -> bool:
    """Whether this is the step on nothing by which torch.distributed.checkpoint fills an empty state.

    It sets gradients and learning rates to zero for one call of ``step`` where there is no state yet. A first
    step of training was preceded by a backward pass, or by none through any layer but then by a gradient.

    Args:
        param_groups: Those of an optimizer that has no state, and has seen no backward.
    """
    if any(float(g["lr"]) != 0 for g in param_groups):
        return False
    grads = [p.grad for g in param_groups for p in g["params"] if p.grad is not None]
    return not any(bool(local_part(g).any()) for g in grads)


def rewind(states: States) -> None:
    """Take a rehearsal back, but for the state that it made: the first step is still to come."""
    for state in states.values():
        if "step" in state:
            state["step"] = state["step"] * 0
        if "last_update" in state:
            state["last_update"], state["updates"] = -1, 0
        if "momentum_buffer" in state:  # it holds the weight decay already
            state["momentum_buffer"].zero_()


def state_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors in a parameter's state."""
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
