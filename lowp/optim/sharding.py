"""How an optimizer sees a sharded parameter: its local elements, and where they lie in the whole.

A shard draws the bits of the unsharded tensor because it passes the global index of its elements.
Only metadata is read here: no rank waits for another, except in :func:`whole`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowp.reference.codec import BLOCK


class Block(NamedTuple):
    """The part of a tensor that this rank holds: first index and size in every dimension."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, x: Tensor) -> Tensor:
        """This part of a whole tensor."""
        for dim, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            x = x.narrow(dim, start, size)
        return x


class Run(NamedTuple):
    """Elements of a shard that lie one behind the other in the whole tensor."""

    at: tuple[int, ...]
    """Index of the shard's leading dimensions; ``()`` for the whole shard."""
    offset: int
    """Of the first element, in the whole tensor."""


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor (of any placements)."""
    return hasattr(x, "placements") and hasattr(x, "device_mesh")


def local(x: Any) -> Any:
    """This rank's elements of a DTensor; anything else as it is."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Any) -> Any:
    """All elements of a DTensor, gathered by all ranks of its mesh; anything else as it is."""
    if not is_sharded(x):
        return x
    if x.dtype == torch.int16:  # which gloo does not gather
        bits: Any = like(x, x.to_local().view(torch.bfloat16), x.shape)
        return bits.full_tensor().view(torch.int16)
    return x.full_tensor()


def block_of(p: Any, shape: Sequence[int]) -> Block:
    """The part of a tensor of global ``shape`` that this rank holds when it is laid out like ``p``.

    A dimension of n elements is cut as ``torch.chunk`` does, into pieces of ceil(n / ranks), so the
    last ones may be short or empty.

    Raises:
        ValueError: a placement that is neither replicated nor sharded.
    """
    starts, sizes = [0] * len(shape), list(shape)
    ranks, coordinate = p.device_mesh.shape, p.device_mesh.get_coordinate()
    # FSDP over tensor parallelism on one dimension: FSDP's mesh dimension comes first, but it cut
    # last, which its placement marks by a split factor.
    late = [i for i, place in enumerate(p.placements) if hasattr(place, "split_factor")]
    early = [i for i in range(len(p.placements)) if i not in late]
    for i in [*early, *reversed(late)]:
        place = p.placements[i]
        if place.is_replicate():
            continue
        if place.is_partial():
            raise ValueError(
                f"lowp.optim: a parameter's placements must be Shard or Replicate, got {place}"
            )
        dim = place.dim % len(shape)
        chunk = -(-sizes[dim] // ranks[i])
        first = min(chunk * coordinate[i], sizes[dim])
        starts[dim] += first
        sizes[dim] = min(chunk, sizes[dim] - first)
    return Block(tuple(starts), tuple(sizes))


def runs(shape: Sequence[int], block: Block) -> list[Run]:
    """The block's elements as runs of the row-major whole; one, where only rows are sharded."""
    starts, sizes = block
    if 0 in sizes:
        return [Run((), 0)]
    strides = [math.prod(shape[d + 1:]) for d in range(len(shape))]
    split = max((d for d in range(len(shape)) if sizes[d] != shape[d]), default=0)
    lead = split if math.prod(sizes[:split]) > 1 else 0  # dimensions that are walked
    base = sum(start * stride for start, stride in zip(starts, strides, strict=True))
    return [
        Run(at, base + sum(i * stride for i, stride in zip(at, strides, strict=False)))
        for at in itertools.product(*(range(n) for n in sizes[:lead]))
    ]


def zeros(p: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A zero state of global ``shape``, laid out like ``p``."""
    if not is_sharded(p):
        return torch.zeros(shape, dtype=dtype, device=p.device)
    sizes = block_of(p, shape).sizes
    return like(p, torch.zeros(sizes, dtype=dtype, device=p.to_local().device), shape)


def like(p: Any, values: Tensor, shape: Sequence[int]) -> Tensor:
    """This rank's ``values`` of a tensor of global ``shape`` that is laid out like ``p``."""
    from torch.distributed.tensor import DTensor  # imported already, where there is a sharded p

    strides = [math.prod(shape[d + 1:]) for d in range(len(shape))]
    return DTensor.from_local(values, p.device_mesh, p.placements, run_check=False,
                              shape=torch.Size(shape), stride=tuple(strides))


def require_whole_blocks(op: str, p: Any) -> None:
    """ValueError if a block of 8-bit codes would lie on two ranks; every rank finds the same."""
    if not is_sharded(p):
        return
    cols = p.shape[-1]
    ranks = [n for n, place in zip(p.device_mesh.shape, p.placements, strict=True)
             if not place.is_replicate() and place.dim % p.dim() == p.dim() - 1]
    chunk = cols
    for n in ranks:
        chunk = -(-chunk // n)
    if ranks and (chunk % BLOCK or (len(ranks) > 1 and cols % math.prod(ranks))):
        raise ValueError(
            f"{op}: state_dtype='int8' needs every shard of the last dimension to start at a "
            f"multiple of {BLOCK}, got {cols} columns on {math.prod(ranks)} ranks; shard another "
            "dimension or use another state_dtype"
        )


class Piece(NamedTuple):
    """What one entry of an update's lists holds: plain tensors, and the first element's index."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    offset: int


class Share(NamedTuple):
    """What a rank updates of a parameter: plain tensors."""

    owner: Any
    """The parameter, for its placement."""
    param: Tensor
    grad: Tensor
    state: dict[str, Any]

    def pieces(self, by_run: bool) -> list[Piece]:
        """The share, as one piece or as one for each run of its elements in the whole tensor.

        Args:
            by_run: whether something is drawn, so that each run needs its own offset; where there
                are several, each has a ``step`` of its own.
        """
        if not by_run or not is_sharded(self.owner):
            return [Piece(self.param, self.grad, self.state, 0)]
        shape = self.owner.shape
        found = runs(shape, block_of(self.owner, shape))
        if len(found) == 1:
            return [Piece(self.param, self.grad, self.state, found[0].offset)]
        return [
            Piece(self.param[at], self.grad[at], {
                key: value.clone() if key == "step" else
                value[at] if isinstance(value, Tensor) and value.dim() else value
                for key, value in self.state.items()
            }, offset)
            for at, offset in found
        ]


def placed_as(p: Any, grad: Any) -> Any:
    """A gradient whose placements are its parameter's."""
    if is_sharded(p) and grad.placements != p.placements:
        return grad.redistribute(placements=p.placements)
    return grad


def share_of(p: Any, grad: Any, state: dict[str, Any], elementwise: bool) -> Share:
    """This rank's share of a parameter; all of it, gathered, if the update is not elementwise."""
    if not is_sharded(p):
        return Share(p, p, grad, state)
    if not elementwise:
        return Share(p, p.full_tensor(), grad.full_tensor(), state)
    values = p.to_local()
    sizes = block_of(p, p.shape).sizes
    if tuple(values.shape) != sizes:
        raise ValueError(
            f"lowp.optim: a shard of {tuple(p.shape)} over {p.placements} must have shape "
            f"{sizes}, got {tuple(values.shape)}"
        )
    return Share(p, values, placed_as(p, grad).to_local(),
                 {key: local(value) for key, value in state.items()})


def scatter(shares: Sequence[Share]) -> None:
    """Write gathered parameters back into the shards."""
    for share in shares:
        if is_sharded(share.owner):
            p = share.owner
            p.to_local().copy_(block_of(p, p.shape).of(share.param))
