"""What the optimizers share: ids of tensors, types of states, shards, gradient scalers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lowp.key import clock, is_idle, tensor_id
from lowp.ops.library import FLOATS
from lowp.ops.update import scale_shape
from lowp.optim import compiled, sharding
from lowp.optim.norm import gradient_norm
from lowp.optim.sharding import Share
from lowp.optim.state import canonical_names, load

_STATE_DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8,
}
INT8_MIN_NUMEL = 4096
"""Tensors with fewer elements keep fp32 states under ``state_dtype="int8"``, which costs little and
spares biases and norms the coding error. So do vectors: sharding one cuts its only row, and a block
of codes must not lie on two ranks."""


class Batch(NamedTuple):
    """The parameters of one group that have a gradient, with their states; this rank's part."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    offsets: list[int]
    """Global index of each one's first element."""
    owners: list[dict[str, Any]]
    """The state that each one's state is, or is a part of."""

    def of(self, key: str) -> list[Tensor]:
        """One state of every parameter; an empty tensor where it has none."""
        return [s.get(key, _NOTHING) for s in self.states]

    @property
    def masters(self) -> list[Tensor] | None:
        """What the parameters lack; ``None`` if they all lack nothing."""
        found = [s.get("remainder", s.get("compensation", _NOTHING)) for s in self.states]
        return found if any(m.numel() for m in found) else None

    @property
    def ids(self) -> list[int]:
        """The tensor ids that key the draws."""
        return [s["tensor"] for s in self.states]


_NOTHING = torch.empty(0)


@functools.cache
def _has_scales(keys: tuple[str, ...]) -> bool:
    """Whether a state of these entries holds codes."""
    return any(key.endswith("_scale") for key in keys)


