"""Where a kernel family runs in a test: its backend, its device, how tensors get there and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import lowp


def moved(value: Any, device: str) -> Any:
    """Tensors, alone or in lists, on ``device`` with their strides and offsets."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, device) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.detach().new_empty(0).set_(value.untyped_storage())
    return storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


class Target(NamedTuple):
    """A backend and the device of its tensors."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Whether every operation costs as much as thousands on a GPU."""
        return (self.backend, self.device) == ("triton", "cpu")

    def run(self, op: Any, *args: Any) -> Any:
        """The op's results, on the CPU, of arguments that are moved to the device."""
        with lowp.backend(self.backend):
            results = op(*(args if self.device == "cpu" else moved(args, self.device)))
        return results if self.device == "cpu" else moved(results, "cpu")


CPU = Target("cpu", "cpu")
REFERENCE = Target("reference", "cpu")
