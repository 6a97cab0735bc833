"""The same answer in the direction in which it changes most."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowp.hybrid.batches import Batch
from lowp.hybrid.objectives.result import (
    Objective,
    ObjectiveResult,
    mean_over_texts,
    nonempty_count,
)
from lowp.hybrid.objectives.uda import divergence
from lowp.hybrid.padding import valid_mask
from lowp.hybrid.random import dropout_off, normals, sample_rows, stream_id
from lowp.hybrid.sharding import whole
from lowp.hybrid.tokenizer import SPECIAL
from lowp.key import Role, clock

_16_BIT = (torch.bfloat16, torch.float16)


def embedding_of(model: Any) -> nn.Embedding:
    """The layer whose output is perturbed.

    Raises:
        TypeError: the model has neither an ``embedding`` nor ``get_input_embeddings()``.
    """
    found = getattr(model, "embedding", None)
    if found is None and hasattr(model, "get_input_embeddings"):
        found = model.get_input_embeddings()
    if not isinstance(found, nn.Embedding):
        raise TypeError("lowp.hybrid.VirtualAdversarial: expected a model with an nn.Embedding as "
                        f"embedding or get_input_embeddings(), got {type(model).__name__}")
    return found


@contextmanager
def perturbed(layer: nn.Embedding, shift: Tensor, valid: Tensor) -> Iterator[None]:
    """Inside, the layer's output is ``output + shift``, added in fp32.

    Args:
        shift: fp32 [B, T, E].
        valid: bool [B, T]; a layer that embeds the valid tokens alone, [N, E], gets theirs.
    """

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        own = shift if output.dim() == 3 else shift[valid]
        return (output.float() + own).to(output.dtype)

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


class VirtualAdversarial(Objective):
    """``L = mean over the texts of KL(p(e) ‖ p(e + ε ĝ))``, ``ĝ ∝ ∇_d KL(p(e) ‖ p(e + ξ d))``.

    Miyato et al., "Adversarial training methods for semi-supervised text classification", ICLR
    2017, section 3: d is a random unit vector and ĝ a unit vector over the whole text, so ε bounds
    the norm of all of a text's perturbation; special tokens and padding are never perturbed.
    Embeddings count as normalized (section 3, equation 1): ε ĝ is in units of the standard
    deviation that each component has over the vocabulary, so they cannot outgrow it. Directions and
    sums are fp32, dropout is off in every pass, p(e) has no gradient, and the inner gradient
    touches no weight's.

    Args:
        epsilon: ε > 0; 5 by default.
        xi: ξ > 0, small against ε, and large enough to outlast the rounding to the model's type.
            0.1 by default, and 3 for 16-bit embeddings: on an LSTM and a transformer of width 64
            the direction then has a cosine of 0.83 and 0.72 (int8 layers 0.74 and 0.68) to that of
            fp32 at 0.1, while in bf16 at 0.1 it is 0.21 and 0.08, mostly rounding.
        iterations: of ĝ; 1 by default.
        frequencies: how often each token occurs, [V], which weigh the deviation; by default
            equally.
        seed: of d, keyed by (seed, step, pass, sample).

    Metrics: ``confidence``, the mean of the largest probability.

    Raises:
        ValueError: an argument out of range. TypeError: when called, a model without embeddings.
    """

    name = "virtual_adversarial"
    self_labelled = True

    def __init__(self, epsilon: float = 5.0, xi: float | None = None, iterations: int = 1,
                 frequencies: Tensor | None = None, seed: int = 0) -> None:
        for argument, value in (("epsilon", epsilon), ("xi", 1.0 if xi is None else xi)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"lowp.hybrid.VirtualAdversarial: {argument} must be positive, "
                                 f"got {value}")
        if iterations < 1:
            raise ValueError("lowp.hybrid.VirtualAdversarial: iterations must be at least 1, "
                             f"got {iterations}")
        self.epsilon, self.xi, self.iterations = epsilon, xi, iterations
        self.frequencies, self.seed = frequencies, seed

    def count(self, batch: Batch) -> int | None:
        """The texts that are not empty."""
        return nonempty_count(batch.lengths)

    def deviation(self, layer: nn.Embedding) -> Tensor:
        """The standard deviation of each component over the vocabulary, fp32 [E]."""
        table = whole(layer.weight).float()
        if self.frequencies is None:
            return table.std(0, correction=0)
        part = self.frequencies.to(table.device).double()
        part = (part / part.sum()).float()[:, None]
        mean = (part * table[: len(part)]).sum(0)
        return (part * (table[: len(part)] - mean).square()).sum(0).sqrt()

    def __call__(self, model: Any, batch: Batch) -> ObjectiveResult:
        """The loss of one batch."""
        layer = embedding_of(model)
        tokens, device = batch.tokens, batch.tokens.device
        valid = valid_mask(batch.lengths.to(device), tokens.shape[1])
        counts = (valid & (tokens >= len(SPECIAL)))[..., None]  # [B, T, 1]
        scale = self.deviation(layer)
        xi = self.xi or (3.0 if layer.weight.dtype in _16_BIT else 0.1)

        def shifted(direction: Tensor, size: float) -> Tensor:
            with perturbed(layer, size * direction * scale, valid):
                logits: Tensor = model.classify(tokens, batch.lengths)
            return logits

        def unit(x: Tensor) -> Tensor:
            x = torch.where(counts, x, 0)
            if x.numel() == 0:
                return x
            largest = x.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)
            x = x / largest  # squares of tiny gradients would be 0
            length: Tensor = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
            return x / length.clamp(min=1e-30)

        width = layer.embedding_dim
        bits = normals(batch.sample_ids, tokens.shape[1] * width, self.seed, int(clock.step),
                       stream_id("virtual_adversarial"), Role.AUGMENTATION)
        direction = unit(bits.view(*tokens.shape, width).to(device))
        with dropout_off(model), sample_rows(batch.sample_ids):
            with torch.no_grad():
                p = torch.softmax(model.classify(tokens, batch.lengths).float(), dim=-1)
            for _ in range(self.iterations if bool(counts.any()) else 0):
                direction.requires_grad_()
                apart = divergence(p, shifted(direction, xi)).sum()
                # Of the direction alone: a backward would add to the weights' gradients.
                (gradient,) = torch.autograd.grad(apart, direction)
                direction = unit(gradient.detach())
            terms = divergence(p, shifted(direction, self.epsilon))
            terms = torch.where(counts.any(1)[:, 0], terms, 0)  # the others have no direction
        confidence = mean_over_texts(p.amax(-1), batch.lengths)
        return ObjectiveResult(mean_over_texts(terms, batch.lengths),
                               {"confidence": float(confidence)})