class Optimizer(torch.optim.Optimizer):
    """Base of the optimizers; see :class:`lowp.optim.AdamW` for the keyword-only extras.

    Every parameter's state holds ``step`` (0-dim fp32) and ``tensor`` (its 32-bit id). With
    ``named_parameters()`` the id is the crc32 of the name, else the position; the kept one wins.
    """

    _step_supports_amp_scaling = True  # a gradient scaler hands over grad_scale and found_inf
    elementwise: ClassVar[bool] = True
    """Whether an element's update depends on that element alone. If not, every rank gathers the
    gradient and the parameter, updates all of it, keeps whole states and writes back its shard."""
    grad_scale: Tensor | None
    found_inf: Tensor | None
    applied = True
    """False from a step that only made the states until the clock has taken note of it."""

    def __init__(self, params: Any, defaults: dict[str, Any], *, rounding: str,
                 state_rounding: str | None, state_dtype: str | torch.dtype | None,
                 seed: int, master: str | None, clip_grad_norm: float | None,
                 foreach: bool | None = None, fused: bool | None = None,
                 differentiable: bool = False) -> None:
        name = type(self).__name__
        if master not in (None, "remainder", "kahan"):
            raise ValueError(
                f"lowp.optim.{name}: master must be None, 'remainder' or 'kahan', got {master!r}"
            )
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(
                f"lowp.optim.{name}: clip_grad_norm must be None or above 0, got {clip_grad_norm}"
            )
        for option, value in (("rounding", rounding), ("state_rounding", state_rounding)):
            if value not in ("nearest", "stochastic") and not (
                option == "state_rounding" and value is None
            ):
                raise ValueError(
                    f"lowp.optim.{name}: {option} must be 'nearest' or 'stochastic', got {value!r}"
                )
        if differentiable:
            raise ValueError(
                f"lowp.optim.{name}: differentiable=True is not supported: the update is one "
                "fused kernel that rounds"
            )
        if foreach and fused:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        defaults.update(
            foreach=foreach, fused=fused, differentiable=False, rounding=rounding,
            state_rounding=state_rounding, state_dtype=self._state_dtype_name(state_dtype),
            seed=seed, master=master, clip_grad_norm=clip_grad_norm,
        )
        super().__init__(params, defaults)

    def _state_dtype_name(self, dtype: str | torch.dtype | None) -> str | None:
        if dtype is None or dtype in _STATE_DTYPES:
            return dtype
        for name, known in _STATE_DTYPES.items():
            if dtype == known:
                return name
        raise ValueError(
            f"lowp.optim.{type(self).__name__}: state_dtype must be None (as the parameter), "
            f"'fp32', 'bf16', 'fp16', 'int8' or that torch.dtype, got {dtype!r}"
        )

    def ids_of(self, group: dict[str, Any]) -> list[int]:
        """The 32-bit id that keys the draws of each of the group's parameters."""
        index = next(i for i, g in enumerate(self.param_groups) if g is group)
        names = canonical_names(self.param_groups)
        if names is not None:
            return [tensor_id(name) for name in names[index]]
        first = sum(len(g["params"]) for g in self.param_groups[:index])
        return list(range(first, first + len(group["params"])))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; ``master="remainder"`` is for bfloat16 parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        halves = any(p.dtype == torch.float16 for p in group["params"])
        if group["master"] == "remainder" and halves:
            raise ValueError(
                f"lowp.optim.{type(self).__name__}: master='remainder' is for bfloat16 parameters; "
                "float16 lacks exponents, not only bits: use master='kahan'"
            )

    def new_state(self, group: dict[str, Any], index: int) -> dict[str, Any]:
        """What the state of a parameter begins with; its id is added to it."""
        p = group["params"][index]  # the CUDA kernels count on the device, so that nothing waits
        device = p.device if p.is_cuda else None
        return {"step": torch.zeros((), dtype=torch.float32, device=device)}

    def add_moment(self, state: dict[str, Any], key: str, p: Tensor, group: dict[str, Any],
                   codes: torch.dtype) -> None:
        """A zero moment of the group's state type, with its scales if that is ``codes``."""
        name = group["state_dtype"]
        dtype = p.dtype if name is None else _STATE_DTYPES[name]
        if dtype == torch.int8:
            large = p.dim() > 1 and p.numel() >= INT8_MIN_NUMEL
            dtype = codes if large else torch.float32
        state[key] = self.zeros(p, p.shape, dtype)
        if dtype == codes:
            if self.elementwise:
                sharding.require_whole_blocks(f"lowp.optim.{type(self).__name__}", p)
            state[f"{key}_scale"] = self.zeros(p, scale_shape(p), torch.float32)

    def zeros(self, p: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A zero state of global ``shape``, sharded as ``p`` is if the update is elementwise."""
        if self.elementwise:
            return sharding.zeros(p, shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=sharding.local(p).device)

    def add_master(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        """What a 16-bit parameter lacks, by the group's ``master``: nothing yet."""
        if group["master"] == "remainder" and p.dtype == torch.bfloat16:
            state["remainder"] = self.zeros(p, p.shape, torch.int16)
        elif group["master"] == "kahan" and p.dtype != torch.float32:
            state["compensation"] = self.zeros(p, p.shape, p.dtype)

    def first_state(self, p: Tensor, group: dict[str, Any], index: int,
                    tensor: int) -> dict[str, Any]:
        """Everything that is kept of a parameter, before its first update."""
        state = {**self.init_state(p, group, index), "tensor": tensor}
        self.add_master(state, p, group)
        return state

    def init_state(self, p: Tensor, group: dict[str, Any], index: int) -> dict[str, Any]:
        """The moments of a parameter before its first update, behind :meth:`new_state`."""
        raise NotImplementedError

    def update(self, group: dict[str, Any], batch: Batch, lr: Tensor, rounding: tuple[str, str],
               scaler: tuple[Tensor | None, Tensor | None]) -> None:
        """One update of a batch whose states have one type."""
        raise NotImplementedError

    def start(self, group: dict[str, Any]) -> list[Tensor]:
        """The group's parameters that have a gradient; each now has a state."""
        ids: list[int] = []
        found: list[Tensor] = []
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            found.append(p)
            if self.state[p]:
                continue
            if p.is_complex():
                raise RuntimeError(
                    f"lowp.optim.{type(self).__name__} does not support complex parameters"
                )
            if p.dtype not in FLOATS:
                raise TypeError(
                    f"lowp.optim.{type(self).__name__}: parameters must be float32, bfloat16 or "
                    f"float16, got {p.dtype}"
                )
            ids = ids or self.ids_of(group)
            self.state[p].update(self.first_state(p, group, i, ids[i]))
        return found

    def _init_group(self, params: list[Tensor], grads: list[Tensor], states: list[Tensor]) -> int:
        """Start every state, list all tensors of the step, and return its plan for the graph.

        torch.compile runs an optimizer's method of this name while it traces, and takes what it put
        into the lists for inputs of the graph.
        """
        for group in self.param_groups:
            self.start(group)
        return compiled.record(self, params, grads, states)

    def _batches(self, group: dict[str, Any], shares: Iterable[Share]) -> Iterator[Batch]:
        """The shares by device and by whether their states are codes."""
        batches: dict[tuple[torch.device, bool], Batch] = {}
        by_run = "stochastic" in self._roundings(group) and self.elementwise
        for share in shares:
            if share.grad.is_sparse:
                raise RuntimeError(
                    f"lowp.optim.{type(self).__name__} does not support sparse gradients"
                )
            key = share.param.device, _has_scales(tuple(share.state))
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = Batch([], [], [], [], [])
            for piece in share.pieces(by_run):
                batch.params.append(piece.param)
                batch.grads.append(piece.grad)
                batch.states.append(piece.state)
                batch.offsets.append(piece.offset)
                batch.owners.append(share.state)
        yield from batches.values()

    def _roundings(self, group: dict[str, Any]) -> tuple[str, str]:
        """Of weights and of states."""
        rounding = group["rounding"]
        return rounding, group["state_rounding"] or rounding

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        A first step whose learning rates and gradients are all 0 makes the states and nothing else:
        torch.distributed.checkpoint takes such steps to learn what there is to load.

        Args:
            closure: recomputes the loss under ``torch.enable_grad()``.

        Returns:
            what the closure returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            compiled.step(self)
            return loss
        self.applied = bool(self.state) or not is_idle(self)
        found = [self.start(group) for group in self.param_groups]
        if not self.applied:
            return loss
        scaler = self.scaler((p.grad for params in found for p in params),
                             getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        for index, params in enumerate(found):
            self.step_group(index, params, scaler)
        return loss

    def step_group(self, index: int, params: list[Tensor],
                   scaler: tuple[Tensor | None, Tensor | None]) -> None:
        """Update all of a group's parameters that have a gradient."""
        self.step_params(self.param_groups[index], params, scaler)

    def step_params(self, group: dict[str, Any], params: Iterable[Tensor],
                    scaler: tuple[Tensor | None, Tensor | None]) -> None:
        """Update some of a group's parameters, all with a gradient and a state."""
        shares = [sharding.share_of(p, p.grad, self.state[p], self.elementwise) for p in params]
        self.apply(group, shares, scaler)
        if not self.elementwise:
            sharding.scatter(shares)

    def apply(self, group: dict[str, Any], shares: Sequence[Share],
              scaler: tuple[Tensor | None, Tensor | None]) -> None:
        """Update this rank's shares of a group's parameters."""
        lr = torch.as_tensor(group["lr"], dtype=torch.float64)
        for batch in self._batches(group, shares):
            self.update(group, batch, lr, self._roundings(group), scaler)
            for state, owner in zip(batch.states, batch.owners, strict=True):
                if state is not owner:  # one of several runs, with a step of its own
                    owner["step"].copy_(state["step"])
        # A DTensor has a version beside that of its local elements, and so has what a graph copied.
        increment_version([s.owner for s in shares if s.owner is not s.param])

    @torch.no_grad()
    def step_parameter(self, p: Tensor) -> None:
        """Update one parameter by its gradient; the clock stands still until :meth:`step`.

        Raises:
            ValueError: the optimizer does not have it.
        """
        for group in self.param_groups:
            if any(member is p for member in group["params"]):
                self.start(group)
                self.step_params(group, [p], (None, None))
                return
        raise ValueError(
            f"lowp.optim.{type(self).__name__}.step_parameter: p is none of its parameters"
        )

    def scaler(self, grads: Iterable[Any], grad_scale: Tensor | None, found_inf: Tensor | None,
               ) -> tuple[Tensor | None, Tensor | None]:
        """What gradients are divided by, and whether a gradient scaler found Inf or NaN.

        Clipping (Pascanu et al., "On the difficulty of training recurrent neural networks", ICML
        2013, algorithm 1) is a part of the divisor, so no gradient is written or rounded for it.
        """
        most = self.defaults["clip_grad_norm"]
        if most is None:
            return grad_scale, found_inf
        norm = gradient_norm(grads)
        scale = norm.new_ones(()) if grad_scale is None else grad_scale.to(norm.device)
        norm = norm / scale.double()
        clip = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        return (scale / clip).float(), found_inf

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every state keeps its own type and bits (torch casts them to the
        parameter's), and the draws continue with the next step.

        Where both sides have names (``named_parameters()``), states are matched by name, whatever
        the order and the grouping; else by position. States go to their parameter's device and
        become sharded as it is.

        Raises:
            ValueError: names or positions that do not match; the message says which.
        """
        load(self, state_dict)
        clock.set(1 + max((int(s["step"]) for s in self.state.values() if s), default=0))
