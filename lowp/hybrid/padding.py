"""Right-padded sequences: which positions count."""

from __future__ import annotations

import torch
from torch import Tensor

from lowp.hybrid.tokenizer import SPECIAL


def valid_mask(lengths: Tensor, width: int) -> Tensor:
    """True where a token stands, False on padding: bool [B, T] of lengths [B]."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def ordinary_mask(tokens: Tensor, lengths: Tensor) -> Tensor:
    """True where a token stands that is not special: bool [B, T] of tokens [B, T], lengths [B]."""
    return valid_mask(lengths.to(tokens.device), tokens.shape[1]) & (tokens >= len(SPECIAL))


def check_tokens(model: str, tokens: Tensor, lengths: Tensor) -> None:
    """Refuse what is not a batch of right-padded tokens.

    Raises:
        ValueError: shapes that do not fit, or a length outside 0 .. T.
        TypeError: tokens or lengths are not integers.
    """
    if tokens.dim() != 2 or tuple(lengths.shape) != (tokens.shape[0],):
        raise ValueError(f"{model}: expected tokens [B, T] and lengths [B], "
                         f"got {tuple(tokens.shape)} and {tuple(lengths.shape)}")
    if tokens.is_floating_point() or lengths.is_floating_point():
        raise TypeError(f"{model}: expected integer tokens and lengths, "
                        f"got {tokens.dtype} and {lengths.dtype}")
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= tokens.shape[1]:
        raise ValueError(f"{model}: lengths must be in 0..{tokens.shape[1]}, "
                         f"got {int(lengths.min())}..{int(lengths.max())}")


def pooled(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Mean and maximum over a text's valid positions, side by side: [B, T, H] to [B, 2H].

    The sum is taken in fp32. Of an empty text both are 0.
    """
    batch, width, features = hidden.shape
    lengths = lengths.to(hidden.device)
    if width == 0:
        return hidden.new_zeros((batch, 2 * features))
    valid = valid_mask(lengths, width)[..., None]  # [B, T, 1]
    total = torch.where(valid, hidden, 0).sum(1, dtype=torch.float32)
    mean = (total / lengths.clamp(min=1)[:, None]).to(hidden.dtype)
    largest = hidden.masked_fill(~valid, torch.finfo(hidden.dtype).min).amax(1)
    largest = largest.masked_fill(lengths[:, None] == 0, 0)
    return torch.cat([mean, largest], dim=-1)
