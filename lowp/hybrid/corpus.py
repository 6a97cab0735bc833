"""Texts with and without labels: the running Python's docstrings, files, or a named data set."""

from __future__ import annotations

import ast
import functools
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowp.hybrid.random import permutation
from lowp.hybrid.tables import CorpusError, Row, read_rows
from lowp.key import tensor_id

HELDOUT = 0.25  # part of a class, or of a file, that is held out
MIN_FILES = 5  # a package of fewer files with docstrings cannot be split by file
MIN_WORDS = 3  # shorter docstrings say nothing of where they come from
_TESTS = re.compile(r"(.*_)?tests?|test_.*|__pycache__|site-packages|dist-packages")


@dataclass
class Corpus:
    """Texts for a hybrid run; no text is in more than one of the three lists.

    Attributes:
        name: where they come from.
        labelled: training texts, each with the number of its class.
        unlabelled: training texts without a label.
        heldout: texts that accuracy is measured on.
        classes: the classes' names.
    """

    name: str
    labelled: list[tuple[str, int]]
    unlabelled: list[str]
    heldout: list[tuple[str, int]]
    classes: list[str]


def _shuffled(items: list[Any], seed: int, name: str) -> list[Any]:
    """In an order that depends on the seed and the name alone."""
    return [items[i] for i in permutation(len(items), seed, 0, tensor_id(name)).tolist()]


def _identity(text: str) -> str:
    """What makes two texts the same: their words, whatever their case and spacing."""
    return " ".join(text.casefold().split())


def _docstrings(tree: ast.AST) -> Iterator[str]:
    """The docstrings of a module and of all classes and functions in it, in order."""
    if isinstance(tree, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(tree)
        if text:
            yield text
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _docstrings(child)


@functools.lru_cache(maxsize=1)
def harvest() -> dict[str, list[str]]:
    """Docstrings of the running Python's standard library by file, relative to the library.

    Folders and files of tests are left out, and so are files that do not parse. A text that
    occurs more than once is kept where it comes first in the order of the paths.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, list[str]] = {}
    seen: set[str] = set()
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not _TESTS.fullmatch(name))
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix != ".py" or _TESTS.fullmatch(path.stem):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # escapes in code that is not ours
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue
            texts = []
            for text in _docstrings(tree):
                same = _identity(text)
                if same not in seen and len(same.split()) >= MIN_WORDS:
                    seen.add(same)
                    texts.append(text)
            if texts:
                files[path.relative_to(root).as_posix()] = texts
    return files


def _largest_packages(files: dict[str, list[str]], count: int) -> list[str]:
    """Names of the packages with the most docstrings, largest first."""
    texts: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for path, found in files.items():
        package, slash, _ = path.partition("/")
        if slash:
            texts[package] += len(found)
            modules[package] += 1
    fit = [package for package in texts if modules[package] >= MIN_FILES]
    if count < 2 or len(fit) < count:
        raise CorpusError(
            f"lowp.hybrid.load_docstrings: classes must be at least 2 and at most {len(fit)}, the "
            f"packages of at least {MIN_FILES} files in {sysconfig.get_path('stdlib')}, "
            f"got {count}"
        )
    return sorted(fit, key=lambda package: (-texts[package], package))[:count]


def _split_files(paths: list[str], files: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Training and held-out files: about HELDOUT of the texts are held out."""
    total = sum(len(files[path]) for path in paths)
    training: list[str] = []
    heldout: list[str] = []
    count = 0
    for path in paths:
        # a file may overshoot by a tenth of the package; a larger one is trained on
        if count < HELDOUT * total and count + len(files[path]) <= (HELDOUT + 0.1) * total:
            heldout.append(path)
            count += len(files[path])
        else:
            training.append(path)
    return training, heldout


def load_docstrings(labels_per_class: int = 20, classes: int = 8, seed: int = 0) -> Corpus:
    """Docstrings of the running Python's standard library; the class is the top-level package.

    The largest packages are the classes. Every package is split by file, so no text of a held-out
    file is trained on, and equal texts are kept once. Of a class's training texts
    ``labels_per_class`` keep their label, the others are unlabelled. The names of the classes are
    cut out of all texts (as whole words, whatever their case, an underscore left in their place),
    for otherwise a text such as "asyncio event loop" would name its own label. What remains, the
    vocabulary of a package, is what is to be learned.

    Args:
        labels_per_class: labels to keep in each class.
        classes: how many packages.
        seed: of the split and of which labels are kept.

    Raises:
        CorpusError: not so many packages, or fewer texts in one than labels.
    """
    if labels_per_class < 1:
        raise CorpusError("lowp.hybrid.load_docstrings: labels_per_class must be at least 1, "
                          f"got {labels_per_class}")
    files = harvest()
    names = _largest_packages(files, classes)
    words = re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, names))})(?![^\W_])", re.I)
    corpus = Corpus("docstrings", [], [], [], names)
    for label, name in enumerate(names):
        paths = sorted(path for path in files if path.startswith(f"{name}/"))
        training, heldout = _split_files(_shuffled(paths, seed, f"files of {name}"), files)
        texts = _shuffled([t for path in training for t in files[path]], seed, f"texts of {name}")
        if len(texts) <= labels_per_class or not heldout:
            raise CorpusError(
                f"lowp.hybrid.load_docstrings: labels_per_class must be below {len(texts)}, the "
                f"training texts of the package {name}, got {labels_per_class}"
            )
        masked = [words.sub("_", text) for text in texts]
        corpus.labelled += [(text, label) for text in masked[:labels_per_class]]
        corpus.unlabelled += masked[labels_per_class:]
        corpus.heldout += [(words.sub("_", t), label) for path in heldout for t in files[path]]
    return _without_repetitions(corpus)


