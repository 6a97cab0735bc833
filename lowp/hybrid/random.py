"""Random bits of the training loop: a function of what they are for, never of what came before.

Every draw belongs to (seed, step, tensor, role, sample, element), so a resumed or recomputed step
draws the same bits, a sample draws the same bits in whatever batch, place or rank it is, and
torch's generators are never touched. Generator: :mod:`lowp.reference.philox`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from lowp.key import Role, clock, tensor_id
from lowp.reference.philox import draws, philox4x32

ROW_ELEMENTS = 1 << 24  # elements between the first draws of two rows
MAX_ROWS = 1 << 27  # so that a group of eight elements has a number below 2^48
_MASK = 0xFFFFFFFF

_pass: ContextVar[int] = ContextVar("lowp_hybrid_pass", default=0)
_view: ContextVar[int] = ContextVar("lowp_hybrid_view", default=0)
_rows: ContextVar[Tensor | None] = ContextVar("lowp_hybrid_rows", default=None)


@contextmanager
def pass_index(index: int) -> Iterator[None]:
    """Give the forward passes inside bits of their own; two passes of a step need two indices."""
    token = _pass.set(index)
    try:
        yield
    finally:
        _pass.reset(token)


@contextmanager
def view(index: int) -> Iterator[None]:
    """Several passes of one objective over the same texts: each view has bits of its own."""
    token = _view.set(index)
    try:
        yield
    finally:
        _view.reset(token)


@contextmanager
def sample_rows(sample_ids: Tensor) -> Iterator[None]:
    """Key what is drawn inside by sample: row b of a batch is ``sample_ids[b]``, int64 [B]."""
    token = _rows.set(sample_ids)
    try:
        yield
    finally:
        _rows.reset(token)


def stream_id(name: str) -> int:
    """The 32-bit ``tensor`` of a named use of random bits in the current pass and view."""
    other = f"/view {_view.get()}" if _view.get() else ""
    return tensor_id(f"{name}/pass {_pass.get()}{other}")


def uniform(shape: Sequence[int], seed: int, step: int, tensor: int, role: int) -> Tensor:
    """fp32 multiples of 2^-16 in [0, 1), uniform, of the given shape."""
    numel = 1
    for size in shape:
        numel *= size
    return draws(seed, step, tensor, role, numel).reshape(tuple(shape)).float() / 65536


def row_draws(rows: Tensor, width: int, seed: int, step: int, tensor: int, role: int) -> Tensor:
    """16-bit draws of rows that are known by number: int64 in 0..65535, [B, width].

    Element j of row r is element ``r * 2^24 + j`` of the tensor that DESIGN's counter speaks of.

    Raises:
        ValueError: a row number outside 0 .. 2^27 - 1, or width beyond 2^24.
    """
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < MAX_ROWS:
        raise ValueError(f"lowp.hybrid.random.row_draws: rows must be in 0..{MAX_ROWS - 1}, "
                         f"got {int(rows.min())}..{int(rows.max())}")
    if width > ROW_ELEMENTS:
        raise ValueError("lowp.hybrid.random.row_draws: width must be at most "
                         f"{ROW_ELEMENTS}, got {width}")
    first = rows.to("cpu", torch.int64)[:, None] * (ROW_ELEMENTS // 8)
    groups = first + torch.arange((width + 7) // 8)  # [B, width/8]
    counter = [
        groups & _MASK,
        (groups >> 32) | (role << 16),
        torch.full_like(groups, step & _MASK),
        torch.full_like(groups, tensor & _MASK),
    ]
    words = torch.stack(philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)  # [B, width/8, 4, 2]
    return halves.reshape(rows.numel(), -1)[:, :width]


def integers(rows: Tensor, width: int, bound: int, seed: int, step: int, tensor: int,
             role: int) -> Tensor:
    """Integers in 0 .. bound - 1 from 32 bits each, int64 [B, width].

    A value's probability is off from 1 / bound by less than 2^-32.
    """
    bits = row_draws(rows, 2 * width, seed, step, tensor, role)
    pairs = bits.reshape(rows.numel(), width, 2)
    return ((pairs[..., 0] << 16 | pairs[..., 1]) * bound) >> 32


def normals(rows: Tensor, width: int, seed: int, step: int, tensor: int, role: int) -> Tensor:
    """Standard normal fp32 numbers from 16 bits each, [B, width]: |z| is at most 4.3."""
    uniforms = (row_draws(rows, width, seed, step, tensor, role).double() + 0.5) / 65536
    return (2**0.5 * torch.erfinv(2 * uniforms - 1)).float()


def permutation(n: int, seed: int, epoch: int, dataset: int) -> Tensor:
    """The order of a data set of n samples in one epoch, int64 [n]: a function of its arguments."""
    bits = draws(seed, epoch, dataset, Role.SAMPLING, 4 * n).reshape(n, 4)
    keys = (bits[:, 0] & 0x7FFF) << 48 | bits[:, 1] << 32 | bits[:, 2] << 16 | bits[:, 3]
    return torch.argsort(keys, stable=True)


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout layer of the model drops anything; its mode stays as it is.

    A recurrent layer keeps training mode, without which cuDNN has no backward pass for it.
    """
    layers = [m for m in model.modules()
              if isinstance(m, Dropout | nn.Dropout | nn.AlphaDropout) and m.training]
    recurrent = [(m, m.dropout) for m in model.modules() if isinstance(m, nn.RNNBase)]
    for layer in layers:
        layer.training = False
    for rnn, _ in recurrent:
        rnn.dropout = 0.0
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True
        for rnn, dropout in recurrent:
            rnn.dropout = dropout


