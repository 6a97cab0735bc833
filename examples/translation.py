"""Translation: Multi30k English to German where it is there, else numbers in words; BLEU.

    python -m examples.translation                       # numbers in words, made here
    python -m examples.translation --data ../shared/data/multi30k --steps 600
    python -m examples.translation --dataset bentrevett/multi30k    # online
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sacrebleu

from examples.sequence_to_sequence import Corpus, run, without_repetitions
from examples.training import options

_EN = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_EN_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_DE = (
    "null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn",
    "elf", "zwölf", "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn",
    "neunzehn")
_DE_TENS = ("zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")


def english(n: int) -> str:
    """A number below a million in English words."""
    if n < 20:
        return _EN[n]
    if n < 100:
        return _EN_TENS[n // 10 - 2] + (f"-{_EN[n % 10]}" if n % 10 else "")
    base, unit = (1000, "thousand") if n >= 1000 else (100, "hundred")
    rest = n % base
    joint = " and " if rest and rest < 100 else " "
    return f"{english(n // base)} {unit}" + (joint + english(rest) if rest else "")


def german(n: int, alone: bool = True) -> str:
    """A number below a million in German words: units before tens, all in one word."""
    if n == 1:
        return "eins" if alone else "ein"
    if n < 20:
        return _DE[n]
    if n < 100:
        ten = _DE_TENS[n // 10 - 2]
        return (f"{german(n % 10, False)}und" if n % 10 else "") + ten
    base, unit = (1000, "tausend") if n >= 1000 else (100, "hundert")
    rest = n % base
    return german(n // base, False) + unit + (german(rest) if rest else "")


def numbers(seed: int = 0, count: int = 6000) -> Corpus:
    """Different numbers below a million in both languages."""
    chosen = random.Random(seed).sample(range(1_000_000), count)
    pairs = [(english(n), german(n)) for n in chosen]
    return without_repetitions("numbers in words", pairs[500:], pairs[:500])


def _lines(folder: Path, stem: str, language: str) -> list[str]:
    for path in (folder / f"{stem}.{language}.gz", folder / f"{stem}.{language}"):
        if path.is_file():
            data = path.read_bytes()
            text = gzip.decompress(data) if path.suffix == ".gz" else data
            return text.decode("utf-8").strip().split("\n")
    raise FileNotFoundError(f"{folder} holds neither {stem}.{language} nor "
                            f"{stem}.{language}.gz")


def from_folder(folder: Path) -> Corpus:
    """Files ``train.en``, ``train.de``, ``val.en``, ``val.de``, line by line, gzipped or not."""
    parts = [list(zip(_lines(folder, stem, "en"), _lines(folder, stem, "de"), strict=True))
             for stem in ("train", "val")]
    return without_repetitions(folder.name, *parts)


def from_hub(name: str) -> Corpus:
    """A data set with the columns ``en`` and ``de``."""
    import datasets

    splits = datasets.load_dataset(name)
    parts = [[(row["en"], row["de"]) for row in splits[split]] for split in ("train", "validation")]
    return without_repetitions(name, *parts)


def bleu(decoded: list[str], references: list[str]) -> dict[str, float]:
    """Corpus BLEU (Post, "A call for clarity in reporting BLEU scores", WMT 2018), chrF, and exact
    matches in percent: a number is one German word, in which BLEU finds no 4-grams."""
    right = sum(text == reference for text, reference in zip(decoded, references, strict=True))
    return {"bleu": sacrebleu.corpus_bleu(decoded, [references]).score,
            "chrf": sacrebleu.corpus_chrf(decoded, [references]).score,
            "exact_match": 100 * right / max(1, len(references))}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure."""
    arguments = options(__doc__, "folder with train.en, train.de, val.en and val.de", 400)\
        .parse_args(words)
    if arguments.dataset:
        corpus = from_hub(arguments.dataset)
    else:
        corpus = from_folder(arguments.data) if arguments.data else numbers(arguments.seed)
    vocab = 400 if corpus.name == "numbers in words" else 6000
    return run("translation", corpus, arguments, (40, 40), vocab, bleu)


if __name__ == "__main__":
    main()
