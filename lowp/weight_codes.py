"""Codes of weights that all forward and backward passes of one training step share.

A hybrid step multiplies by the same weights once for each objective. Inside
:func:`shared_weight_codes` each weight is quantized once, by row and by column, to the very codes
that it would get every time. Held codes take two bytes a weight until the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lowp.key import clock, is_capturing

Codes = TypeVar("Codes")


class _Held(NamedTuple):
    """Codes, and what the weight was when they were made."""

    version: int
    address: int
    step: Tensor
    codes: object


class WeightCodes:
    """The codes of some weights; those of a weight that is gone are dropped.

    Attributes:
        made: how often codes were computed.
    """

    def __init__(self) -> None:
        self.made = 0
        self.held = WeakTensorKeyDictionary()

    def clear(self) -> None:
        """Drop all codes."""
        self.held = WeakTensorKeyDictionary()


# For all threads alike, since a backward pass on a GPU runs in a thread of its own.
_active: list[WeightCodes] = []


@contextmanager
def shared_weight_codes(store: WeightCodes | None = None) -> Iterator[WeightCodes]:
    """Inside, layers keep the codes of their weights for further passes.

    Codes are made again after an optimizer step, an in-place operation on the weight or a
    replacement of its memory, and where they are rounded stochastically by another key; a CUDA
    graph that is captured makes its own. What torch's version counters do not see, writing through
    ``weight.data``, must not be done inside.

    Args:
        store: keeps codes from one block to the next; by default they are dropped at the end.
    """
    chosen = WeightCodes() if store is None else store
    _active.append(chosen)
    try:
        yield chosen
    finally:
        _active.remove(chosen)


def are_shared(w: Tensor) -> bool:
    """Whether codes of this weight are kept for further passes."""
    # A graph must quantize the weight that its replay finds.
    return bool(_active) and not (torch.compiler.is_compiling() or w.is_inference()
                                  or is_capturing())


def codes_of_weight(w: Tensor, key: Hashable, make: Callable[[], Codes]) -> Codes:
    """``make()``, or what it gave before for this weight.

    Args:
        key: everything but the weight's values that the codes depend on.
    """
    if not are_shared(w):
        return make()
    store = _active[-1]
    entries: dict[Hashable, _Held] = store.held.setdefault(w, {})
    held = entries.get(key)
    now = w._version, w.data_ptr()
    if held is not None and (held.version, held.address) == now and held.step is clock.step:
        return cast("Codes", held.codes)
    codes = make()
    store.made += 1
    entries[key] = _Held(*now, clock.step, codes)
    return codes
