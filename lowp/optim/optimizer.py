"""What the optimizers share: ids of tensors, types of states, exact loading, gradient scalers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowp.key import clock, tensor_id
from lowp.ops.library import FLOATS
from lowp.ops.update import scale_shape

_STATE_DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8,
}
INT8_MIN_NUMEL = 4096
"""Tensors with fewer elements keep fp32 states under ``state_dtype="int8"``, which costs little and
spares biases and norms the coding error."""


class Batch(NamedTuple):
    """The parameters of one group that have a gradient, with their states."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]

    def of(self, key: str) -> list[Tensor]:
        """One state of every parameter; an empty tensor where it has none."""
        return [s.get(key, _NOTHING) for s in self.states]

    @property
    def ids(self) -> list[int]:
        """The tensor ids that key the draws."""
        return [s["tensor"] for s in self.states]


_NOTHING = torch.empty(0)


class Optimizer(torch.optim.Optimizer):
    """Base of the optimizers; see :class:`lowp.optim.AdamW` for the keyword-only extras.

    Every parameter's state holds ``step`` (0-dim fp32) and ``tensor`` (its 32-bit id). With
    ``named_parameters()`` the id is the crc32 of the name, else the position; the kept one wins.
    """

    _step_supports_amp_scaling = True  # a gradient scaler hands over grad_scale and found_inf

    def __init__(self, params: Any, defaults: dict[str, Any], *, rounding: str,
                 state_rounding: str | None, state_dtype: str | torch.dtype | None,
                 seed: int, foreach: bool | None, fused: bool | None,
                 differentiable: bool) -> None:
        name = type(self).__name__
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
            seed=seed,
        )
        self._positions = 0
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; each parameter gets the next position."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["positions"] = list(range(self._positions, self._positions + len(group["params"])))
        self._positions += len(group["params"])

    def new_state(self, group: dict[str, Any], index: int) -> dict[str, Any]:
        """``step`` and ``tensor`` of the group's parameter number ``index``.

        A CUDA parameter's step is on its device, where a captured update counts and reads it.
        """
        names = group.get("param_names")
        key = tensor_id(names[index]) if names else group["positions"][index]
        p = group["params"][index]
        step = torch.zeros((), dtype=torch.float32, device=p.device if p.is_cuda else None)
        return {"step": step, "tensor": key}

    def add_moment(self, state: dict[str, Any], key: str, p: Tensor, group: dict[str, Any],
                   codes: torch.dtype) -> None:
        """A zero moment of the group's state type, with its scales if that is ``codes``."""
        name = group["state_dtype"]
        dtype = p.dtype if name is None else _STATE_DTYPES[name]
        if dtype == torch.int8:
            dtype = codes if p.numel() >= INT8_MIN_NUMEL else torch.float32
        state[key] = torch.zeros(p.shape, dtype=dtype, device=p.device)
        if dtype == codes:
            state[f"{key}_scale"] = torch.zeros(scale_shape(p), device=p.device)

    def init_state(self, p: Tensor, group: dict[str, Any], index: int) -> dict[str, Any]:
        """The state of a parameter before its first update."""
        raise NotImplementedError

    def update(self, group: dict[str, Any], batch: Batch, lr: Tensor, rounding: tuple[str, str],
               scaler: tuple[Tensor | None, Tensor | None]) -> None:
        """One update of a batch whose states have one type."""
        raise NotImplementedError

    def _batches(self, group: dict[str, Any]) -> Iterator[Batch]:
        """Parameters by device and by whether their states are codes."""
        batches: dict[tuple[torch.device, bool], Batch] = {}
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if p.dtype not in FLOATS:
                raise TypeError(
                    f"lowp.optim.{type(self).__name__}: parameters must be float32, bfloat16 or "
                    f"float16, got {p.dtype}"
                )
            if p.grad.is_sparse:
                raise RuntimeError(
                    f"lowp.optim.{type(self).__name__} does not support sparse gradients"
                )
            state = self.state[p]
            if not state:
                state.update(self.init_state(p, group, i))
            key = p.device, any(k.endswith("_scale") for k in state)
            batch = batches.setdefault(key, Batch([], [], []))
            batch.params.append(p)
            batch.grads.append(p.grad)
            batch.states.append(state)
        yield from batches.values()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss under ``torch.enable_grad()``.

        Returns:
            what the closure returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaler = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            lr = torch.as_tensor(group["lr"], dtype=torch.float64)
            for batch in self._batches(group):
                coded = any(k.endswith("_scale") for k in batch.states[0])
                states = group["state_rounding"] or ("nearest" if coded else group["rounding"])
                self.update(group, batch, lr, (group["rounding"], states), scaler)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every state keeps its own type and bits (torch casts them to the
        parameter's), and the draws continue with the next step."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        last = 0
        for index, p in zip(saved, params, strict=True):
            kept = state_dict["state"].get(index)
            if kept is None:
                continue
            for key, value in kept.items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else p.device
                    self.state[p][key] = value.detach().clone().to(device)
            last = max(last, int(kept["step"]))
        self._positions = len(params)
        clock.set(last + 1)
