"""An AdamW update of the tensors of the one before: its checks and its table hold again."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lowp.backend import select
from lowp.native import cpu_extension
from lowp.ops.adamw import Table, adamw
from lowp.ops.library import TENSORS, all_plain, nothing_watches
from lowp.ops.update import addresses

_NOTHING = torch.empty(0)


def _same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(values) == len(others) and all(map(operator.is_, values, others))


def _values(states: Sequence[dict[str, Any]]) -> list[Any]:
    return [value for state in states for value in state.values()]


def _fit(tensors: Sequence[Tensor]) -> bool:
    """Whether the CPU kernel can take the tensors as they are."""
    return (set(map(type, tensors)) <= TENSORS and all_plain(tensors)
            and all([t.is_contiguous() for t in tensors]))


class RepeatedUpdate:
    """An update that was made, of plain contiguous CPU tensors, ready to be made again.

    Every step brings other gradients, and what a parameter's memory holds may be replaced, so both
    are looked at each time. A state is the optimizer's own: the same object at the same address is
    taken for unchanged. Its memory is held here, so nothing else can come to lie at that address.
    """

    def __init__(self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]],
                 amsgrad: bool) -> None:
        self.params, self.amsgrad = params, amsgrad
        self.places = addresses(params)
        self.shapes, self.types = [p.shape for p in params], [p.dtype for p in params]
        self.grad_types = [g.dtype for g in grads]
        self.values = _values(states)
        self.tensors = [v for v in self.values if isinstance(v, Tensor)]
        self.held = [t.detach() for t in self.tensors]
        self.written = [*params, *self.tensors]
        self.state_places = addresses(self.tensors)
        self.steps = addresses([s["step"] for s in states])

        def of(key: str) -> list[Tensor]:
            return [s.get(key, _NOTHING) for s in states]

        masters = [s.get("remainder", s.get("compensation", _NOTHING)) for s in states]
        self.table = Table(params, grads, of("exp_avg"), of("exp_avg_sq"), of("exp_avg_scale"),
                           of("exp_avg_sq_scale"), of("max_exp_avg_sq") if amsgrad else [],
                           [s["tensor"] for s in states], [0] * len(params),
                           masters if any(m.numel() for m in masters) else None)

    @staticmethod
    def of(params: list[Tensor], states: list[dict[str, Any]],
           amsgrad: bool) -> RepeatedUpdate | None:
        """Of the update that was just made; None if it is not one to repeat here."""
        grads: list[Any] = [p.grad for p in params]
        if not params or not _fit([*params, *grads]) or \
                not _fit([v for v in _values(states) if isinstance(v, Tensor)]) or \
                any(s["step"].dtype != torch.float32 for s in states):
            return None
        return RepeatedUpdate(params, grads, states, amsgrad)

    def takes(self, params: list[Tensor], states: list[dict[str, Any]], amsgrad: bool) -> bool:
        """Whether an update of these would be this one with other gradients; takes those then."""
        if not (
            amsgrad == self.amsgrad and _same(params, self.params)
            and _same(_values(states), self.values) and nothing_watches()
            and select("adamw", params[0].device, adamw.kernels) == "cpu"
        ):
            return False
        grads: list[Any] = [p.grad for p in params]
        if not (
            _fit(grads) and [g.dtype for g in grads] == self.grad_types
            and [g.shape for g in grads] == self.shapes
            and [p.shape for p in params] == self.shapes
            and [p.dtype for p in params] == self.types
            and all([p.is_contiguous() for p in params]) and addresses(params) == self.places
            and addresses(self.tensors) == self.state_places
        ):
            return False
        self.table.replace_grads(addresses(grads))
        return True

    def run(self, *options: Any) -> None:
        """Make the update; ``options`` are those of :meth:`lowp.ops.adamw.Table.run`."""
        self.table.run(cpu_extension().advance_steps(self.steps), *options)
        increment_version(self.written)
