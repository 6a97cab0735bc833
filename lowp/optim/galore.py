"""GaLore: any optimizer on gradients projected to a low rank, so that its states are small."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowp.key import Role, clock, tensor_id
from lowp.low_rank import svd
from lowp.ops.library import FLOATS
from lowp.ops.sgd import sgd
from lowp.optim.optimizer import Optimizer
from lowp.reference.philox import draws

_OWN = ("params", "param_names", "initial_lr", "lr", "weight_decay", "rank", "update_interval",
        "scale", "basis", "rounding", "seed")


def random_basis(size: int, rank: int, seed: int, step: int, tensor: int) -> Tensor:
    """Orthonormal columns [size, rank] in fp32 that depend on the arguments alone.

    Gaussian values of the draws of :class:`lowp.key.Role` PROJECTION (Box and Muller, 1958), made
    orthonormal by QR with R's diagonal positive: uniform over the Stiefel manifold (Mezzadri, "How
    to generate random matrices from the classical compact groups", 2007, section 4).
    """
    count = size * rank
    bits = draws(seed, step, tensor, Role.PROJECTION, 2 * count).double().view(2, count)
    radius = (-2 * ((bits[0] + 0.5) / 65536).log()).sqrt()
    gaussian = radius * (2 * math.pi * bits[1] / 65536).cos()
    q, r = torch.linalg.qr(gaussian.view(size, rank))
    basis: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return basis.float()


class GaLore(torch.optim.Optimizer):
    """Wraps an optimizer; matrices are updated in a subspace of their shorter side.

    Every ``update_interval`` updates each matrix gets a new orthonormal basis P [m, r] of its
    shorter side m; in between, with g [m, n] the gradient (turned if m is its second side)::

        z = the wrapped optimizer's update for Pᵀ g [r, n], at the group's rate
        p = p (1 - lr weight_decay) + scale P z

    in fp32 with one rounding on the store (Zhao et al., "GaLore", ICML 2024, algorithm 2; states in
    an old basis are kept, as there). Other parameters go to the wrapped optimizer as they are, and
    so does a matrix of which m is at most the rank.

    Args:
        params: as any torch optimizer takes them; with names, these key the random bits.
        optimizer: the class to wrap, such as ``lowp.optim.AdamW``, made from groups, ``lr`` and
            ``options``.
        lr: learning rate, also the wrapped optimizer's.
        weight_decay: decoupled and of the whole weight; other parameters get it as the wrapped
            optimizer means it.
        rank: r.
        update_interval: updates between two bases.
        scale: α of the paper, 0.25 there.
        basis: ``"random"``, a function of (seed, update, tensor), hence the same on every rank and
            after a resume and never stored; or ``"svd"``, the r first left singular vectors of the
            gradient, of fixed signs, kept in the state.
        rounding: of 16-bit matrices, ``"stochastic"`` or ``"nearest"``.
        seed: of basis and rounding.
        options: more arguments of the wrapped optimizer; one of lowp's gets rounding and seed too.

    Raises:
        ValueError: an option out of range. TypeError: a matrix that is sharded (a DTensor), whose
            projection would need the other shards, or a type other than fp32, bf16 and fp16.
    """

    def __init__(self, params: Any, optimizer: type[torch.optim.Optimizer], lr: float = 1e-3, *,
                 weight_decay: float = 0.0, rank: int = 128, update_interval: int = 200,
                 scale: float = 0.25, basis: str = "random", rounding: str = "stochastic",
                 seed: int = 0, options: Mapping[str, Any] | None = None) -> None:
        if rank < 1 or update_interval < 1:
            raise ValueError("lowp.optim.GaLore: rank and update_interval must be at least 1, got "
                             f"{rank} and {update_interval}")
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("scale", scale)):
            if not 0 <= value < math.inf:
                raise ValueError(f"lowp.optim.GaLore: {name} must be at least 0, got {value}")
        for name, choice, choices in (("basis", basis, ("random", "svd")),
                                      ("rounding", rounding, ("nearest", "stochastic"))):
            if choice not in choices:
                raise ValueError(f"lowp.optim.GaLore: {name} must be {' or '.join(choices)}, "
                                 f"got {choice!r}")
        self.inner: torch.optim.Optimizer | None = None
        super().__init__(params, {
            "lr": lr, "weight_decay": weight_decay, "rank": rank, "scale": scale, "basis": basis,
            "update_interval": update_interval, "rounding": rounding, "seed": seed,
        })
        self._cores: dict[Tensor, nn.Parameter] = {}
        self._bases: dict[Tensor, tuple[int, Tensor]] = {}
        self._places: list[tuple[int, bool]] = []  # of a wrapped group: whose it is, and projected
        more = dict(options or {})
        if issubclass(optimizer, Optimizer):
            more = {"rounding": rounding, "seed": seed, **more}
        self.inner = optimizer(self._wrapped_groups(), lr=lr, **more)  # type: ignore[call-arg]
        for cycled in ("betas", "momentum"):  # what torch's schedulers look for
            if cycled in self.inner.defaults:
                self.defaults[cycled] = self.inner.defaults[cycled]
                for group in self.param_groups:
                    group.setdefault(cycled, self.inner.defaults[cycled])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but only while the optimizer is made.

        Raises:
            RuntimeError: afterwards, for the wrapped optimizer has its groups already.
        """
        if self.inner is not None:
            raise RuntimeError("lowp.optim.GaLore: groups cannot be added to a made optimizer; "
                               "make a new one")
        super().add_param_group(param_group)

    def _wrapped_groups(self) -> list[dict[str, Any]]:
        """Each group's parameters, matrices as their small stand-ins in a group of their own."""
        groups: list[dict[str, Any]] = []
        position = 0
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names")
            members: dict[bool, list[Any]] = {False: [], True: []}
            for index, p in enumerate(group["params"]):
                projected = p.dim() == 2 and min(p.shape) > group["rank"]
                inner = p
                if projected:
                    _check(p)
                    inner = nn.Parameter(torch.zeros(group["rank"], max(p.shape), device=p.device))
                    self._cores[p] = inner
                    key = tensor_id(names[index]) if names else position
                    self.state[p].update(step=torch.zeros(()), tensor=key)
                members[projected].append((names[index], inner) if names else inner)
                position += 1
            for projected, found in members.items():
                if found:
                    self._places.append((number, projected))
                    groups.append({"params": found, **_wrapped_options(group, projected)})
        return groups

    def _basis(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """P [m, r] of this update; a new one at the first update of each interval."""
        state = self.state[p]
        updates = int(state["step"])
        first = updates - updates % group["update_interval"]
        if group["basis"] == "svd":
            if updates == first:
                state["basis"] = svd(grad)[0][:, : group["rank"]].float().contiguous()
            kept: Tensor = state["basis"]
            return kept
        if p not in self._bases or self._bases[p][0] != first:
            made = random_basis(grad.shape[0], group["rank"], group["seed"], first + 1,
                                state["tensor"])
            self._bases[p] = first, made.to(p.device)
        return self._bases[p][1]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss under ``torch.enable_grad()``.

        Returns:
            what the closure returned, or ``None``.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        assert self.inner is not None
        for (number, projected), inner in zip(self._places, self.inner.param_groups, strict=True):
            inner.update(_wrapped_options(self.param_groups[number], projected))
        updated: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p in self._cores and p.grad is not None:
                    grad = p.grad.float() if p.shape[0] <= p.shape[1] else p.grad.float().t()
                    basis = self._basis(p, grad, group)
                    self._cores[p].grad = basis.t() @ grad
                    updated.append((p, basis, group))
        with clock.held():  # one update is applied, which this optimizer's own step counts
            self.inner.step()
        for p, basis, group in updated:
            self._store(p, basis, group)
        return loss

    def _store(self, p: Tensor, basis: Tensor, group: dict[str, Any]) -> None:
        """``p (1 - lr wd) + scale P z``, the stand-in back at 0."""
        core, state = self._cores[p], self.state[p]
        update = (basis @ core) * -group["scale"]
        decay = float(group["lr"]) * group["weight_decay"]
        sgd([p], [update if p.shape[0] <= p.shape[1] else update.t()], [], [], [state["step"]],
            torch.ones(()), 0.0, 0.0, decay, False, False, group["rounding"], group["rounding"],
            group["seed"], [state["tensor"]], [0], None, None)
        core.zero_()
        core.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the wrapped optimizer's under ``inner``."""
        assert self.inner is not None
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same bits; the bases are those of the saved counts."""
        assert self.inner is not None
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "inner"})
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):  # torch casts states to the parameter's type
                    device = value.device if key == "step" else p.device
                    self.state[p][key] = value.detach().clone().to(device)
        self._bases.clear()
        self.inner.load_state_dict(state_dict["inner"])
        applied = [int(s["step"]) for o in (self, self.inner) for s in o.state.values()
                   if "step" in s]
        clock.set(max(applied, default=0) + 1)


def _check(p: Tensor) -> None:
    if hasattr(p, "to_local"):
        raise TypeError("lowp.optim.GaLore: expected whole matrices, got a DTensor of shape "
                        f"{tuple(p.shape)}; use DDP, or give sharded parameters to another "
                        "optimizer")
    if p.dtype not in FLOATS:
        raise TypeError("lowp.optim.GaLore: parameters must be float32, bfloat16 or float16, "
                        f"got {p.dtype}")


def _wrapped_options(group: dict[str, Any], projected: bool) -> dict[str, Any]:
    """A group's options as the wrapped optimizer gets them; decay of a matrix is not its own."""
    kept = {k: v for k, v in group.items() if k not in _OWN}
    decay = 0.0 if projected else group["weight_decay"]
    return {**kept, "lr": group["lr"], "weight_decay": decay}
