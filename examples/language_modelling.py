"""Language modelling: a GPT-2 on tinyshakespeare or on the standard library's text; perplexity.

    python -m examples.language_modelling                             # the standard library's text
    python -m examples.language_modelling --data ../shared/data/tinyshakespeare/input.txt
    python -m examples.language_modelling --dataset wikitext:wikitext-2-raw-v1      # online
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from examples.subwords import END, START, learn
from examples.training import Batch, cross_entropy, finish, options, order, prepare, train
from lowp.hybrid.corpus import harvest

LENGTH = 64  # tokens a row
HELDOUT = 0.1


def standard_library() -> tuple[str, str, str]:
    """Name, training and held-out text: all docstrings, the last tenth of the files held out."""
    files = harvest()
    paths = sorted(files)
    cut = round((1 - HELDOUT) * len(paths))
    parts = ["\n\n".join(text for path in some for text in files[path])
             for some in (paths[:cut], paths[cut:])]
    return "docstrings", parts[0], parts[1]


def from_hub(name: str) -> tuple[str, str, str]:
    """A data set with the column ``text``."""
    import datasets

    path, _, subset = name.partition(":")
    splits = datasets.load_dataset(path, subset or None)
    return name, "".join(splits["train"]["text"]), "".join(splits["validation"]["text"])


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each next token."""
    tokens = batch["input_ids"]
    return cross_entropy(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:])


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure."""
    arguments = options(__doc__, "a text file, the last tenth of which is held out", 400)\
        .parse_args(words)
    if arguments.dataset:
        name, training, heldout = from_hub(arguments.dataset)
    elif arguments.data:
        text = arguments.data.read_text(encoding="utf-8")
        cut = round((1 - HELDOUT) * len(text))
        name, training, heldout = arguments.data.stem, text[:cut], text[cut:]
    else:
        name, training, heldout = standard_library()
    torch.manual_seed(arguments.seed)
    tokenizer = learn([training], 2000)
    rows = [
        torch.tensor(tokenizer.encode(text).ids).unfold(0, LENGTH + 1, LENGTH)
        for text in (training, heldout)
    ]
    model, optimizer = prepare(GPT2LMHeadModel(GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=LENGTH, n_embd=arguments.width,
        n_layer=2, n_head=4, bos_token_id=START, eos_token_id=END)), arguments)
    facts = train(model, optimizer, lambda step: {
        "input_ids": rows[0][order(len(rows[0]), arguments.batch, step, arguments.seed)]},
        loss_of, arguments)
    model.eval()
    with torch.no_grad():
        losses = [(float(loss_of(model, {"input_ids": part})), len(part))
                  for part in rows[1].split(64)]
    loss = sum(value * count for value, count in losses) / sum(count for _, count in losses)
    spelled = tokenizer.decode(rows[1].flatten().tolist())
    bits = loss * rows[1][:, 1:].numel() / math.log(2) / len(spelled.encode())
    return finish("language modelling", {
        "corpus": name, "training": rows[0].numel(), "heldout": rows[1].numel(),
        "heldout_loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits, **facts},
        arguments)


if __name__ == "__main__":
    main()