class Dropout(nn.Module):
    """Zeros each value with probability p, scales the others by 1 / (1 - p); in training only.

    Its bits are keyed by the clock's step, its name, the current :func:`pass_index` and the row's
    sample (see :func:`sample_rows`; without it the row's number in the batch).

    Srivastava et al., "Dropout", JMLR 2014; with ``shared`` one mask holds for all time steps of a
    sample, as Gal and Ghahramani, NeurIPS 2016, section 4, derive for recurrent networks.

    Args:
        p: probability in [0, 1), taken to the nearest multiple of 2^-16.
        seed: of the run.
        name: what tells its bits from those of other layers.
        shared: one mask for all time steps.

    Raises:
        ValueError: p is not in [0, 1).
    """

    def __init__(self, p: float = 0.1, *, seed: int = 0, name: str = "dropout",
                 shared: bool = False) -> None:
        super().__init__()
        threshold = round(p * 65536)
        if not (p >= 0 and threshold < 65536):
            raise ValueError(f"lowp.hybrid.Dropout: p must be in [0, 1), got {p}")
        self.p, self.seed, self.name, self.shared = p, seed, name, shared
        self._threshold = threshold

    def forward(self, x: Tensor, position: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x is [B, H] or [B, T, H], or the valid tokens alone, [N, H].

        Args:
            position: for valid tokens alone, the row (place in the batch) and the time step of
                each, int64 [N]; then the values drop as they would in [B, T, H].
        """
        if not self.training or self._threshold == 0 or x.numel() == 0:
            return x
        keep = self._drawn(x, position) >= self._threshold
        scale = 65536 / (65536 - self._threshold)
        return x * (keep.to(x.device, x.dtype) * scale)

    def _drawn(self, x: Tensor, position: tuple[Tensor, Tensor] | None) -> Tensor:
        rows = _rows.get()
        batch = x.shape[0] if position is None else int(position[0].max()) + 1
        if rows is None:
            rows = torch.arange(batch)
        elif rows.numel() < batch or (position is None and rows.numel() != batch):
            raise ValueError(f"lowp.hybrid.Dropout: {self.name} has {batch} rows, but there are "
                             f"{rows.numel()} sample ids")
        hidden = x.shape[-1]
        steps = 1 if self.shared or (x.dim() == 2 and position is None) else \
            x.shape[1] if position is None else int(position[1].max()) + 1
        bits = row_draws(rows, steps * hidden, self.seed, int(clock.step), stream_id(self.name),
                         Role.DROPOUT).reshape(-1, steps, hidden)
        if position is not None:
            return bits[position[0].cpu(), 0 if self.shared else position[1].cpu()]
        return bits[:, 0] if x.dim() == 2 else bits

    def extra_repr(self) -> str:
        """p, and what is not the default."""
        return f"p={self.p}, name={self.name}" + (", shared=True" if self.shared else "")
