"""Corpora, tokenizer, streams and keyed random bits of the hybrid loop."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from lowp.hybrid import (
    CorpusError,
    Dropout,
    Stream,
    Tokenizer,
    load_dataset_by_name,
    load_docstrings,
    load_files,
    train_tokenizer,
)
from lowp.hybrid.batches import collate
from lowp.hybrid.corpus import harvest
from lowp.hybrid.random import (
    ROW_ELEMENTS,
    integers,
    pass_index,
    permutation,
    row_draws,
    sample_rows,
    uniform,
)
from lowp.key import Role, clock
from lowp.reference.philox import draws

SAMPLES = [(list(range(5, 6 + i % 7)), i % 3) for i in range(23)]


def words_of(text: str) -> str:
    return " ".join(text.casefold().split())


def test_docstrings_have_no_text_or_file_in_two_splits() -> None:
    corpus = load_docstrings(labels_per_class=20, classes=8, seed=0)
    parts = [[t for t, _ in corpus.labelled], corpus.unlabelled, [t for t, _ in corpus.heldout]]
    sets = [{words_of(text) for text in part} for part in parts]
    assert [len(s) for s in sets] == [len(p) for p in parts]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    trained, measured = sets[0] | sets[1], sets[2]
    mixed = [
        path for path, texts in harvest().items()
        if {words_of(t) for t in texts} & trained and {words_of(t) for t in texts} & measured
    ]
    # A text that holds no class name is the same in the corpus, so a file on both sides would show.
    assert mixed == []
    assert Counter(label for _, label in corpus.labelled) == dict.fromkeys(range(8), 20)
    assert {label for _, label in corpus.heldout} == set(range(8))
    assert len(corpus.unlabelled) > 500


def test_docstrings_do_not_name_their_class() -> None:
    corpus = load_docstrings(classes=6)
    texts = [t for t, _ in corpus.labelled + corpus.heldout] + corpus.unlabelled
    tokens = {word for text in texts for word in "".join(
        c if c.isalnum() else " " for c in text.lower()).split()}
    assert not tokens & set(corpus.classes)


def test_docstrings_depend_on_the_seed_alone() -> None:
    assert load_docstrings(seed=3) == load_docstrings(seed=3)
    assert load_docstrings(seed=3).labelled != load_docstrings(seed=4).labelled


@pytest.mark.parametrize("arguments, message", [
    ({"classes": 1}, "classes must be at least 2"),
    ({"classes": 10_000}, "classes must be at least 2 and at most"),
    ({"labels_per_class": 0}, "labels_per_class must be at least 1"),
    ({"labels_per_class": 10**6}, "labels_per_class must be below"),
])
def test_docstrings_refuse_what_there_is_not(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        load_docstrings(**arguments)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def rows(count: int) -> list[tuple[str, str]]:
    return [(f'text "{i}", of kind {i % 2}', "good" if i % 2 else "bad") for i in range(count)]


def csv_text(count: int) -> str:
    quoted = ('"' + text.replace('"', '""') + '"' for text, _ in rows(count))
    lines = [f"{text},{label}" for text, (_, label) in zip(quoted, rows(count), strict=True)]
    return "Sentence,Label\n" + "\n".join(lines)


def test_the_same_rows_from_every_format(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.csv", csv_text(40)),
        write(tmp_path / "a.tsv", "\n".join(f"{t}\t{c}" for t, c in rows(40))),
        write(tmp_path / "b.tsv", "label\ttext\n" + "\n".join(f"{c}\t{t}" for t, c in rows(40))),
        write(tmp_path / "a.jsonl", "\n".join(
            json.dumps({"text": t, "label": c}) for t, c in rows(40))),
    ]
    first, *others = (load_files(file) for file in files)
    assert first.classes == ["bad", "good"]
    assert len(first.labelled) == 30 and len(first.heldout) == 10 and not first.unlabelled
    assert {(t, first.classes[c]) for t, c in first.labelled + first.heldout} == set(rows(40))
    for other in others:
        assert (other.labelled, other.heldout) == (first.labelled, first.heldout)


def test_labels_kept_are_balanced_and_the_rest_is_unlabelled(tmp_path: Path) -> None:
    data = write(tmp_path / "a.csv", csv_text(100))
    more = write(tmp_path / "more.tsv", "text\nnew words\ntext \"3\", of kind 1\n")
    corpus = load_files(data, unlabelled=more, labels=10)
    assert Counter(label for _, label in corpus.labelled) == {0: 5, 1: 5}
    assert len(corpus.unlabelled) == 65 + 1  # the second extra text is in the labelled data
    texts = [t for t, _ in corpus.labelled + corpus.heldout] + corpus.unlabelled
    assert len(texts) == len(set(texts))


def test_a_training_text_that_is_held_out_is_dropped(tmp_path: Path) -> None:
    data = write(tmp_path / "a.csv", csv_text(20))
    held = write(tmp_path / "held.csv", csv_text(4))
    corpus = load_files(data, heldout=held)
    assert len(corpus.heldout) == 4 and len(corpus.labelled) == 16


def test_rows_without_label_are_unlabelled_and_numbers_sort_as_numbers(tmp_path: Path) -> None:
    lines = [{"content": f"text {i}", "target": i % 11} for i in range(60)]
    extra = [{"content": "nothing"}, {"content": "null", "target": None},
             {"content": "minus one", "target": -1}]
    data = write(tmp_path / "a.jsonl", "\n".join(json.dumps(r) for r in lines + extra))
    corpus = load_files(data)
    assert corpus.classes == [str(i) for i in range(11)]
    assert corpus.unlabelled == ["nothing", "null", "minus one"]


@pytest.mark.parametrize("name, content, arguments, message", [
    ("a.txt", "x", {}, r"a\.txt: expected a file that ends in .csv.*found \.txt"),
    ("a.csv", "", {}, "expected at least one row"),
    ("a.csv", "id,words\n1,a\n", {}, "header that names text and label"),
    ("a.csv", "a,b,c\n1,2,3\n", {}, "expected a header that names a text column"),
    ("a.csv", "text,label\na,b\nc\n", {}, "line 3: expected 2 columns as in line 1, found 1"),
    ("a.csv", "text,label\na,b\n", {"label_column": "kind"}, "expected a label column 'kind'"),
    ("a.csv", "text,label\na,b\nc,b\n", {}, "expected labels of at least 2 classes, found"),
    ("a.csv", 'text,label\n"a,b\n', {}, "line 2"),
    ("a.jsonl", '{"text": "a"}\n[1]\n', {}, "line 2: expected an object"),
    ("a.jsonl", '{"text": "a"\n', {}, "line 1: expected one JSON object a line"),
    ("a.jsonl", '{"text": 3, "label": 1}\n', {}, "expected a string in column 'text', found 3"),
    ("a.csv", csv_text(40), {"labels": 1}, "labels must be at least 2"),
    ("a.csv", csv_text(40), {"labels": 31}, "at most 30, the labelled training texts, got 31"),
])
def test_bad_files_say_where_and_what(tmp_path: Path, name: str, content: str,
                                      arguments: dict[str, str], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        load_files(write(tmp_path / name, content), **arguments)


def test_a_held_out_label_that_training_lacks_is_named(tmp_path: Path) -> None:
    held = write(tmp_path / "held.csv", "text,label\nsome words,unheard\n")
    with pytest.raises(CorpusError, match=r"held\.csv, line 2: .*bad, good.*found 'unheard'"):
        load_files(write(tmp_path / "a.csv", csv_text(10)), heldout=held)


def test_a_named_data_set_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"pip install 'lowp\[data\]'"):
        load_dataset_by_name("imdb")


def test_a_named_data_set_becomes_a_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def load_dataset(path: str, subset: str | None) -> dict[str, list[dict[str, object]]]:
            assert (path, subset) == ("glue", "sst2")
            return {
                "train": [{"sentence": f"train {i}", "label": i % 2} for i in range(20)],
                "validation": [{"sentence": f"valid {i}", "label": i % 2} for i in range(6)],
                "test": [{"sentence": f"test {i}", "label": -1} for i in range(4)],
            }

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    corpus = load_dataset_by_name("glue:sst2", labels=4)
    assert len(corpus.labelled) == 4 and len(corpus.unlabelled) == 16
    assert [text for text, _ in corpus.heldout] == [f"valid {i}" for i in range(6)]


TEXTS = ["The cat sat on the mat.", "A cat, a mat; THE end", "naïve café [MASK] 猫"] * 3


@pytest.mark.parametrize("kind", ["word", "wordpiece"])
def test_tokens_start_and_end_and_round_trip(kind: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 200, kind)
    encoded = tokenizer.encode_batch([*TEXTS[:3], "", "☃"], 6)
    assert all(row[0] == 3 and row[-1] == 4 and len(row) <= 6 for row in encoded)
    assert encoded[3] == [3, 4] and encoded[4] == [3, 1, 4]
    assert tokenizer.encode_batch(["THE CAT"], 9) == tokenizer.encode_batch(["the cat"], 9)
    # what a text says is never a special token, only what is not known or not said
    inner = tokenizer.encode_batch(["[MASK] [PAD] [CLS]"], 30)[0][1:-1]
    assert set(inner) & {0, 2, 3, 4} == set()
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode_batch(TEXTS, 20) == tokenizer.encode_batch(TEXTS, 20)
    assert again.vocab_size == tokenizer.vocab_size <= 200


def test_wordpieces_spell_unseen_words_and_words_do_not() -> None:
    pieces, words = (train_tokenizer(TEXTS, 200, kind) for kind in ("wordpiece", "word"))
    assert 1 not in pieces.encode_batch(["matcat"], 20)[0]
    assert words.encode_batch(["matcat"], 20)[0] == [3, 1, 4]
    assert [words.token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[EOS]"]


def test_the_vocabulary_keeps_to_its_size_with_many_scripts() -> None:
    texts = ["".join(chr(0x4E00 + 40 * i + j) for j in range(40)) for i in range(50)]
    for kind in ("wordpiece", "word"):
        assert train_tokenizer([*texts, *TEXTS], 100, kind).vocab_size <= 100


def test_vocabularies_are_the_same_in_every_process() -> None:
    program = (
        "from lowp.hybrid.corpus import load_docstrings\n"
        "from lowp.hybrid.tokenizer import train_tokenizer\n"
        "import hashlib\n"
        "texts = load_docstrings().unlabelled[:400]\n"
        "print(hashlib.sha256(train_tokenizer(texts, 800).to_json().encode()).hexdigest())\n"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                           check=True, cwd=Path(__file__).parents[1]).stdout.strip()
    texts = load_docstrings().unlabelled[:400]
    assert hashlib.sha256(train_tokenizer(texts, 800).to_json().encode()).hexdigest() == other


@pytest.mark.parametrize("arguments, message", [
    ((TEXTS, 200, "bpe"), "kind must be"), ((TEXTS, 10), "vocab_size must be at least 64"),
    (([" "], 100), "at least one word"),
])
def test_training_a_tokenizer_refuses(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "BPE"}}', "[]"])
def test_what_is_not_a_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="from_json"):
        Tokenizer.from_json(text)


@pytest.mark.parametrize("batch_size", [1, 4, 23, 50])
def test_a_stream_reads_every_sample_once_an_epoch(batch_size: int) -> None:
    stream = Stream(SAMPLES, batch_size, seed=5)
    ids: list[int] = []
    while len(ids) < 4 * len(SAMPLES):
        batch = stream.next()
        ids += batch.sample_ids.tolist()
        for i, sample in enumerate(batch.sample_ids.tolist()):
            tokens, label = SAMPLES[sample]
            assert batch.tokens[i, : batch.lengths[i]].tolist() == tokens
            assert batch.labels is not None and int(batch.labels[i]) == label
            assert not batch.tokens[i, batch.lengths[i]:].any()
    epochs = [ids[k * 23 : (k + 1) * 23] for k in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_streams_of_other_seeds_and_data_sets_have_other_orders() -> None:
    orders = {
        tuple(Stream(SAMPLES, 23, seed, dataset).next().sample_ids.tolist())
        for seed in (0, 1, 2**40) for dataset in (0, 1)
    }
    assert len(orders) == 6


def test_a_permutation_favours_no_place() -> None:
    n, trials = 8, 4000
    counts = torch.zeros(n, n)
    for epoch in range(trials):
        counts[torch.arange(n), permutation(n, 1, epoch, 0)] += 1
    # Chi-square of 8 x 8 counts with fixed margins has 49 degrees of freedom: mean 49, deviation
    # 9.9. 110 is exceeded by a fair order with probability 1.3e-6.
    assert float(((counts - trials / n) ** 2 / (trials / n)).sum()) < 110


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_stream_goes_on_from_its_state(steps: int) -> None:
    straight, resumed = Stream(SAMPLES, 5), Stream(SAMPLES, 5)
    for _ in range(steps):
        straight.next()
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for _ in range(12):
        a, b = straight.next(), resumed.next()
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.sample_ids, b.sample_ids)
    with pytest.raises(ValueError, match="must be of 3 samples, got 23"):
        Stream(SAMPLES[:3], 1).load_state_dict(straight.state_dict())


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_global_batch(world_size: int) -> None:
    whole = Stream(SAMPLES, 6)
    ranks = [Stream(SAMPLES, 6, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(9):
        parts = [rank.next().sample_ids.tolist() for rank in ranks]
        assert [i for part in parts for i in part] == whole.next().sample_ids.tolist()
        assert {rank.cursor for rank in ranks} == {whole.cursor}


@pytest.mark.parametrize("arguments, message", [
    (([], 1), "samples must be"), ((SAMPLES, 0), "batch_size must be a positive multiple"),
    ((SAMPLES, 5, 0, 0, 0, 2), "multiple of world_size 2, got 5"),
    ((SAMPLES, 4, 0, 0, 2, 2), "rank must be in"),
])
def test_a_stream_refuses(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stream(*arguments)  # type: ignore[arg-type]


def test_a_batch_is_labelled_or_not() -> None:
    assert collate([([5], None), ([], None)], [0, 1]).labels is None
    with pytest.raises(ValueError, match="1 of 2 with one"):
        collate([([5], 1), ([6], None)], [0, 1])


def test_rows_draw_what_the_whole_tensor_would() -> None:
    rows = torch.tensor([0, 3, 2**27 - 1, 3])
    found = row_draws(rows, 21, 2**40 + 7, 5, 9, Role.DROPOUT)
    for row, drawn in zip(rows.tolist(), found, strict=True):
        assert torch.equal(drawn, draws(2**40 + 7, 5, 9, 16, 21, offset=row * ROW_ELEMENTS))
    with pytest.raises(ValueError, match="rows must be in"):
        row_draws(torch.tensor([2**27]), 1, 0, 1, 0, 16)


def test_uniform_and_integers_are_uniform() -> None:
    x = uniform((100, 1000), 1, 1, 1, 17)
    assert x.dtype == torch.float32 and float(x.min()) >= 0 and float(x.max()) < 1
    # A mean of 1e5 uniforms has deviation 0.289 / 316 = 9.1e-4: 5 of them, once in 1.7 million.
    assert abs(float(x.mean()) - 0.5) < 4.6e-3
    counts = integers(torch.arange(100), 700, 7, 1, 1, 1, 17).flatten().bincount(minlength=7)
    # Chi-square with 6 degrees of freedom: above 38.3 once in a million.
    assert float(((counts - 10_000.0) ** 2 / 10_000).sum()) < 38.3 and len(counts) == 7


def test_dropout_is_a_function_of_its_key() -> None:
    x = torch.ones(6, 10, 50)
    layer = Dropout(0.25, seed=1, name="a")
    first = layer(x)
    assert torch.equal(first, layer(x)) and torch.equal(first, Dropout(0.25, seed=1, name="a")(x))
    assert set(first.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    # 3000 draws of probability 1/4: deviation 23.7; 5 of them, once in 1.7 million.
    assert abs(int((first == 0).sum()) - 750) < 119
    others = [Dropout(0.25, seed=2, name="a")(x), Dropout(0.25, seed=1, name="b")(x)]
    with pass_index(1):
        others.append(layer(x))
    clock.advance()
    others.append(layer(x))
    assert all(not torch.equal(first, other) for other in others)
    layer.eval()
    assert layer(x) is x


def test_dropout_belongs_to_the_sample_not_to_its_place() -> None:
    layer = Dropout(0.5)
    x = torch.ones(3, 4, 8)
    with sample_rows(torch.tensor([7, 2, 11])):
        whole = layer(x)
    with sample_rows(torch.tensor([11, 7])):
        part = layer(torch.ones(2, 9, 8))
    assert torch.equal(part[1, :4], whole[0]) and torch.equal(part[0, :4], whole[2])
    row, time = torch.tensor([0, 0, 2, 2]), torch.tensor([0, 3, 1, 2])
    with sample_rows(torch.tensor([7, 2, 11])):
        assert torch.equal(layer(torch.ones(4, 8), (row, time)), whole[row, time])
    with sample_rows(torch.tensor([1])), pytest.raises(ValueError, match=r"3 rows.* 1 sample ids"):
        layer(x)


def test_shared_dropout_holds_for_all_time_steps() -> None:
    y = Dropout(0.5, shared=True)(torch.ones(3, 5, 40))
    assert torch.equal(y, y[:, :1].expand_as(y)) and not torch.equal(y[0], y[1])


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_dropout_refuses(p: float) -> None:
    with pytest.raises(ValueError):
        Dropout(p)
