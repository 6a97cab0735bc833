"""The part of an LSTM that is sequential, over packed time steps, with its own backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowp.ops.linear_wgrad import linear_wgrad


def predecessors(sizes: Sequence[int], reverse: bool) -> Tensor:
    """Of each packed row, the row of the same sequence one step earlier, int64 [N].

    Args:
        sizes: how many sequences reach each time step, not growing, as a PackedSequence has them.
        reverse: time runs from the last step to the first.

    Returns:
        Indices into ``cat([initial [B, H], states [N, H]])``.
    """
    batch = sizes[0] if sizes else 0
    parts = []
    start = 0
    for step, size in enumerate(sizes):
        if not reverse:
            first = 0 if step == 0 else batch + start - sizes[step - 1]
            parts.append(torch.arange(first, first + size))
        else:
            later = sizes[step + 1] if step + 1 < len(sizes) else 0
            after = batch + start + size
            parts += [torch.arange(after, after + later), torch.arange(later, size)]
        start += size
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def last_rows(sizes: Sequence[int], reverse: bool) -> Tensor:
    """The packed row that holds each sequence's final state, int64 [B]."""
    batch = sizes[0]
    rows = torch.arange(batch)
    if reverse:
        return rows
    start = 0
    for size in sizes:
        rows[:size] = torch.arange(start, start + size)
        start += size
    return rows


class Recurrence(torch.autograd.Function):
    """Hidden and cell states of one LSTM layer in one direction.

        i, f, o = sigmoid(gate), g = tanh(gate), gate = projected + h w_hhᵀ
        c = f c + i g,  h = o tanh(c)

    (Gers, Schmidhuber, Cummins, "Learning to forget", Neural Computation 2000, section 3, with
    torch's order of gates: i, f, g, o). All of it is fp32: a state's rounding error would be fed
    back at every step. Backward keeps a step's four derivatives instead of recomputing them, so
    what is sequential there is one product and five elementwise operations a step; the gradient of
    w_hh is one product over all steps.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, h0: Tensor, c0: Tensor, w_hh: Tensor,
                sizes: list[int], reverse: bool) -> tuple[Tensor, Tensor]:
        """projected [N, 4H], h0 and c0 [B, H], w_hh [4H, H]; states [N, H] and cells [N, H]."""
        rows, width = projected.shape[0], w_hh.shape[1]
        gates = projected.to(torch.float32, copy=True)
        states, cells, squashed = gates.new_empty((3, rows, width)).unbind(0)
        turned = w_hh.float().t()
        every = torch.split(gates, sizes)
        inner = torch.split(gates[:, : 2 * width], sizes)
        i, f, g, o = (torch.split(part, sizes) for part in gates.chunk(4, 1))
        h_of, c_of, t_of = (torch.split(t, sizes) for t in (states, cells, squashed))
        first_h, first_c = h0.float(), c0.float()
        h, c = first_h[:0], first_c[:0]
        for step in reversed(range(len(sizes))) if reverse else range(len(sizes)):
            size = sizes[step]
            if h.shape[0] < size:
                begun = h.shape[0]
                h = torch.cat([h, first_h[begun:size]])
                c = torch.cat([c, first_c[begun:size]])
            every[step].addmm_(h[:size], turned)
            inner[step].sigmoid_()
            g[step].tanh_()
            o[step].sigmoid_()
            torch.mul(f[step], c[:size], out=c_of[step]).addcmul_(i[step], g[step])
            torch.tanh(c_of[step], out=t_of[step])
            torch.mul(o[step], t_of[step], out=h_of[step])
            h, c = h_of[step], c_of[step]
        ctx.save_for_backward(gates, states, cells, squashed, h0, c0, w_hh)
        ctx.options = sizes, reverse, projected.dtype
        ctx.set_materialize_grads(False)
        return states.to(projected.dtype), cells.to(projected.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gates, states, cells, squashed, h0, c0, w_hh = ctx.saved_tensors
        sizes, reverse, dtype = ctx.options
        rows, width = states.shape
        before = predecessors(sizes, reverse).to(gates.device)
        d_states, d_cells = (
            states.new_zeros(states.shape) if g is None else g.float() for g in grads)
        i, f, g, o = gates.chunk(4, 1)
        slopes = torch.cat([
            g * i * (1 - i), torch.cat([c0.float(), cells])[before] * f * (1 - f), i * (1 - g * g),
        ], 1).view(rows, 3, width)
        slope_o = squashed * o * (1 - o)
        slope_c = o * (1 - squashed * squashed)
        d_gates = torch.empty_like(gates)
        inner_of = torch.split(d_gates[:, : 3 * width].view(rows, 3, width), sizes)
        outer_of, all_of = torch.split(d_gates[:, 3 * width:], sizes), torch.split(d_gates, sizes)
        parts = [torch.split(t, sizes)
                 for t in (slopes, slope_o, slope_c, f, d_states, d_cells)]
        w = w_hh.float()
        d_h0, d_c0 = torch.zeros_like(h0).float(), torch.zeros_like(c0).float()
        dh, dc = d_h0[:0], d_c0[:0]
        for step in range(len(sizes)) if reverse else reversed(range(len(sizes))):
            size = sizes[step]
            slope, slope_out, slope_cell, forget, d_state, d_cell = (p[step] for p in parts)
            if dh.shape[0] == size:
                dh, dc = dh + d_state, dc + d_cell
            else:  # sequences that start here in backward's order, or that began at the last step
                ended, known = dh.shape[0], min(dh.shape[0], size)
                d_h0[size:ended], d_c0[size:ended] = dh[size:], dc[size:]
                total_h, total_c = d_state.clone(), d_cell.clone()
                total_h[:known] += dh[:known]
                total_c[:known] += dc[:known]
                dh, dc = total_h, total_c
            dc.addcmul_(dh, slope_cell)
            torch.mul(slope, dc[:, None], out=inner_of[step])
            torch.mul(slope_out, dh, out=outer_of[step])
            dh = all_of[step] @ w
            dc = dc * forget
        d_h0[: dh.shape[0]], d_c0[: dc.shape[0]] = dh, dc
        d_w = None
        if ctx.needs_input_grad[3]:
            earlier = torch.cat([h0.float(), states])[before]
            d_w = linear_wgrad(d_gates, earlier, False, w_hh.dtype)[0]
        return (d_gates.to(dtype), d_h0.to(h0.dtype), d_c0.to(c0.dtype), d_w, None, None)
