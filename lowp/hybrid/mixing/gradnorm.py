"""Weights that balance the gradients' norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowp.hybrid.gradients import Vector, norm
from lowp.hybrid.mixing.mixing import Mixing, check_names

LEAST = 1e-3  # of a weight: at 0 it would have no gradient any more


class GradNorm(Mixing):
    """Factors c_k, of sum K, for which ``G_k = ‖∇_W w_k c_k L_k‖`` comes near ``Ḡ r_k^α``.

    Chen et al., "GradNorm", ICML 2018, section 3, equations 1 and 2, algorithm 1: Ḡ is the mean of
    the G_k, ``r_k = (L_k / L_k(0)) / mean`` the inverse training rate, L_k(0) the first loss; the
    targets are constants, so c_k moves by ``-lr · sign(G_k - target) · G_k / c_k``; then the c_k
    are scaled to sum K and none is below 0.001. W are the weights that every objective's gradient
    reaches, unless they are given. A step in which not all objectives were computed moves nothing.

    Args:
        names: of the objectives that are balanced; the others keep their weights.
        alpha: strength of the balance, at least 0; 1.5 by default.
        lr: step size; 0.025 by default.
        shared: indices of W among the trained parameters.

    Raises:
        ValueError: fewer than two names or one twice, or a number out of range.
    """

    separate = True

    def __init__(self, names: Sequence[str], alpha: float = 1.5, lr: float = 0.025,
                 shared: Sequence[int] | None = None) -> None:
        check_names("GradNorm", names, 2)
        if not (math.isfinite(alpha) and alpha >= 0 and math.isfinite(lr) and lr > 0):
            raise ValueError("lowp.hybrid.GradNorm: expected alpha >= 0 and lr > 0, "
                             f"got {alpha} and {lr}")
        self.alpha, self.lr = alpha, lr
        self.shared = None if shared is None else list(shared)
        self.factors = dict.fromkeys(names, 1.0)
        self.first: dict[str, float] = {}

    def factor(self, name: str) -> float:
        """c, or 1."""
        return self.factors.get(name, 1.0)

    def update(self, losses: Mapping[str, float], gradients: Mapping[str, Vector]) -> None:
        """One step of descent in the c_k."""
        names = list(self.factors)
        for name in names:
            if losses.get(name, 0.0) > 0:
                self.first.setdefault(name, losses[name])
        if any(name not in gradients or name not in self.first for name in names):
            return
        shared = self.shared
        if shared is None:
            shared = sorted(set.intersection(*(set(gradients[name]) for name in names)))
        norms = {n: norm({i: gradients[n][i] for i in shared if i in gradients[n]}) for n in names}
        rates = {name: losses[name] / self.first[name] for name in names}
        mean_norm = sum(norms.values()) / len(names)
        mean_rate = sum(rates.values()) / len(names)
        if mean_rate == 0:
            return
        moved = {}
        for name in names:
            target = mean_norm * (rates[name] / mean_rate) ** self.alpha
            slope = norms[name] / self.factors[name]
            sign = (norms[name] > target) - (norms[name] < target)
            moved[name] = max(LEAST, self.factors[name] - self.lr * sign * slope)
        scale = len(names) / sum(moved.values())
        self.factors = {name: factor * scale for name, factor in moved.items()}

    def metrics(self) -> dict[str, float]:
        """``factor/<name>``."""
        return {f"factor/{name}": factor for name, factor in self.factors.items()}

    def state_dict(self) -> dict[str, Any]:
        """The factors and first losses."""
        return {"factors": dict(self.factors), "first": dict(self.first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.factors, self.first = dict(state["factors"]), dict(state["first"])
