"""Weights of which every rank keeps a part (FSDP2), and states that know nothing of it.

``torch.distributed.fsdp.fully_shard`` gathers the weights for a pass and adds up the gradients
behind it. A state is written as one process would write it, so any number of ranks goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lowp.hybrid import ranks

METHODS = ("encode", "classify", "token_logits", "class_token_logits", "decode", "span_logits")


def shard(model: nn.Module) -> nn.Module:
    """Shard the weights over all ranks, in place; what objectives call gathers them.

    Alone, nothing changes.

    Returns:
        ``model`` itself.
    """
    if ranks.is_parallel():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
        fully_shard(model, mesh=init_device_mesh(kind, (ranks.world_size(),)))
        for name in METHODS:
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)
    return model


def is_sharded(parameters: Sequence[Tensor]) -> bool:
    """Whether the ranks keep parts of them."""
    return any(isinstance(p, DTensor) for p in parameters)


def local(x: Tensor) -> Tensor:
    """This rank's part, without gradients; of a tensor that is not sharded, all of it."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of it, without gradients; every rank must ask for it."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(part: Tensor, model: Tensor) -> Tensor:
    """This rank's part as a tensor that is sharded as ``model`` is."""
    if not isinstance(model, DTensor):
        return part
    return DTensor.from_local(part, model.device_mesh, model.placements, run_check=False,
                              shape=model.shape, stride=model.stride())


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same tree of dicts and lists with other tensors."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_tensors(value, function) for value in tree]
    return tree


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """``load_state_dict`` of whole tensors into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({n: _as(t, own[n]) if n in own else t for n, t in state.items()})


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """``load_state_dict`` of whole tensors into an optimizer whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    sharded = {number: p for number, p in zip(numbers, parameters, strict=False)
               if isinstance(p, DTensor)}
    states = {
        number: {key: _as(value, sharded[number]) if isinstance(value, Tensor) else value
                 for key, value in kept.items()} if number in sharded else kept
        for number, kept in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def _as(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor sharded as one of its shape is; of another shape, as it came."""
    if not isinstance(model, DTensor) or value.shape != model.shape:
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
