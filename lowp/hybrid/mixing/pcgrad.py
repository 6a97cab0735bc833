"""Gradients without what works against another objective."""

from __future__ import annotations

from collections.abc import Sequence

from lowp.hybrid.gradients import Vector, dot, total
from lowp.hybrid.random import permutation
from lowp.key import clock, tensor_id


def without_conflicts(gradients: Sequence[Vector], seed: int = 0) -> Vector:
    """``Σ_i g_i``, each g_i without its part against any other: ``g_i -= (g_i·g_j / ‖g_j‖²) g_j``.

    Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020, algorithm 1: for each i,
    the others j in a random order, here keyed by (seed, step, i), where ``g_i·g_j < 0`` for the g_i
    that is left so far and the whole g_j.
    """
    squares = [dot(g, g) for g in gradients]
    projected = []
    for i, whole in enumerate(gradients):
        own = dict(whole)
        order = permutation(len(gradients), seed, int(clock.step), tensor_id(f"pcgrad/{i}"))
        for j in order.tolist():
            against = dot(own, gradients[j]) if j != i else 0.0
            if against < 0:
                factor = against / squares[j]
                for index, tensor in gradients[j].items():
                    part = factor * tensor
                    own[index] = own[index] - part if index in own else -part
        projected.append(own)
    return total(projected)
