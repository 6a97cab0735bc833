"""A step inside torch.compile: one op in the graph, which reads the groups' options when it runs.

So no learning rate, beta or weight decay is a constant of the graph, and no change recompiles it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lowp.ops.library import LIBRARY
from lowp.optim import sharding

if TYPE_CHECKING:
    from lowp.optim.optimizer import Optimizer

LIBRARY.define(
    "optimizer_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor? grad_scale, "
    "Tensor? found_inf, int plan) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Plan(NamedTuple):
    """What the lists of a traced step hold."""

    optimizer: weakref.ref[Optimizer]
    entries: list[tuple[int, int, list[str]]]
    """For each parameter its group, its place in the group, and which tensors its state has."""


_plans: dict[int, Plan] = {}
_numbers = itertools.count()


def record(optimizer: Optimizer, params: list[Tensor], grads: list[Tensor],
           states: list[Tensor]) -> int:
    """Append the tensors of a step to the lists; the number of the plan that says what they are."""
    entries = []
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            tensors = {k: v for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
            entries.append((i, j, list(tensors)))
            params.append(p)
            grads.append(p.grad)
            states.extend(tensors.values())
    number = next(_numbers)
    _plans[number] = Plan(weakref.ref(optimizer), entries)
    weakref.finalize(optimizer, _plans.pop, number, None)
    return number


def step(optimizer: Optimizer) -> None:
    """The traced step: this rank's tensors, handed to the op."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    states: list[Tensor] = []
    plan = optimizer._init_group(params, grads, states)
    if not optimizer.elementwise and any(sharding.is_sharded(p) for p in params):
        raise RuntimeError(
            "lowp.optim: torch.compile of a step that gathers sharded parameters is not supported, "
            "since its update is not elementwise; call step() outside the compiled function"
        )
    torch.ops.lowp.optimizer_step(
        [sharding.local(p) for p in params],
        [sharding.local(sharding.placed_as(p, g)) for p, g in zip(params, grads, strict=True)],
        [sharding.local(s) for s in states], getattr(optimizer, "grad_scale", None),
        getattr(optimizer, "found_inf", None), plan,
    )


def _run(params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Tensor],
         grad_scale: Tensor | None, found_inf: Tensor | None, plan: int) -> None:
    """Update the tensors of the graph, which may be copies of the optimizer's."""
    reference, entries = _plans[plan]
    optimizer = reference()
    assert optimizer is not None
    left = iter(states)
    owners = [optimizer.param_groups[i]["params"][j] for i, j, _ in entries]
    scaler = optimizer.scaler(
        [sharding.like(p, g, p.shape) if sharding.is_sharded(p) else g
         for p, g in zip(owners, grads, strict=True)], grad_scale, found_inf)
    for i, own in itertools.groupby(zip(entries, params, grads, strict=True), lambda e: e[0][0]):
        group = optimizer.param_groups[i]
        shares = []
        for (_, j, keys), p, g in own:
            owner = group["params"][j]
            tensors = {key: next(left) for key in keys}
            shares.append(sharding.Share(owner, p, g, {**optimizer.state[owner], **tensors}))
        optimizer.apply(group, shares, scaler)


LIBRARY.impl(
    "optimizer_step", _run, "CompositeExplicitAutograd"
)
torch.library.register_fake("lowp::optimizer_step", lambda *args: None, lib=LIBRARY)
