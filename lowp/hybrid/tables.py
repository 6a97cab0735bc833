"""Rows of text and label from CSV, TSV and JSONL files, with the place where each stands."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TEXT = ("text", "sentence", "content", "review", "document", "body", "comment", "tweet", "message",
        "headline", "abstract", "question", "utterance", "title")
LABEL = ("label", "labels", "class", "category", "target", "sentiment", "topic", "intent",
         "label_text", "coarse_label")
MAX_CLASSES = 1000  # a column of more values holds no classes


class CorpusError(ValueError):
    """Data do not fit; the message names file and column, what was expected and what was found."""


class _TSV(csv.excel_tab):
    """Tabs part the columns, and nothing else means anything."""

    quoting = csv.QUOTE_NONE


class Row(NamedTuple):
    """One text.

    Attributes:
        text: as it stands in the file.
        label: ``None`` where the file has none.
        place: file and line, for messages.
    """

    text: str
    label: str | None
    place: str


def read_rows(path: Path, text_column: str | None = None, label_column: str | None = None,
              with_labels: bool = True) -> list[Row]:
    """The rows of a file, told by its ending: .csv, .tsv, .jsonl or .ndjson.

    TSV fields are taken as they are, quotation marks too, as tab-separated corpora are written.

    Raises:
        CorpusError: another ending, a line that does not parse, or columns that are not there.
        OSError: it cannot be read.
    """
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        return rows_of_records(_json_lines(path), str(path), text_column, label_column, with_labels)
    if kind not in (".csv", ".tsv"):
        raise CorpusError(f"{path}: expected a file that ends in .csv, .tsv, .jsonl or .ndjson, "
                          f"found {kind or 'no ending'}")
    lines = list(_table(path, "\t" if kind == ".tsv" else ","))
    if not lines:
        raise CorpusError(f"{path}: expected at least one row, found none")
    first = [field.strip() for field in lines[0][1]]
    named = {name for name in (text_column, label_column) if name is not None}
    has_header = bool(named & set(first)) or any(f.lower() in TEXT + LABEL for f in first)
    header = first if has_header else [str(number) for number in range(len(first))]
    body = lines[1:] if has_header else lines
    for number, fields in body:
        if len(fields) != len(header):
            raise CorpusError(f"{path}, line {number}: expected {len(header)} columns as in line "
                              f"1, found {len(fields)}")
    if not has_header:
        text_column, label_column = _guess(path, body, text_column, label_column, with_labels)
    records = [dict(zip(header, fields, strict=True)) for _, fields in body]
    places = [f"{path}, line {number}" for number, _ in body]
    return _rows(records, places, str(path), header, text_column, label_column, with_labels)


def _table(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, with the number of its last line."""
    dialect = _TSV if delimiter == "\t" else csv.excel
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, dialect, strict=True)
        try:
            for fields in reader:
                if any(field.strip() for field in fields):
                    yield reader.line_num, fields
        except csv.Error as error:
            raise CorpusError(f"{path}, line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path}: expected UTF-8, found {error}") from error


def _guess(path: Path, body: Sequence[tuple[int, list[str]]], text_column: str | None,
           label_column: str | None, with_labels: bool) -> tuple[str | None, str | None]:
    """Columns of a file without a header: text is the one with the most letters.

    With two columns, the other is the label, if no value in it is the only one of its kind: that
    would be a header of unusual names.
    """
    width = len(body[0][1])
    if text_column is not None and not text_column.isdecimal():
        return text_column, label_column  # a name that is not there, which is refused later
    if text_column is None:
        if width > 2:
            raise CorpusError(f"{path}: expected a header that names a text column, or text_column "
                              f"as a number below {width}, found none of {', '.join(TEXT)}")
        letters = [sum(len(fields[k]) for _, fields in body) for k in range(width)]
        text_column = str(letters.index(max(letters)))
    if label_column is None and with_labels and width == 2:
        label_column = "1" if text_column == "0" else "0"
        counts = Counter(fields[int(label_column)].strip() for _, fields in body)
        single = next((label for label, count in counts.items() if label and count == 1), None)
        if single is not None:
            raise CorpusError(f"{path}: expected a header that names text and label, or labels "
                              f"that occur more than once in column {label_column}, found "
                              f"{single!r}")
    return text_column, label_column


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise CorpusError(f"{path}, line {number}: expected an object with a text, "
                                      f"found {type(record).__name__}")
                yield record
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path}, line {number}: expected one JSON object a line, found "
                              f"{error}") from error
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path}: expected UTF-8, found {error}") from error


def rows_of_records(records: Iterable[Mapping[str, Any]], source: str,
                    text_column: str | None = None, label_column: str | None = None,
                    with_labels: bool = True) -> list[Row]:
    """Rows of mappings; a label that is missing, null, empty or -1 is none.

    Raises:
        CorpusError: no such columns, or a text that is not a string.
    """
    found = list(records)
    columns = list(dict.fromkeys(key for record in found for key in record))
    places = [f"{source}, row {number}" for number in range(1, len(found) + 1)]
    return _rows(found, places, source, columns, text_column, label_column,
                 with_labels) if found else []


def _column(source: str, role: str, wanted: str | None, usual: tuple[str, ...],
            columns: Sequence[str]) -> str | None:
    if wanted is not None:
        if wanted not in columns:
            raise CorpusError(f"{source}: expected a {role} column {wanted!r}, "
                              f"found {', '.join(columns)}")
        return wanted
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in usual if name in lower), None)


def _rows(records: Sequence[Mapping[str, Any]], places: Sequence[str], source: str,
          columns: Sequence[str], text_column: str | None, label_column: str | None,
          with_labels: bool) -> list[Row]:
    text_name = _column(source, "text", text_column, TEXT, columns)
    if text_name is None:
        raise CorpusError(f"{source}: expected a text column such as {', '.join(TEXT[:4])}, or "
                          f"text_column, found {', '.join(columns)}")
    label_name = _column(source, "label", label_column, LABEL, columns) if with_labels else None
    rows = []
    for record, place in zip(records, places, strict=True):
        text, label = record.get(text_name), record.get(label_name) if label_name else None
        if not isinstance(text, str):
            raise CorpusError(f"{place}: expected a string in column {text_name!r}, found {text!r}")
        if not isinstance(label, str | int | float | None):
            raise CorpusError(f"{place}: expected a name or a number in column {label_name!r}, "
                              f"found {type(label).__name__}")
        name = "" if label is None else str(label).strip()
        rows.append(Row(text.strip(), None if name in ("", "-1") else name, place))
    classes = len({row.label for row in rows})
    if classes > MAX_CLASSES:
        raise CorpusError(f"{source}: expected at most {MAX_CLASSES} classes in column "
                          f"{label_name!r}, found {classes}")
    return rows
