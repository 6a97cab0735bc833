"""lowp.LSTM against nn.LSTM, a forward and backward pass of a padded and of a packed batch.

    pytest benchmarks/lstm.py --benchmark-enable
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lowp
from benchmarks.conftest import Compare
from tests.tolerances import chain_error

SHAPES = ((64, 64, 64, 128), (32, 40, 256, 256))  # sequences, steps, inputs, units


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "steps", "inputs", "units"), SHAPES)
def test_pass(compare: Compare, batch: int, steps: int, inputs: int, units: int,
              dtype: torch.dtype, packed: bool) -> None:
    """Outputs within the recipe's bound of nn.LSTM in fp64, then the time of both."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(steps // 3, steps + 1, (batch,), generator=generator)
    x = torch.randn(batch, steps, inputs).to(dtype).requires_grad_()
    plain = nn.LSTM(inputs, units, batch_first=True).to(dtype)
    layers: dict[str, nn.LSTM] = {"torch": plain}
    for precision in ("bf16", "int8"):
        layer = lowp.LSTM(inputs, units, batch_first=True, precision=precision).to(dtype)
        layer.load_state_dict(plain.state_dict())
        layers[f"lowp {precision}"] = layer

    def outputs(layer: nn.LSTM, x: torch.Tensor) -> torch.Tensor:
        given: Any = x
        if packed:
            given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y = layer(given)[0]
        return y.data if isinstance(y, PackedSequence) else y

    wide = nn.LSTM(inputs, units, batch_first=True).double()
    wide.load_state_dict(plain.state_dict())
    exact = outputs(wide, x.detach().double())
    for precision in ("bf16", "int8"):
        error = outputs(layers[f"lowp {precision}"], x).double() - exact
        assert float((error.norm() / exact.norm()).detach()) < chain_error(precision, 4)
    candidates = {name: lambda layer=layer: outputs(layer, x).sum().backward()
                  for name, layer in layers.items()}
    labels = {"op": "lstm", "dtype": str(dtype), "packed": packed, "batch": batch, "steps": steps,
              "inputs": inputs, "units": units}
    compare(labels, candidates, "lowp int8")
