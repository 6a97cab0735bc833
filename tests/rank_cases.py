"""What test_ranks.py runs on every rank; each case compares with an unsharded twin beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lowp
from lowp.key import clock, tensor_id
from lowp.optim.sharding import whole
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


def assert_same(sharded: nn.Module, plain: nn.Module) -> None:
    for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert same_bits(whole(p.detach()), q.detach()), name


def assert_same_states(optimizer, module, other, plain) -> None:
    for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        a, b = optimizer.state[p], other.state[q]
        assert list(a) == list(b), name
        for key in a:
            got, want = whole(a[key]), whole(b[key])
            equal = same_bits(got, want) if isinstance(want, Tensor) else got == want
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
    for name, dtype, state, clip in (("AdamW", torch.bfloat16, "int8", None),
                                     ("SGD", torch.float32, "bf16", 0.5)):
        torch._dynamo.reset()
        plain, module = Parameters(dtype), Parameters(dtype)
        fully_shard(module)
        one, many = (MAKE[name](m.named_parameters(), state_dtype=state, clip_grad_norm=clip)
                     for m in (plain, module))
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
    with pytest.raises(ValueError, match="600 columns on"):
        lowp.optim.AdamW([odd], state_dtype="int8").step()


def saved_for_backward(folder: Path) -> None:
    """A graph that saved a shard from before the step: torch's error."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for make in (MAKE["SGD"], FAMILY["Muon"]):
        p = nn.Parameter(distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)]))
        loss = p.square().sum()
        p.grad = distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)])
        make([("p", p)]).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def two_dimensional(folder: Path) -> None:
    """FSDP over tensor parallelism, on rows twice and on columns; and FSDP over replicas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for layout in ("tensor parallel", "replicas"):
        module, plain = (
            nn.Sequential(nn.Linear(32, 24, bias=False), nn.Linear(24, 32, bias=False)).half()
            for _ in range(2)
        )
        with torch.no_grad():  # the weights tell which elements a rank was given: fp16 holds 768
            for p in module.parameters():
                p.copy_(torch.arange(p.numel()).view(p.shape))
        if layout == "tensor parallel":
            styles = {"0": ColwiseParallel(), "1": RowwiseParallel()}
            parallelize_module(module, mesh["tp"], styles)
            fully_shard(module, mesh=mesh["dp"])
        else:
            fully_shard(module, mesh=mesh)
        held = [p.to_local().long() for p in module.parameters()]
        with torch.no_grad():
            for p, q, index in zip(module.parameters(), plain.parameters(), held, strict=True):
                p.to_local().copy_(q.flatten()[index])
        one = MAKE["AdamW"](plain.named_parameters())
        many = MAKE["AdamW"](module.named_parameters())
        for step in range(3):
            set_gradients(plain, step)
            one.step()
            for p, q, index in zip(module.parameters(), plain.parameters(), held, strict=True):
                p.grad = DTensor.from_local(q.grad.flatten()[index], p.device_mesh, p.placements,
                                            shape=p.shape, stride=p.stride())
            many.step()
        assert_same(module, plain)


def layers(dtype: torch.dtype, precision: str) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        lowp.Linear(64, 97, precision=precision, activation="gelu", name="0"),
        lowp.Linear(97, 10, precision="bf16", name="1"),
    ).to(dtype)


def layers_fully_sharded(folder: Path) -> None:
    """lowp.Linear under FSDP2: trained on the same data it has the bits of one process."""
    for precision, dtype, wrap in (("int8_full", torch.float32, lambda m: m),
                                   ("int8", torch.bfloat16, lambda m: m),
                                   ("int8_full", torch.float32, compiled_layers)):
        plain, module = layers(dtype, precision), layers(dtype, precision)
        for layer in module:
            fully_shard(layer)  # reshards after its forward: a read outside it finds a shard
        fully_shard(module)
        ran = wrap(module)
        one = MAKE["AdamW"](plain.named_parameters())
        many = MAKE["AdamW"](module.named_parameters())
        for step in range(1, 5):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
            for run, optimizer in ((plain, one), (ran, many)):
                clock.set(step)
                optimizer.zero_grad()
                run(x).float().square().mean().backward()
                optimizer.step()
            assert_same(module, plain)
        with torch.no_grad():
            own = torch.randn(3, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
            assert same_bits(ran(own.to(dtype)), plain(own.to(dtype)))


def compiled_layers(module: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager")


def replicas(folder: Path) -> None:
    """DDP, 200 steps, other data and another torch generator on each rank."""
    rank = dist.get_rank()
    torch.manual_seed(100 + rank)
    torch.rand(rank + 1)
    model = DistributedDataParallel(layers(torch.bfloat16, "int8_full"))
    torch.manual_seed(100 + rank)
    optimizer = MAKE["AdamW"](model.named_parameters(), state_dtype="int8")
    for _ in range(200):
        optimizer.zero_grad()
        model(torch.randn(8, 64).bfloat16()).float().square().mean().backward()
        before = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
    assert optimizer.state[model.module[0].weight]["tensor"] == tensor_id("0.weight")
    for name, p in model.named_parameters():
        everyone = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, p.detach())
        assert all(same_bits(other, p.detach()) for other in everyone), name


def infinity_on_one_rank(folder: Path) -> None:
    """A gradient scaler that finds an Inf in one shard skips the step on every rank."""
    module = Parameters(torch.bfloat16)
    fully_shard(module)
    optimizer = MAKE["AdamW"](module.named_parameters(), state_dtype="int8")
    set_gradients(module, 0)
    optimizer.step()
    kept = {n: p.detach().clone() for n, p in module.named_parameters()}
    states = {n: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
              for n, p in module.named_parameters()}
    step = clock.step.item()
    set_gradients(module, 1)
    if dist.get_rank() == 0:
        module.row.grad.to_local()[0, 77] = torch.inf
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 0.5 and clock.step.item() == step
    for name, p in module.named_parameters():
        assert same_bits(whole(p.detach()), whole(kept[name])), name
        for key, value in states[name].items():
            assert same_bits(whole(optimizer.state[p][key]), whole(value)), (name, key)


class Normalized(lowp.optim.SGD):
    """SGD that divides a gradient by its tensor's norm, which no shard knows."""

    elementwise = False

    def update(self, group, batch, lr, rounding, scaler):
        grads = [g / torch.linalg.vector_norm(g.float()).to(g.dtype) for g in batch.grads]
        super().update(group, batch._replace(grads=grads), lr, rounding, scaler)


