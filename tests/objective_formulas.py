"""How an objective is held to its formula: loss and gradients in fp64, and what must not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowp.hybrid import Batch
from tests.text_toys import Bag, batch_of

# The objectives compute in fp32 what is fp64 here. A term takes fewer than 50 + 10 operations on
# numbers below 16, so it is off by less than 60 · 16 · 2^-24 = 6e-5; a mean is no worse, and a
# gradient passes on errors of p below 60 · 2^-24 times derivatives below 16, the same.
CLOSE = 6e-5


def agree(objective: Any, batch: Batch, formula: Callable[[Any], Tensor],
          make: Callable[[], Any] = Bag, close: float = CLOSE) -> None:
    """Loss and the gradient of every parameter."""
    model, twin = make(), make()
    loss = objective(model, batch).loss
    loss.backward()
    expected = formula(twin)
    expected.backward()
    assert loss.dtype == torch.float32 and float(expected.detach()) != 0
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=0, atol=close)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=close, msg=name)


def log_p(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(-1, keepdim=True).log()


def nothing_moves(objective: Any, make: Callable[[], Any], batch: Batch) -> None:
    """Other tokens behind the texts' ends change no bit of the loss."""
    width = batch.tokens.shape[1]
    behind = torch.arange(width + 3)[None] >= batch.lengths[:, None]
    wider = torch.nn.functional.pad(batch.tokens, (0, 3))
    other = Batch(torch.where(behind, 17, wider), batch.lengths, batch.labels, batch.sample_ids,
                  batch.targets, batch.target_lengths, batch.spans)
    assert torch.equal(objective(make(), batch).loss, objective(make(), other).loss)


TEXTS = batch_of([7, 12, 4, 9])
UNEQUAL = batch_of([7, 12, 0, 9, 1], labelled=False)
