"""The examples run: every client trains, every application measures what its field measures."""

from __future__ import annotations

import gzip
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
pytest.importorskip("rouge_score", reason="rouge-score is not installed")

from examples import language_modelling, question_answering, summarization, translation
from examples.question_answering import best_span, exact, f1
from examples.sequence_to_sequence import without_repetitions
from examples.subwords import encode, learn, padded
from examples.training import order
from lowp.hybrid.config import read_yaml, resolve

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--steps", "3", "--width", "32", "--batch", "4", "--evaluate", "4"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models of this size are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "needs"), [
    ("trainer", "accelerate"), ("accelerate", "accelerate"), ("lightning", "lightning"),
    ("lora", "peft")])
def test_client_trains(name: str, needs: str, tmp_path: Path,
                       monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(needs, reason=f"{needs} is not installed")
    if needs == "accelerate":  # it keeps one state a process, which Trainer and Accelerator set
        importlib.import_module("accelerate.state").AcceleratorState._reset_state(True)
    monkeypatch.chdir(tmp_path)
    losses = importlib.import_module(f"examples.{name}_client").main(steps=12)
    assert len(losses) == 12 and all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def result_of(main: Any, tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "results" / "out.json"
    result = main([*TINY, *words, "--out", str(out)])
    assert json.loads(out.read_text())["heldout_loss"] == result["heldout_loss"]
    assert math.isfinite(result["heldout_loss"]) and result["seconds_per_step"] > 0
    assert result["settings"]["steps"] == 3
    return result  # type: ignore[no-any-return]


def folder_of_pairs(tmp_path: Path) -> Path:
    pairs = [(translation.english(n), translation.german(n)) for n in range(100, 160)]
    for stem, some in (("train", pairs[:50]), ("val", pairs[45:])):
        for side, language in ((0, "en"), (1, "de")):
            text = "\n".join(pair[side] for pair in some) + "\n"
            (tmp_path / f"{stem}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


@pytest.mark.parametrize("precision", ["int8", "fp32", "torch"])
def test_translation(precision: str, tmp_path: Path) -> None:
    folder = folder_of_pairs(tmp_path)
    assert len(translation.from_folder(folder).training) == 45  # five are held out too
    result = result_of(translation.main, tmp_path, "--data", str(folder), "--precision", precision)
    assert 0 <= result["bleu"] <= 100 and result["heldout"] == 15
    # weights, gradients and two moments: 4 bytes each, or 2, 2, 1 and 1 with the blocks' scales
    # and with the fp32 moments of tensors below 4096 elements, of which so small a model has many
    if precision == "int8":
        assert 6 < result["bytes_per_parameter"] < 12
    else:
        assert result["bytes_per_parameter"] == pytest.approx(16, abs=0.1)


def test_numbers_in_words() -> None:
    assert [translation.english(n) for n in (0, 13, 40, 85, 200, 342, 1001, 940_118)] == [
        "zero", "thirteen", "forty", "eighty-five", "two hundred", "three hundred and forty-two",
        "one thousand and one", "nine hundred and forty thousand one hundred and eighteen"]
    assert [translation.german(n) for n in (0, 1, 13, 21, 85, 101, 342, 1001, 21_000, 940_118)] == [
        "null", "eins", "dreizehn", "einundzwanzig", "fünfundachtzig", "einhunderteins",
        "dreihundertzweiundvierzig", "eintausendeins", "einundzwanzigtausend",
        "neunhundertvierzigtausendeinhundertachtzehn"]
    corpus = translation.numbers(seed=1, count=600)
    assert len(corpus.training) == 100 and len(corpus.heldout) == 500
    assert corpus == translation.numbers(seed=1, count=600)


def test_scores_of_the_field() -> None:
    texts = ["ein Mann geht über die Straße .", "zwei Hunde spielen im hohen Gras ."]
    same, turned = translation.bleu(texts, texts), translation.bleu(texts[::-1], texts)
    assert same["bleu"] == pytest.approx(100) and same["exact_match"] == 100
    assert turned["bleu"] < 10 and turned["exact_match"] < 100
    assert summarization.rouge(["the cat sat"], ["the cat sat"])["rougeL"] == pytest.approx(100)
    # one of two words found, one of three wanted found: F = 2 · 1/2 · 1/3 / (1/2 + 1/3)
    assert summarization.rouge(["a dog"], ["dog sat down"])["rouge1"] == pytest.approx(40)
    assert exact("The Cat!", "cat") == 1 and exact("cats", "cat") == 0
    assert f1("the big cat", "cat") == pytest.approx(2 / 3) and f1("dog", "cat") == 0
    assert exact("()", "()") == f1("()", "()") == 1 and exact("()", "[]") == 0


def test_best_span_is_ordered_and_short() -> None:
    first = torch.tensor([0.0, 9.0, 0.0, 8.0, 0.0])
    last = torch.tensor([9.0, 0.0, 5.0, 0.0, 6.0])
    assert best_span(first, last) == (1, 4)
    assert best_span(first, last, longest=2) == (1, 2)


def test_summarization(tmp_path: Path) -> None:
    corpus = summarization.docstrings()
    assert len(corpus.training) > 3 * len(corpus.heldout) / 2 > 100
    assert all(len(target.split()) <= 20 for _, target in corpus.heldout)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(
        json.dumps({"text": source, "summary": target}) + "\n"
        for source, target in corpus.training[:40]))
    result = result_of(summarization.main, tmp_path, "--data", str(path))
    assert result["heldout"] == 10 and {"rouge1", "rouge2", "rougeL"} <= set(result)


def test_question_answering(tmp_path: Path) -> None:
    _, training, heldout = question_answering.signatures()
    assert len(training) > len(heldout) > 100
    for q in heldout:
        assert q.context[q.start:].startswith(q.answer)
    articles = [{"paragraphs": [{"context": q.context, "qas": [
        {"question": q.question, "answers": [{"text": q.answer, "answer_start": q.start}]}]}]}
        for q in training[:40]]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": articles}))
    result = result_of(question_answering.main, tmp_path, "--data", str(path))
    assert result["heldout"] == 4 and 0 <= result["exact_match"] <= result["f1"] <= 100
    tokenizer = learn((q.context for q in training[:200]), 1000)
    q = training[0]
    made = question_answering.example(tokenizer, q)
    assert made is not None
    found = q.context[made.offsets[made.first][0]:made.offsets[made.last][1]]
    assert q.answer in found


def test_language_modelling(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_text("".join(f"{translation.english(n)} is {n}.\n" for n in range(2000)))
    result = result_of(language_modelling.main, tmp_path, "--data", str(path))
    assert result["perplexity"] == pytest.approx(math.exp(result["heldout_loss"]))
    assert 0 < result["bits_per_byte"] < 8
    name, training, heldout = language_modelling.standard_library()
    assert name == "docstrings" and len(training) > 5 * len(heldout) > 10_000


def test_text_classification_is_a_valid_configuration() -> None:
    settings = resolve(read_yaml(ROOT / "examples" / "text_classification.yaml"))
    assert settings.precision.linear == "int8" and settings.data.path is None


def test_tokens_and_order() -> None:
    tokenizer = learn(["drei Bäume", "drei Häuser"], 300)
    rows = encode(tokenizer, ["drei Bäume", "x"], 40)
    assert [tokenizer.decode(row[:-1]) for row in rows] == ["drei Bäume", "x"]
    assert padded(rows).shape == (2, len(rows[0])) and padded(rows)[1, -1] == 0
    epoch = [i for step in range(5) for i in order(10, 2, step, 3)]
    assert sorted(epoch) == list(range(10)) and order(10, 2, 5, 3) != order(10, 2, 0, 3)
    corpus = without_repetitions("x", [("a", "1"), ("b", "2")], [("a", "3"), ("a", "4")])
    assert corpus.training == [("b", "2")] and corpus.heldout == [("a", "4")]