def not_elementwise(folder: Path) -> None:
    """An optimizer that needs whole tensors gets them."""
    plain, module = Parameters(torch.bfloat16), Parameters(torch.bfloat16)
    fully_shard(module)
    one, many = (Normalized(m.named_parameters(), momentum=0.9, state_dtype="int8")
                 for m in (plain, module))
    for step in range(3):
        for target, optimizer in ((plain, one), (module, many)):
            set_gradients(target, step)
            optimizer.step()
    assert_same(module, plain)
    assert_same_states(many, module, one, plain)


FAMILY = {
    "Adam": lambda n, **k: lowp.optim.Adam(n, lr=1e-2, weight_decay=0.1, master="remainder", **k),
    "AdamW": lambda n, **k: lowp.optim.AdamW(n, lr=1e-2, master="kahan", **k),
    "Lion": lambda n, **k: lowp.optim.Lion(n, lr=1e-3, master="kahan", **k),
    "Adafactor": lambda n, **k: lowp.optim.Adafactor(n, lr=1e-2, **k),
    "Muon": lambda n, **k: lowp.optim.Muon([(m, p) for m, p in n if p.dim() == 2], **k),
}


def family(folder: Path) -> None:
    """Every other optimizer, with masters and with gradients clipped by the norm of all shards."""
    for make in FAMILY.values():
        for options in ({"state_dtype": "int8"}, {"clip_grad_norm": 0.5}):
            plain, module = Parameters(torch.bfloat16), Parameters(torch.bfloat16)
            fully_shard(module)
            one, many = (make(m.named_parameters(), **options) for m in (plain, module))
            for step in range(3):
                for target, optimizer in ((plain, one), (module, many)):
                    set_gradients(target, step)
                    optimizer.step()
            assert_same(module, plain)
            assert_same_states(many, module, one, plain)


