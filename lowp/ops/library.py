"""How an op is registered with torch: schema, checks, fake, and one kernel a backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from lowp.backend import runs_cpu_kernels, select
from lowp.measured import problem_of

LIBRARY = torch.library.Library("lowp", "DEF")

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/kernel.h: Float
GRANULARITIES = {"tensor": 0, "row": 1, "column": 2, "block": 3}  # csrc/kernel.h: Granularity
ROUNDINGS = {"nearest": 0, "stochastic": 1}  # csrc/kernel.h: Rounding

Function = TypeVar("Function", bound=Callable[..., Any])


class Op:
    """One op. Decorate its functions with :meth:`check`, :meth:`fake` and :meth:`kernel`.

    Args:
        schema: ``name(arguments) -> results`` in the language of ``torch.library``.
    """

    def __init__(self, schema: str) -> None:
        self.name = schema.split("(")[0].strip()
        self.schema = schema
        self.kernels: dict[str, Callable[..., Any]] = {}
        self._check: Callable[..., None] = lambda *args: None
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        self._overload = getattr(torch.ops.lowp, self.name).default
        arguments = list(enumerate(self._overload._schema.arguments))
        self._written = [i for i, a in arguments if a.alias_info and a.alias_info.is_write]
        self._seed = next((i for i, a in arguments if a.name == "seed"), None)
        OPS[self.name] = self

    def check(self, function: Function) -> Function:
        """Raises for arguments that the op does not take; runs before every kernel and fake."""
        self._check = function
        return function

    def fake(self, function: Function) -> Function:
        """Shapes and dtypes of the results, without data."""

        def checked(*args: Any) -> Any:
            self._check(*args)
            return function(*args)

        torch.library.register_fake(f"lowp::{self.name}", checked, lib=LIBRARY)
        return function

    def kernel(self, name: str) -> Callable[[Function], Function]:
        """What runs the op on backend ``name``; the arguments were checked."""

        def register(function: Function) -> Function:
            self.kernels[name] = function
            return function

        return register

    def _run(self, *args: Any) -> Any:
        self._check(*args)
        backend = select(self.name, _device(args), self.kernels, problem_of(self.name, args))
        results = self.kernels[backend](*args)
        for i in self._written:  # kernels write through pointers, which autograd does not see
            if i < len(args) and args[i] is not None:
                increment_version(args[i])
        return results

    def __call__(self, *args: Any) -> Any:
        if nothing_watches() and _are_plain(args, torch.is_grad_enabled()):
            return self._run(*args)
        if self._seed is not None and args[self._seed] >= 2**63:  # a schema's int is signed
            signed = args[self._seed] - 2**64
            args = (*args[: self._seed], signed, *args[self._seed + 1 :])
        return self._overload(*args)


TENSORS = frozenset((Tensor, Parameter))
_NO_TENSORS = frozenset((str, int, float, bool, torch.dtype, type(None)))


def nothing_watches() -> bool:
    """Whether torch's dispatcher would do no more than find the kernel.

    That is so without a compiler, tracer, mode, functorch transform or profiler, and where no
    gradients are recorded; going around it then saves a third of the host time of a small call.
    """
    return not (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def _are_plain(args: Sequence[Any], grad_enabled: bool = False) -> bool:
    """Whether all tensors, in lists too, are torch's own, on the CPU, and hold what they mean; and
    where gradients are recorded, that none is of a tensor among them."""
    for value in args:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if (not value.is_cpu or value.is_neg() or value._is_zerotensor()
                    or (grad_enabled and value.requires_grad)
                    or is_functorch_wrapped_tensor(value)):
                return False
        elif kind is list and not grad_enabled:
            kinds = set(map(type, value))
            if not (all_plain(value) if kinds <= TENSORS else
                    kinds <= _NO_TENSORS or _are_plain(value)):
                return False
        elif kind not in _NO_TENSORS and not isinstance(value, int):  # a lowp.key.Role is one
            return False
    return True


def all_plain(tensors: Sequence[Tensor]) -> bool:
    """:func:`_are_plain` of a list of torch's own tensors: by attributes, which is quicker.

    It does not look for what a functorch transform left: nobody's parameters or gradients are that.
    """
    return (
        all([t.is_cpu for t in tensors]) and not any(map(Tensor.is_neg, tensors))
        and not any(map(Tensor._is_zerotensor, tensors))
    )


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether CPU kernels may be called for these without the ops around them.

    An op's way to its kernel takes longer than a small product. It is needed where something
    watches or a backend is asked for, and to refuse what is no float.
    """
    return (
        not torch.is_grad_enabled() and nothing_watches() and runs_cpu_kernels()
        and _are_plain(tensors) and all([t is None or t.dtype in FLOATS for t in tensors])
    )


def _device(args: tuple[Any, ...]) -> torch.device:
    for value in args:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.device
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return value[0].device
    return torch.device("cpu")


def deferred(name: str) -> Callable[..., Any]:
    """The Triton kernel of op ``name``; ``lowp.kernels.<name>`` is imported at its first call."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"lowp.kernels.{name}"), name)(*args)

    return run


OPS: dict[str, Op] = {}
"""Every op by its name."""


def require_float(op: str, argument: str, x: Tensor) -> None:
    """TypeError unless ``x`` is fp32, bf16 or fp16."""
    if x.dtype not in FLOATS:
        raise TypeError(
            f"lowp::{op}: {argument} must be float32, bfloat16 or float16, got {x.dtype}"
        )


def require_choice(op: str, argument: str, value: str, choices: dict[str, int]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"lowp::{op}: {argument} must be one of {', '.join(choices)}, got {value!r}"
        )


def require_float_dtype(op: str, argument: str, dtype: torch.dtype) -> None:
    """TypeError unless ``dtype`` is a float type that the kernels write."""
    if dtype not in FLOATS:
        raise TypeError(
            f"lowp::{op}: {argument} must be float32, bfloat16 or float16, got {dtype}"
        )


def rows_cols(x: Tensor) -> tuple[int, int]:
    """``x`` as a matrix: all leading dimensions are rows."""
    return x.shape[:-1].numel(), x.shape[-1]
