"""What test_ranks.py runs on every rank; each case compares with an unsharded optimizer beside it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import lowp
from lowp.key import clock
from tests.tensors import same_bits
from tests.torchrun import main

# On 2 ranks: 7 and 6 rows, one row and none; on 4: 4, 4, 4, 1 rows, and one rank without a bias.
# "wide" has 4096 elements and more on no single rank of 4, "row" is whole on one, "flat" a vector.
SHAPES = {"wide": (13, 600), "row": (1, 5000), "bias": (3,), "flat": (5000,), "cube": (5, 3, 300)}
GRID = [
    (name, dtype, state)
    for name in ("AdamW", "SGD")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for state in (None, "fp32", "bf16", "int8")
]
MAKE = {
    "AdamW": lambda named, **k: lowp.optim.AdamW(named, lr=1e-2, weight_decay=0.1, **k),
    "SGD": lambda named, **k: lowp.optim.SGD(named, lr=1e-2, momentum=0.9, weight_decay=0.1, **k),
}


class Parameters(nn.Module):
    """A module of bare parameters, the same on every rank."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(SHAPES.items()):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(i))
            self.register_parameter(name, nn.Parameter(value.to(dtype)))


def gradient(p: Tensor, name: str, step: int) -> Tensor:
    """The whole gradient of a parameter at a step, the same on every rank."""
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    return torch.randn(p.shape, generator=generator).to(p.dtype)


def set_gradients(module: nn.Module, step: int) -> None:
    for name, p in module.named_parameters():
        whole = gradient(p, name, step)
        p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) \
            else whole


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_same(sharded: nn.Module, plain: nn.Module) -> None:
    for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert same_bits(whole(p.detach()), q.detach()), name


def assert_same_states(optimizer, module, other, plain) -> None:
    for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        a, b = optimizer.state[p], other.state[q]
        assert list(a) == list(b), name
        for key in a:
            equal = same_bits(whole(a[key]), b[key]) if isinstance(b[key], Tensor) else a[key] == b[key]
            assert equal, (name, key)


def fully_sharded(folder: Path) -> None:
    """Every optimizer, type of weight and type of state; uneven and empty shards."""
    for name, dtype, state in GRID:
        plain, module = Parameters(dtype), Parameters(dtype)
        fully_shard(module)
        one = MAKE[name](plain.named_parameters(), state_dtype=state)
        many = MAKE[name](module.named_parameters(), state_dtype=state)
        for step in range(4):
            for target, optimizer in ((plain, one), (module, many)):
                set_gradients(target, step)
                optimizer.step()
        assert_same(module, plain)
        assert_same_states(many, module, one, plain)
        coded = {n for n, p in plain.named_parameters()
                 if any(t.dtype == torch.int8 for t in one.state[p].values()
                        if isinstance(t, Tensor))}
        assert coded == ({"wide", "row", "cube"} if state == "int8" else set())


def fully_sharded_compiled(folder: Path) -> None:
    """A compiled step on shards, without a graph break."""
    for name, dtype, state in (("AdamW", torch.bfloat16, "int8"), ("SGD", torch.float32, "bf16")):
        torch._dynamo.reset()
        plain, module = Parameters(dtype), Parameters(dtype)
        fully_shard(module)
        one = MAKE[name](plain.named_parameters(), state_dtype=state)
        many = MAKE[name](module.named_parameters(), state_dtype=state)
        compiled = torch.compile(many.step, fullgraph=True, backend="aot_eager")
        for step in range(4):
            set_gradients(plain, step)
            one.step()
            set_gradients(module, step)
            compiled()
        assert_same(module, plain)
        assert_same_states(many, module, one, plain)


def sharded_by_column(folder: Path) -> None:
    """Tensor parallelism's other placement: a shard is one run a row."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dtype, state in ((torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.float32, "int8")):
        value = torch.randn(9, 2048, generator=torch.Generator().manual_seed(0)).to(dtype)
        plain = nn.ParameterList([nn.Parameter(value.clone())])
        module = nn.ParameterList([nn.Parameter(distribute_tensor(value, mesh, [Shard(1)]))])
        one = MAKE["AdamW"](plain.parameters(), state_dtype=state)
        many = MAKE["AdamW"](module.parameters(), state_dtype=state)
        for step in range(3):
            for target, optimizer in ((plain, one), (module, many)):
                set_gradients(target, step)
                optimizer.step()
        assert_same(module, plain)
        assert_same_states(many, module, one, plain)
    odd = nn.Parameter(distribute_tensor(torch.zeros(9, 600), mesh, [Shard(1)]))
    odd.grad = torch.zeros_like(odd)
    try:
        lowp.optim.AdamW([odd], state_dtype="int8").step()
    except ValueError as error:
        assert "600 columns on" in str(error), error
    else:
        raise AssertionError("a block of codes on two ranks was not refused")


CASES = {
    "fully_sharded": ((2, 4), fully_sharded),
    "fully_sharded_compiled": ((2,), fully_sharded_compiled),
    "sharded_by_column": ((2,), sharded_by_column),
}

if __name__ == "__main__":
    main(CASES)