RESHARDED = (("AdamW", torch.bfloat16, "int8"), ("SGD", torch.float16, "bf16"))


def resume(folder: Path, name: str, dtype: torch.dtype, state: str, shard: bool):
    """A module and its optimizer as a torch.distributed.checkpoint left them."""
    module = Parameters(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    if shard:
        fully_shard(module)
    optimizer = MAKE[name](module.named_parameters(), state_dtype=state)
    loaded = {"model": dcp_state.get_model_state_dict(module),
              "optimizer": dcp_state.get_optimizer_state_dict(module, optimizer)}
    checkpoint.load(loaded, checkpoint_id=folder, no_dist=not shard)
    clock.set(1)
    dcp_state.set_model_state_dict(module, loaded["model"])
    dcp_state.set_optimizer_state_dict(module, optimizer, loaded["optimizer"])
    return module, optimizer


def advance(module: nn.Module, optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(module, step)
        optimizer.step()


def keep(module: nn.Module, optimizer, folder: Path) -> None:
    state = {"model": dcp_state.get_model_state_dict(module),
             "optimizer": dcp_state.get_optimizer_state_dict(module, optimizer)}
    checkpoint.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def resharded(folder: Path) -> None:
    """Goes on from 1 rank on 2, and from 2 on 4; test_ranks.py takes the first and the last leg."""
    ranks = dist.get_world_size()
    for name, dtype, state in RESHARDED:
        module, optimizer = resume(folder / f"{name}-{ranks // 2}", name, dtype, state, True)
        assert clock.step.item() == (26 if ranks == 2 else 51)
        if ranks == 4:
            other = Parameters(dtype)
            fully_shard(other)
            loaded = MAKE[name](other.named_parameters())
            lowp.optim.load_state(loaded, folder / f"{name}-2.safetensors")
            assert_same_states(loaded, other, optimizer, module)
        advance(module, optimizer, range(25, 50) if ranks == 2 else range(50, 75))
        keep(module, optimizer, folder / f"{name}-{ranks}")
        lowp.optim.save_state(optimizer, folder / f"{name}-{ranks}.safetensors")


def converted(folder: Path) -> None:
    """States of torch's AdamW on shards, here and back."""
    plain, module = Parameters(), Parameters()
    fully_shard(module)
    found = {}
    for target in (plain, module):
        foreign = torch.optim.AdamW(target.named_parameters(), lr=1e-2)
        for step in range(2):
            set_gradients(target, step)
            foreign.step()
        optimizer = MAKE["AdamW"](target.named_parameters(), state_dtype="int8")
        optimizer.load_state_dict(lowp.optim.from_torch(optimizer, foreign.state_dict()))
        assert {s["step"].item() for s in optimizer.state.values()} == {2.0}
        found[target] = optimizer, lowp.optim.to_torch(optimizer)["state"]
    assert_same_states(found[module][0], module, found[plain][0], plain)
    for many, one in zip(found[module][1].values(), found[plain][1].values(), strict=True):
        assert all(same_bits(whole(many[key]), one[key]) for key in one)


CASES = {
    "fully_sharded": ((2, 4), fully_sharded),
    "fully_sharded_compiled": ((2,), fully_sharded_compiled),
    "sharded_by_column": ((2,), sharded_by_column),
    "saved_for_backward": ((2,), saved_for_backward),
    "two_dimensional": ((4,), two_dimensional),
    "layers_fully_sharded": ((2,), layers_fully_sharded),
    "replicas": ((2,), replicas),
    "infinity_on_one_rank": ((2, 4), infinity_on_one_rank),
    "not_elementwise": ((2,), not_elementwise),
    "family": ((2, 4), family),
    "converted": ((2,), converted),
    "resharded": ((2, 4), resharded),
}

if __name__ == "__main__":
    main(CASES)
