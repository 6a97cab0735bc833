"""Loading an optimizer's state: by name or position, types and bits kept, sharded as needed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowp.ops.update import scale_shape
from lowp.optim import sharding

if TYPE_CHECKING:
    from lowp.optim.optimizer import Optimizer

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
_OF_PARAMS = ("params", "param_names")


def canonical_names(groups: Sequence[dict[str, Any]]) -> list[list[str]] | None:
    """Every group's parameter names without what wrappers add; None unless each group has names.

    torch.compile, activation checkpointing and FSDP1 add a component anywhere, and
    DistributedDataParallel a ``module.`` before all.
    """
    if not all("param_names" in group for group in groups):
        return None
    names = [[_WRAPPERS.sub("", name) for name in group["param_names"]] for group in groups]
    if all(name.startswith("module.") for own in names for name in own):
        return [[name.removeprefix("module.") for name in own] for own in names]
    return names


def load(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """What :meth:`lowp.optim.optimizer.Optimizer.load_state_dict` does, hooks included."""
    state_dict = dict(state_dict)
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        adapted = before(optimizer, state_dict)
        state_dict = state_dict if adapted is None else adapted
    groups, kept = aligned(optimizer, state_dict)
    states: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    states.update((p, _restored(optimizer, p, state)) for p, state in kept)
    optimizer.__setstate__({"state": states, "param_groups": groups})
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def aligned(optimizer: Optimizer, state_dict: dict[str, Any],
            ) -> tuple[list[dict[str, Any]], list[tuple[Tensor, dict[str, Any]]]]:
    """The groups with their saved options, and each parameter's saved state.

    Raises:
        ValueError: names or sizes that do not match.
    """
    saved = deepcopy(state_dict["param_groups"])
    groups = optimizer.param_groups
    ours, theirs = canonical_names(groups), canonical_names(saved)
    # torch.distributed.checkpoint brings its groups into this optimizer's order, under names in
    # "params", but leaves "param_names" as they were saved.
    ordered = any(isinstance(i, str) for group in saved for i in group["params"])
    if ours is None or theirs is None or ordered:
        sizes = [[len(g["params"]) for g in side] for side in (groups, saved)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{_of(optimizer)}: the optimizer's groups have {sizes[0]} parameters, "
                f"the state's {sizes[1]}; only states saved from named_parameters() load into "
                "another grouping"
            )
        ids, sources = [g["params"] for g in saved], saved
    else:
        ids, sources = _by_name(optimizer, saved, ours, theirs)
    merged = [
        {**group, **{k: v for k, v in source.items() if k not in _OF_PARAMS}}
        for group, source in zip(groups, sources, strict=True)
    ]
    for group, source in zip(merged, sources, strict=True):
        if "param_names" in source:
            group.setdefault("param_names", source["param_names"])
    states = [
        (p, state_dict["state"][i])
        for group, own in zip(groups, ids, strict=True)
        for p, i in zip(group["params"], own, strict=True)
        if state_dict["state"].get(i)
    ]
    return merged, states


def _of(optimizer: Optimizer) -> str:
    return f"lowp.optim.{type(optimizer).__name__}.load_state_dict"


def _by_name(optimizer: Optimizer, saved: list[dict[str, Any]], ours: list[list[str]],
             theirs: list[list[str]]) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """For each group the saved ids of its parameters, and the saved group of its options."""
    where = {
        name: (group, i)
        for group, names in zip(saved, theirs, strict=True)
        for name, i in zip(names, group["params"], strict=True)
    }
    wanted = {name for names in ours for name in names}
    for what, odd in (("does not have", wanted - set(where)),
                      ("has more than the optimizer:", set(where) - wanted)):
        if odd:
            raise ValueError(f"{_of(optimizer)}: the state {what} {', '.join(sorted(odd))}")
    ids, sources = [], []
    for group, names in zip(optimizer.param_groups, ours, strict=True):
        found = [where[name] for name in names]
        options = [{k: v for k, v in g.items() if k not in _OF_PARAMS} for g, _ in found]
        if any(o != options[0] for o in options):
            raise ValueError(
                f"{_of(optimizer)}: the group of {', '.join(names)} was saved in groups whose "
                "options differ; group the parameters as they were"
            )
        ids.append([i for _, i in found])
        sources.append(options[0] if options else group)
    return ids, sources


def _restored(optimizer: Optimizer, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    if "step" not in state or "tensor" not in state:
        raise ValueError(
            f"{_of(optimizer)}: a state must have 'step' and 'tensor', got "
            f"{', '.join(map(str, state))}; lowp.optim.from_torch converts torch.optim's states"
        )
    result: dict[str, Any] = {}
    for key, value in state.items():
        if key == "step":
            step = torch.as_tensor(sharding.whole(value), dtype=torch.float32).detach()
            result[key] = step.clone().cpu()
        elif isinstance(value, Tensor):
            result[key] = placed(optimizer, p, key, value.detach())
        else:
            result[key] = deepcopy(value)
    return result


def placed(optimizer: Optimizer, p: Any, key: str, value: Any) -> Tensor:
    """A copy of a state on its parameter's device, sharded as the parameter is."""
    shapes = (tuple(p.shape), scale_shape(p))
    if optimizer.elementwise and value.dim() and tuple(value.shape) not in shapes:
        raise ValueError(
            f"{_of(optimizer)}: {key} of a parameter of shape {shapes[0]} must have that shape "
            f"(scales: {shapes[1]}), got {tuple(value.shape)}"
        )
    if not (optimizer.elementwise and value.dim() and sharding.is_sharded(p)):
        plain = sharding.whole(value).to(sharding.local(p).device, copy=True)
        return plain.contiguous()  # type: ignore[no-any-return]
    if sharding.is_sharded(value) and value.device_mesh == p.device_mesh \
            and value.placements == p.placements:
        own = value.to_local()
    else:
        own = sharding.block_of(p, value.shape).of(sharding.whole(value))
    own = own.to(p.to_local().device, copy=True).contiguous()
    return sharding.like(p, own, value.shape)
