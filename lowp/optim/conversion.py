"""States of ``torch.optim``'s optimizers for those of the same name here, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowp.optim import sharding
from lowp.optim.state import aligned
from lowp.reference.codec import decode, encode

if TYPE_CHECKING:
    from lowp.optim.optimizer import Optimizer

_CONVERTIBLE = ("Adam", "AdamW", "SGD")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def from_torch(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state of torch's optimizer of the same name, for ``optimizer.load_state_dict``.

    Moments are rounded to nearest into the types that ``optimizer`` keeps (8-bit ones by the codec
    of :mod:`lowp.reference.codec`). Learning rates and the other options torch has become the
    saved ones. torch's SGD counts no steps: a momentum buffer stands for one.

    Args:
        optimizer: what will load the result; its parameters give shapes and ids.
        state_dict: of ``torch.optim.Adam``, ``AdamW`` or ``SGD``; matched by name if both sides
            have names, else by position.

    Raises:
        TypeError: torch has no optimizer with such states.
        ValueError: parameters that do not match.
    """
    _torch_class(optimizer)
    groups, kept = aligned(optimizer, state_dict)
    found = dict(kept)
    state: dict[int, dict[str, Any]] = {}
    position = 0
    for group, current in zip(groups, optimizer.param_groups, strict=True):
        ids = optimizer.ids_of(current)
        for i, p in enumerate(current["params"]):
            if p in found:
                own = optimizer.first_state(p, {**current, **group}, i, ids[i])
                _fill(own, found[p])
                state[position] = own
            position += 1
    return {"state": state, "param_groups": _numbered(groups)}


def to_torch(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state for ``load_state_dict`` of torch's optimizer of the same name.

    8-bit moments are decoded to fp32, others keep their type; torch casts them to the parameter's.

    Raises:
        TypeError: torch has no optimizer with such states.
    """
    options = _torch_class(optimizer)([torch.zeros(1)]).param_groups[0]
    state_dict = optimizer.state_dict()
    groups = [
        {**{k: v for k, v in options.items() if k != "params"},
         **{k: v for k, v in group.items() if k in options or k == "param_names"}}
        for group in state_dict["param_groups"]
    ]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, own in state_dict["state"].items():
        if own["step"] == 0:
            continue  # torch begins a state with the first update
        state[i] = {
            key: _decoded(params[i], value, own[f"{key}_scale"]) if f"{key}_scale" in own else value
            for key, value in own.items()
            if key in _MOMENTS or (key == "step" and type(optimizer).__name__ != "SGD")
        }
    return {"state": {i: own for i, own in state.items() if own}, "param_groups": groups}


def _torch_class(optimizer: Optimizer) -> Any:
    name = type(optimizer).__name__
    if name not in _CONVERTIBLE:
        raise TypeError(
            f"lowp.optim: only states of {', '.join(_CONVERTIBLE)} convert to and from "
            f"torch.optim, got lowp.optim.{name}"
        )
    return getattr(torch.optim, name)


def _numbered(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups as a state dict has them: positions in place of parameters."""
    result, first = [], 0
    for group in groups:
        count = len(group["params"])
        result.append({**group, "params": list(range(first, first + count))})
        first += count
    return result


def _fill(state: dict[str, Any], saved: dict[str, Any]) -> None:
    """Put torch's values into a fresh state, each in the type it has there."""
    moments = {key: value for key, value in saved.items() if isinstance(value, Tensor)}
    state["step"] = torch.as_tensor(saved.get("step", 1.0 if moments else 0.0),
                                    dtype=torch.float32).detach().clone().cpu()
    for key in [k for k in state if k in _MOMENTS and k in moments]:
        target, value = state[key], moments[key].detach()
        whole = sharding.whole(value)
        if sharding.is_sharded(target):
            whole = sharding.block_of(target, target.shape).of(whole)
        own = sharding.local(target)
        if own.is_floating_point():
            own.copy_(whole)
        else:
            x = whole.to(own.device, torch.float32)
            codes, scales = encode(x if own.dtype == torch.int8 else x.sqrt(),
                                   own.dtype == torch.int8)
            own.copy_(codes)
            sharding.local(state[f"{key}_scale"]).copy_(scales)


def _decoded(p: Tensor, codes: Any, scale: Any) -> Tensor:
    """fp32 values of a coded moment; unsigned codes are of the square root."""
    own = sharding.local(codes)
    x = decode(own, sharding.local(scale))
    x = x if own.dtype == torch.int8 else x * x
    return sharding.like(p, x, p.shape) if sharding.is_sharded(codes) else x