def _without_repetitions(corpus: Corpus) -> Corpus:
    """Every text once: a held-out text is not trained on, a labelled one not unlabelled too."""
    seen: set[str] = set()

    def fresh(text: str) -> bool:
        same = _identity(text)
        if not same or same in seen:
            return False
        seen.add(same)
        return True

    heldout = [(text, label) for text, label in corpus.heldout if fresh(text)]
    labelled = [(text, label) for text, label in corpus.labelled if fresh(text)]
    unlabelled = [text for text in corpus.unlabelled if fresh(text)]
    return Corpus(corpus.name, labelled, unlabelled, heldout, corpus.classes)


def _class_names(labels: Iterable[str]) -> list[str]:
    """In the order of numbers if all are numbers, else of the alphabet."""
    distinct = set(labels)
    if all(re.fullmatch(r"[+-]?\d+", label) for label in distinct):
        return sorted(distinct, key=lambda label: (int(label), label))
    return sorted(distinct)


def _keep_labels(rows: list[tuple[str, int]], labels: int | None, classes: int, seed: int,
                 source: str) -> tuple[list[tuple[str, int]], list[str]]:
    """``labels`` of the rows, evenly over the classes as far as they go; the others' texts."""
    if labels is None:
        return rows, []
    if not classes <= labels <= len(rows):
        raise CorpusError(
            f"{source}: labels must be at least {classes}, the number of classes, and at most "
            f"{len(rows)}, the labelled training texts, got {labels}"
        )
    queues: list[list[tuple[str, int]]] = [[] for _ in range(classes)]
    for row in _shuffled(rows, seed, "labels"):
        queues[row[1]].append(row)
    turns = [(turn, label) for label, queue in enumerate(queues) for turn in range(len(queue))]
    kept = {(turn, label) for turn, label in sorted(turns)[:labels]}
    labelled = [queues[label][turn] for turn, label in sorted(kept)]
    return labelled, [queues[label][turn][0] for turn, label in turns if (turn, label) not in kept]


