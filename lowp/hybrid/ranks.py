"""Several processes as one run: replicas of a model, each on its part of every batch.

Without a process group every function is what one process alone would see. Gradients are added up
once a step, in fp32: DistributedDataParallel does so in every backward pass, of which a hybrid step
has one for each objective and part, and only where a model is called. Replicas hold the same
weights, so a run of R ranks is the run of one rank on the whole batch, up to the order of fp32
sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_parallel() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 alone."""
    return dist.get_rank() if is_parallel() else 0


def world_size() -> int:
    """How many processes take part."""
    return dist.get_world_size() if is_parallel() else 1


@contextmanager
def started() -> Iterator[None]:
    """Inside a program that ``torchrun`` started, join the others; alone, nothing.

    gloo on the CPU, NCCL where CUDA is visible. A group that is there already is used and kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _device() -> str:
    """Where the group's backend takes its tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def wait() -> None:
    """Until every rank is here."""
    if is_parallel():
        dist.barrier()


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank; any that can be pickled between processes of one program."""
    if not is_parallel():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total(x: Tensor) -> Tensor:
    """The sum over all ranks, of a float tensor of one shape everywhere; ``x`` stays as it was."""
    if not is_parallel():
        return x
    result = x.detach().clone()
    dist.all_reduce(result)
    return result


def total_of(numbers: Tensor) -> Tensor:
    """As :func:`total`, of a CPU tensor whatever the group's backend takes."""
    return total(numbers.to(_device())).cpu() if is_parallel() else numbers


def all_values(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks; any that can be pickled."""
    if not is_parallel():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def check_equal(parameters: Sequence[Tensor]) -> None:
    """That every rank holds the same weights; of sharded ones nothing is looked at.

    Raises:
        ValueError: they differ.
    """
    if not is_parallel() or not all(type(p) is torch.nn.Parameter for p in parameters):
        return
    sums = torch.stack([p.detach().double().abs().sum().cpu() for p in parameters])
    every = gathered(sums[None].to(_device())).cpu()
    if not bool((every == every[0]).all()):
        raise ValueError("lowp.hybrid: expected equal weights on every rank, got others on rank "
                         f"{int((every != every[0]).any(1).nonzero()[0])} than on rank 0; build "
                         "the model from one seed")


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank."""
    if not is_parallel():
        return flag
    return bool(total_of(torch.tensor(float(flag))))


def gathered(x: Tensor) -> Tensor:
    """The rows of every rank [R·N, …], in the order of the ranks, without gradients.

    Ranks may hold different numbers of rows.
    """
    if not is_parallel():
        return x.detach()
    own = torch.tensor([x.shape[0]], device=x.device)
    counts = [torch.zeros_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    longest = max(int(count) for count in counts)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return gathered(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        first = rank() * ctx.rows
        return world_size() * grads[0][first : first + ctx.rows]


def gather_rows(x: Tensor) -> Tensor:
    """The rows of every rank, for a loss that each rank computes over all of them.

    Each rank's loss is then the same number, and its gradient reaches its own rows; the mean over
    the ranks of the weights' gradients is that of the loss, since the backward multiplies by R.

    Args:
        x: [N, H], N the same on every rank.
    """
    if not is_parallel():
        return x
    rows: Tensor = _GatherRows.apply(x)  # type: ignore[no-untyped-call]
    return rows
