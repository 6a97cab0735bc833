"""Summarization: the body of a docstring to its first line; ROUGE.

    python -m examples.summarization                                  # the standard library
    python -m examples.summarization --data pairs.jsonl               # {"text": …, "summary": …}
    python -m examples.summarization --dataset EdinburghNLP/xsum      # online
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from examples.sequence_to_sequence import Corpus, Pair, run, without_repetitions
from examples.training import options
from lowp.hybrid.corpus import harvest
from lowp.hybrid.random import permutation
from lowp.key import tensor_id

LEAST_WORDS = 8  # a shorter body says nothing to sum up


def docstrings(seed: int = 0) -> Corpus:
    """Bodies and first lines of this Python's docstrings; a quarter of the files is held out."""
    files = harvest()
    paths = sorted(files)
    mixed = [paths[i] for i in permutation(len(paths), seed, 0, tensor_id("files")).tolist()]
    held = set(mixed[: len(mixed) // 4])
    training: list[Pair] = []
    heldout: list[Pair] = []
    for path in mixed:
        for text in files[path]:
            first, _, body = text.partition("\n\n")
            summary, source = " ".join(first.split()), " ".join(body.split())
            if len(source.split()) >= LEAST_WORDS and 3 <= len(summary.split()) <= 20:
                (heldout if path in held else training).append((source, summary))
    return without_repetitions("docstrings", training, heldout)


def from_file(path: Path) -> Corpus:
    """JSON lines with ``text`` and ``summary``; every fourth is held out."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    pairs = [(row["text"], row["summary"]) for row in rows]
    return without_repetitions(path.stem, [p for i, p in enumerate(pairs) if i % 4], pairs[::4])


def from_hub(name: str) -> Corpus:
    """A data set with the columns ``document`` and ``summary``."""
    import datasets

    splits = datasets.load_dataset(name)
    parts = [[(row["document"], row["summary"]) for row in splits[split]]
             for split in ("train", "validation")]
    return without_repetitions(name, *parts)


def rouge(decoded: list[str], references: list[str]) -> dict[str, float]:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, "ROUGE", ACL 2004 workshop), times 100."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(reference, text)
              for reference, text in zip(references, decoded, strict=True)]
    return {kind: 100 * statistics.fmean(score[kind].fmeasure for score in scores)
            for kind in ("rouge1", "rouge2", "rougeL")}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure."""
    arguments = options(__doc__, "JSON lines with text and summary", 500).parse_args(words)
    if arguments.dataset:
        corpus = from_hub(arguments.dataset)
    else:
        corpus = from_file(arguments.data) if arguments.data else docstrings(arguments.seed)
    return run("summarization", corpus, arguments, (96, 32), 4000, rouge)


if __name__ == "__main__":
    main()