def _assemble(name: str, training: list[Row], unlabelled: list[Row], heldout: list[Row] | None,
              labels: int | None, seed: int) -> Corpus:
    """A corpus of rows; without held-out rows a part of the labelled ones is held out."""
    known = [(row.text, row.label) for row in training if row.label is not None]
    names = _class_names(label for _, label in known)
    if len(names) < 2:
        raise CorpusError(f"{name}: expected labels of at least 2 classes, found {names}")
    number = {label: index for index, label in enumerate(names)}
    rows = [(text, number[label]) for text, label in known]
    others = [row.text for row in training if row.label is None] + [r.text for r in unlabelled]
    if heldout is None:
        once = _without_repetitions(Corpus(name, rows, [], [], names)).labelled
        mixed = _shuffled(once, seed, "held out")
        count = max(1, round(HELDOUT * len(mixed)))
        measured, rows = mixed[:count], mixed[count:]
    else:
        for row in heldout:
            if row.label not in number:
                raise CorpusError(f"{row.place}: expected a label that the training data have "
                                  f"({', '.join(names[:20])}), found {row.label!r}")
        measured = [(row.text, number[str(row.label)]) for row in heldout]
    corpus = _without_repetitions(Corpus(name, rows, others, measured, names))
    corpus.labelled, rest = _keep_labels(corpus.labelled, labels, len(names), seed, name)
    corpus.unlabelled += rest
    return corpus


def load_files(data: str | os.PathLike[str], unlabelled: str | os.PathLike[str] | None = None,
               heldout: str | os.PathLike[str] | None = None, text_column: str | None = None,
               label_column: str | None = None, labels: int | None = None,
               seed: int = 0) -> Corpus:
    """Texts from CSV, TSV or JSONL files with a text and an optional label column.

    Columns are found by usual names (text, sentence, …; label, class, …), or are named here; in a
    file without a header a column's name is its number, 0 at the first. A row without a label is
    unlabelled. A text is kept once, and a held-out text is not trained on.

    Args:
        data: the training texts with labels.
        unlabelled: more training texts; a label column in it is not read.
        heldout: texts to measure accuracy on; without it a quarter of the labelled texts.
        text_column, label_column: names of the columns.
        labels: how many labels to keep, evenly over the classes; the rest becomes unlabelled.
        seed: of the split and of which labels are kept.

    Raises:
        CorpusError: the message names file, line and column, what was expected and what was found.
        OSError: a file cannot be read.
    """
    training = read_rows(Path(data), text_column, label_column)
    more = [] if unlabelled is None else read_rows(Path(unlabelled), text_column, None,
                                                   with_labels=False)
    measured = None
    if heldout is not None:
        measured = read_rows(Path(heldout), text_column, label_column)
    return _assemble(Path(data).stem, training, more, measured, labels, seed)


def load_dataset_by_name(name: str, text_column: str | None = None,
                         label_column: str | None = None, labels: int | None = None,
                         seed: int = 0) -> Corpus:
    """A data set of the Hugging Face hub, by the package ``datasets``, which needs a network.

    The split ``train`` is trained on, ``unsupervised`` is unlabelled, and ``test`` (``validation``
    where test has no labels) is held out; without either a quarter of the training texts.

    Args:
        name: such as ``imdb``, with a subset after a colon: ``glue:sst2``.
        text_column, label_column, labels, seed: as in :func:`load_files`.

    Raises:
        CorpusError: ``datasets`` is not installed, the data set cannot be had or has no such
            columns.
    """
    from lowp.hybrid.tables import rows_of_records

    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"lowp.hybrid.load_dataset_by_name: {name!r} needs the package datasets: "
                          "pip install 'lowp[data]'") from error
    path, _, subset = name.partition(":")
    try:
        splits = datasets.load_dataset(path, subset or None)
    except Exception as error:  # the package raises a type of its own for every way to fail
        raise CorpusError(f"lowp.hybrid.load_dataset_by_name: {name!r} cannot be loaded: "
                          f"{error}") from error

    def rows(split: str, with_labels: bool = True) -> list[Row]:
        return rows_of_records(splits.get(split, []), f"{name}, split {split}", text_column,
                               label_column, with_labels)

    measured = [row for row in rows("test") if row.label is not None]
    measured = measured or [row for row in rows("validation") if row.label is not None]
    return _assemble(name, rows("train"), rows("unsupervised", False), measured or None, labels,
                     seed)
