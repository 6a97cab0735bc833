"""A small encoder-decoder from source to target texts, for translation and summarization."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from examples.subwords import END, IGNORED, PAD, encode, learn, padded
from examples.training import Batch, cross_entropy, finish, order, prepare, train

Pair = tuple[str, str]


class Corpus(NamedTuple):
    """Pairs of source and target; ``heldout`` is not trained on."""

    name: str
    training: list[Pair]
    heldout: list[Pair]


def without_repetitions(name: str, training: Sequence[Pair], heldout: Sequence[Pair]) -> Corpus:
    """A corpus in which no source text of the held-out pairs is trained on."""
    held = list(dict(heldout).items())
    sources = {source for source, _ in held}
    return Corpus(name, [pair for pair in training if pair[0] not in sources], held)


def batch(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """What the model takes: source tokens, their mask and the labels."""
    sources = padded([source for source, _ in pairs])
    return {"input_ids": sources, "attention_mask": (sources != PAD).long(),
            "labels": padded([target for _, target in pairs], IGNORED)}


def loss_of(model: nn.Module, part: Batch) -> Tensor:
    """Cross-entropy of the target under teacher forcing."""
    return cross_entropy(model(**part).logits, part["labels"])


def run(name: str, corpus: Corpus, arguments: argparse.Namespace, longest: tuple[int, int],
        vocab_size: int, score: Callable[[list[str], list[str]], Mapping[str, float]],
        ) -> dict[str, Any]:
    """Train, decode held-out texts greedily, and score them.

    Args:
        longest: tokens kept of a source and of a target.
        score: decoded texts and references to metrics.
    """
    torch.manual_seed(arguments.seed)
    tokenizer = learn((text for pair in corpus.training for text in pair), vocab_size)

    def rows(pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        sources, targets = (encode(tokenizer, [pair[side] for pair in pairs], longest[side])
                            for side in (0, 1))
        return list(zip(sources, targets, strict=True))

    training, heldout = rows(corpus.training), rows(corpus.heldout)
    width = arguments.width
    model, optimizer = prepare(T5ForConditionalGeneration(T5Config(
        vocab_size=tokenizer.get_vocab_size(), d_model=width, d_kv=width // 4, num_heads=4,
        d_ff=2 * width, num_layers=2, feed_forward_proj="gated-gelu", dropout_rate=0.1,
        pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD)), arguments)
    facts = train(model, optimizer, lambda step: batch(
        [training[i] for i in order(len(training), arguments.batch, step, arguments.seed)]),
        loss_of, arguments)
    model.eval()
    decoded: list[str] = []
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(heldout), 64):
            part = batch(heldout[start:start + 64])
            tokens = int((part["labels"] != IGNORED).sum())
            total += float(loss_of(model, part)) * tokens
            count += tokens
            if start < arguments.evaluate:
                made = model.generate(  # type: ignore[operator]
                    part["input_ids"], attention_mask=part["attention_mask"],
                    max_new_tokens=longest[1], do_sample=False)
                decoded += [text.strip() for text in tokenizer.decode_batch(made.tolist())]
    decoded = decoded[: arguments.evaluate]
    references = [target for _, target in corpus.heldout[: len(decoded)]]
    for (source, target), text in list(zip(corpus.heldout, decoded, strict=False))[:3]:
        print(f"  {source[:90]!r}\n    expected {target!r}\n    decoded  {text!r}")
    return finish(name, {
        "corpus": corpus.name, "training": len(training), "heldout": len(heldout),
        "heldout_loss": total / count, **score(decoded, references), **facts}, arguments)
