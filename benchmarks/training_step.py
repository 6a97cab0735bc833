"""One training step of a small transformer: layers, attention, loss, backward pass and optimizer.

    pytest benchmarks/training_step.py --benchmark-enable
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import lowp
from benchmarks.measure import interleaved, with_ratios
from tests.tolerances import chain_error

LAYERS, WIDTH, HEADS, VOCABULARY = 6, 512, 8, 8000
BATCH, LENGTH = 16, 128
PRODUCTS = 6 * LAYERS  # of one token's way through the model


class Block(nn.Module):
    """Pre-norm: causal attention, then a feed-forward part four times as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.hidden_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(functional.gelu(self.up(self.hidden_norm(x))))


class Transformer(nn.Module):
    """Next-token logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer,
            tokens: Tensor) -> Callable[[], object]:
    def step() -> None:
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Of weights, gradients and optimizer states, a parameter."""
    tensors = [t for p in model.parameters() for t in (p, p.grad)]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    held = sum(t.nbytes for t in tensors if isinstance(t, Tensor))
    return held / sum(p.numel() for p in model.parameters())


def fp32_states(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def int8_states(model: nn.Module) -> torch.optim.Optimizer:
    return lowp.optim.AdamW(model.parameters(), lr=1e-4, state_dtype="int8")


CASES: dict[str, tuple[str | None, torch.dtype,
                       Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "nn.Linear fp32, torch fused AdamW": (None, torch.float32, fp32_states),
    "int8, int8 states": ("int8", torch.float32, int8_states),
    "int8_full, int8 states": ("int8_full", torch.float32, int8_states),
    "int8, bf16 weights, int8 states": ("int8", torch.bfloat16, int8_states),
}


def test_training_step(rows: list[dict[str, Any]], benchmark: Any) -> None:
    """Time of a step, and the bytes that stay between steps."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
    start = Transformer()
    with torch.no_grad():
        exact = start(tokens[:1, :-1])
    steps: dict[str, Callable[[], object]] = {}
    held: dict[str, float] = {}
    for name, (recipe, dtype, optimizer_of) in CASES.items():
        model: Any = copy.deepcopy(start).to(dtype)
        if recipe is not None:
            lowp.convert(model, recipe)
            with torch.no_grad():
                logits = model(tokens[:1, :-1]).float()
            bound = chain_error(recipe, PRODUCTS)
            assert float((logits - exact).norm() / exact.norm()) < bound
        optimizer = optimizer_of(model)
        steps[name] = step_of(model, optimizer, tokens)
        steps[name]()
        held[name] = resident_bytes(model, optimizer)
    assert held["int8, bf16 weights, int8 states"] <= 6.1
    times = interleaved(steps, rounds=7, warmup=1)
    plain = next(iter(CASES))
    for name, (recipe, dtype, _) in CASES.items():
        row: dict[str, Any] = {"recipe": recipe or "nn.Linear", "parameters": str(dtype),
                               "optimizer": name.rpartition(", ")[2],
                               "resident bytes/param": held[name]}
        row.update(with_ratios({"step": times[name], plain: times[plain]}, "step"))
        rows.append(row)
    benchmark.pedantic(steps["int8, int8 states"], rounds=3, warmup_rounds=1)


