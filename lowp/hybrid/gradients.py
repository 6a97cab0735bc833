"""The gradients of one step: of all objectives together, or of each for itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowp.hybrid import ranks, sharding

BUCKET = 1 << 24  # elements that are summed over the ranks at a time: 64 MiB of fp32
Vector = dict[int, Tensor]  # a gradient: parameter's index to fp32 tensor; those missing are 0


def dot(a: Vector, b: Vector) -> float:
    """The inner product of two gradients, elements multiplied in fp32 and summed in fp64."""
    products = [(a[i] * b[i]).sum(dtype=torch.float64) for i in sorted(a.keys() & b.keys())]
    return math.fsum(float(p) for p in products)


def norm(a: Vector) -> float:
    """The Euclidean norm, of fp32 norms of the tensors."""
    return length([a[i] for i in sorted(a)])


def length(tensors: list[Tensor]) -> float:
    """The Euclidean norm of all of them together, of their fp32 norms."""
    if not tensors:
        return 0.0
    parts = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return math.sqrt(math.fsum(float(p) ** 2 for p in parts))


def total(vectors: Sequence[Vector]) -> Vector:
    """The sum, in the order given."""
    result: Vector = {}
    for vector in vectors:
        for index, tensor in vector.items():
            result[index] = result[index] + tensor if index in result else tensor
    return result


class _PassNorms:
    """The norm of what one backward pass adds to the gradients, exactly and without a copy.

    A hook on a leaf sees the gradient of this pass before it is added to those of earlier ones.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._norms: dict[int, Tensor] = {}
        for index, parameter in enumerate(parameters):
            parameter.register_hook(
                lambda grad, index=index: self._see(index, grad)
            )

    def _see(self, index: int, grad: Tensor) -> None:
        self._norms[index] = torch.linalg.vector_norm(grad.detach(), dtype=torch.float32)

    def take(self) -> float:
        """The norm since the last call; in the order of the parameters, so it repeats itself."""
        norms = [float(self._norms[index]) for index in sorted(self._norms)]
        self._norms.clear()
        return math.sqrt(math.fsum(norm * norm for norm in norms))


class Gradients:
    """Adds up what the passes of a step leave in ``.grad``.

    With one part a step, ``.grad`` itself holds the sum over the objectives, in the weights' type.
    With several, sums are fp32 and rounded to the weights' type once (4 bytes a weight); with
    ``separate`` there is one such sum for each objective.

    Args:
        parameters: what is trained.
        terms: number of objectives.
        parts: passes of each objective in a step.
        separate: keep each objective's own gradient.
    """

    def __init__(self, parameters: Sequence[Tensor], terms: int, parts: int = 1,
                 separate: bool = False) -> None:
        self.parameters, self.terms, self.separate = parameters, terms, separate
        self.in_place = parts == 1 and not separate
        self.is_sharded = sharding.is_sharded(parameters)
        self.sums: list[Vector] = []
        self._norms = _PassNorms(parameters) if self.in_place else None
        self.begin()

    def begin(self) -> None:
        """Forget everything."""
        for parameter in self.parameters:
            parameter.grad = None
        self.sums = [{} for _ in range(self.terms if self.separate else 1)]
        if self._norms is not None:
            self._norms.take()

    def collect(self, term: int) -> float | None:
        """After a backward pass: the norm of what it added, where that is known already."""
        if self._norms is not None:
            own = self._norms.take()
            return None if ranks.is_parallel() else own
        into = self.sums[term if self.separate else 0]
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            grad, parameter.grad = sharding.local(parameter.grad).float(), None
            if index in into:
                into[index] += grad
            else:
                into[index] = grad
        return None

    def reduce(self) -> None:
        """Sum over the ranks, in fp32; of sharded weights the backward passes did that."""
        if self.is_sharded:
            return
        if self.in_place and ranks.is_parallel():
            grads = {i: p.grad.float() for i, p in enumerate(self.parameters) if p.grad is not None}
            self.sums = [self._over_ranks(grads)]
        elif ranks.is_parallel():
            self.sums = [self._over_ranks(vector) for vector in self.sums]

    def _over_ranks(self, vector: Vector) -> Vector:
        here = torch.zeros(len(self.parameters), device=self.parameters[0].device)
        here[list(vector)] = 1
        wanted = ranks.total(here).nonzero().flatten().tolist()
        result: Vector = {}
        bucket: list[int] = []
        size = 0
        for index in wanted:
            bucket.append(index)
            size += self.parameters[index].numel()
            if size >= BUCKET or index == wanted[-1]:
                flat = torch.cat([
                    vector[i].flatten() if i in vector else self._nothing(i) for i in bucket
                ])
                parts = ranks.total(flat).split([self.parameters[i].numel() for i in bucket])
                for i, part in zip(bucket, parts, strict=True):
                    result[i] = part.view(self.parameters[i].shape)
                bucket, size = [], 0
        return result

    def _nothing(self, index: int) -> Tensor:
        parameter = self.parameters[index]
        return torch.zeros(parameter.numel(), device=parameter.device)

    def finish(self, combine: Callable[[list[Vector]], Vector] = total) -> None:
        """Put the sum into ``.grad``, rounded once; the sums are dropped."""
        if self.in_place and (self.is_sharded or not ranks.is_parallel()):
            return
        for index, tensor in combine(self.sums).items():
            parameter = self.parameters[index]
            parameter.grad = sharding.like(tensor.to(parameter.dtype), parameter)
        self.sums = []

    def clip(self, limit: float) -> float:
        """Scale ``.grad`` to norm ``limit`` if its is larger; the norm, summed in fp32."""
        grads = [sharding.local(p.grad) for p in self.parameters if p.grad is not None]
        whole = length(grads)
        if self.is_sharded:
            squares = ranks.total_of(torch.tensor(whole, dtype=torch.float64).square())
            whole = math.sqrt(float(squares))
        if math.isfinite(whole) and whole > limit:
            torch._foreach_mul_(grads, limit / whole)
        return whole

    def state_dict(self) -> dict[str, Any]:
        """What the parts so far have added."""
        grads = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
        return {"grads": grads if self.in_place else {}, "sums": list(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.begin()
        for index, grad in state["grads"].items():
            self.parameters[index].grad = grad.clone()
        self.sums = [{i: t.clone() for i, t in vector.items()} for vector in state["sums"]]
