"""``nn.LSTM`` whose input projections run through lowp's products."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lowp.key import Key, tensor_id
from lowp.linear import linear
from lowp.recipe import Recipe, recipe_of
from lowp.recurrence import Recurrence, last_rows

_positions = itertools.count(1 << 31)  # apart from those of the linear layers

States = tuple[Tensor, Tensor]


class LSTM(nn.LSTM):
    """``nn.LSTM`` with the input projection of all time steps as one product by a recipe.

    The product over time, whose errors would be fed back at every step, and the states are fp32
    (see :class:`lowp.recurrence.Recurrence`); outputs are rounded once, to the input's type.
    Arguments, keys, initialization and results are those of ``nn.LSTM``, packed sequences, several
    layers and both directions among them. With the recipe ``fp32`` it is ``nn.LSTM`` itself, bit
    for bit.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as in ``nn.LSTM``.
        proj_size: as in ``nn.LSTM`` with the recipe ``fp32``, else it must be 0.
        precision: as :class:`lowp.Linear` takes it.
        name: the layer's qualified name; with it the crc32 of each input weight's name keys its
            random bits, without it their number in this process.

    Raises:
        ValueError: an unknown precision; proj_size with another recipe than fp32; input or state
            of a shape that does not fit. RuntimeError: a second derivative with another recipe.
    """

    recipe: Recipe
    noise_ids: list[int]

    def __init__(self, *args: Any, precision: str | int | Recipe = "fp32",
                 name: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe_of(precision)
        if self.proj_size and self.recipe.name != "fp32":
            raise ValueError(
                f"lowp.LSTM: proj_size must be 0 with precision {self.recipe.name!r}, got "
                f"{self.proj_size}; precision='fp32' takes any, as nn.LSTM does"
            )
        self.noise_ids = [
            next(_positions) if name is None else tensor_id(f"{name}.weight_ih_{suffix}")
            for suffix in self._suffixes()
        ]

    def _suffixes(self) -> list[str]:
        """Of the weights' names, layer by layer, forward before reverse."""
        ways = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{way}" for layer in range(self.num_layers) for way in ways]

    def forward(self, input: Any, hx: States | None = None) -> Any:
        """Output and (h_n, c_n) of a tensor [T, B, I], [B, T, I] (batch_first) or [T, I], or of a
        PackedSequence; shapes as in ``nn.LSTM``."""
        if self.recipe.name == "fp32":
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            if hx is not None:
                hx = self.permute_hidden(hx, input.sorted_indices)
            data, h, c = self._run(input.data, input.batch_sizes.tolist(), hx)
            packed = PackedSequence(data, input.batch_sizes, input.sorted_indices,
                                    input.unsorted_indices)
            return packed, self.permute_hidden((h, c), input.unsorted_indices)
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise ValueError(
                "lowp.LSTM: expected input of two or three dimensions of which the last is "
                f"{self.input_size}, got {tuple(input.shape)}"
            )
        x = input
        if input.dim() == 2:
            x = input[:, None]
            hx = None if hx is None else (hx[0][:, None], hx[1][:, None])
        elif self.batch_first:
            x = input.transpose(0, 1)
        steps, batch = x.shape[:2]
        if steps == 0:
            raise ValueError("lowp.LSTM: expected at least one time step, got "
                             f"{tuple(input.shape)}")
        flat = x.reshape(steps * batch, self.input_size)
        data, h, c = self._run(flat, [batch] * steps, hx)
        y = data.view(steps, batch, self.hidden_size * (1 + self.bidirectional))
        if input.dim() == 2:
            return y[:, 0], (h[:, 0], c[:, 0])
        return (y.transpose(0, 1) if self.batch_first else y), (h, c)

    def _run(self, x: Tensor, sizes: list[int], hx: States | None) -> tuple[Tensor, Tensor, Tensor]:
        """Packed rows [N, I] through all layers: [N, D*H], h_n and c_n [L*D, B, H]."""
        # as a decorator it would import torch's compiler, and Triton, with lowp
        run = torch.compiler.disable(self._eager) if torch.compiler.is_compiling() else self._eager
        y, h, c = run(x, sizes, hx)
        return y, h, c

    def _eager(self, x: Tensor, sizes: list[int],
               hx: States | None) -> tuple[Tensor, Tensor, Tensor]:
        suffixes, batch = self._suffixes(), sizes[0]
        if x.shape[-1] != self.input_size:
            raise ValueError(f"lowp.LSTM: expected packed input [N, {self.input_size}], "
                             f"got {tuple(x.shape)}")
        shape = (len(suffixes), batch, self.hidden_size)
        if hx is None:
            hx = (x.new_zeros(shape), x.new_zeros(shape))
        for part, state in zip(("h_0", "c_0"), hx, strict=True):
            if tuple(state.shape) != shape:
                raise ValueError(f"lowp.LSTM: expected {part} {shape}, got {tuple(state.shape)}")
        final: list[States] = []
        ways = 1 + self.bidirectional
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
            outputs = []
            for way in range(ways):
                index = layer * ways + way
                y, cells = self._direction(x, sizes, suffixes[index], index, hx, bool(way))
                rows = last_rows(sizes, bool(way)).to(x.device)
                final.append((y[rows], cells[rows]))
                outputs.append(y)
            x = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        return x, torch.stack([h for h, _ in final]), torch.stack([c for _, c in final])

    def _direction(self, x: Tensor, sizes: list[int], suffix: str, index: int, hx: States,
                   reverse: bool) -> States:
        bias = None
        if self.bias:
            b_ih, b_hh = getattr(self, f"bias_ih_{suffix}"), getattr(self, f"bias_hh_{suffix}")
            bias = b_ih.float() + b_hh.float()
        key = Key(self.recipe.seed, None, self.noise_ids[index])
        projected = linear(x, getattr(self, f"weight_ih_{suffix}"), bias, "none", self.recipe,
                           key=key)
        states: States = Recurrence.apply(  # type: ignore[no-untyped-call]
            projected, hx[0][index], hx[1][index], getattr(self, f"weight_hh_{suffix}"), sizes,
            reverse)
        return states

    def extra_repr(self) -> str:
        """As ``nn.LSTM``'s, with the precision if it is not fp32."""
        text = super().extra_repr()
        return text if self.recipe.name == "fp32" else f"{text}, precision={self.recipe.name}"
