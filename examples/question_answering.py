"""Question answering: the span of a text that answers a question; exact match and F1.

    python -m examples.question_answering                         # signatures of the library
    python -m examples.question_answering --data train-v1.1.json  # SQuAD's format
    python -m examples.question_answering --dataset squad         # online
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import string
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering

from examples.subwords import END, PAD, START, learn, padded
from examples.training import Batch, cross_entropy, finish, options, order, prepare, train
from lowp.hybrid.corpus import harvest
from lowp.hybrid.random import permutation
from lowp.key import tensor_id

LONGEST = 96  # tokens of question and context together
HELDOUT = 4  # one in four files, or questions, is held out


class Question(NamedTuple):
    """A question whose answer is ``context[start:start + len(answer)]``."""

    question: str
    context: str
    answer: str
    start: int


class Example(NamedTuple):
    """Tokens, which part each belongs to, and first and last token of the answer."""

    tokens: list[int]
    parts: list[int]
    first: int
    last: int
    offsets: list[tuple[int, int]]  # of each token in the context; (0, 0) outside


def _of_function(node: ast.FunctionDef) -> Iterator[Question]:
    """What a function's parameters default to, in the words of its signature."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(arguments) - len(node.args.defaults)) + [*node.args.defaults]
    pieces = [f"{a.arg}={ast.unparse(d)}" if d is not None else a.arg
              for a, d in zip(arguments, defaults, strict=True)]
    context = f"def {node.name}({', '.join(pieces)})"
    with_default = [(a.arg, ast.unparse(d)) for a, d in zip(arguments, defaults, strict=True)
                    if d is not None]
    if len(with_default) < 2 or len({value for _, value in with_default}) < len(with_default):
        return  # one and the same answer to all questions is none
    for name, value in with_default:
        start = re.search(rf"(?<=[(,\s]){re.escape(name)}=", context)
        if start is not None:
            yield Question(f"What does {name} of {node.name} default to?", context, value,
                           start.end())


def signatures(seed: int = 0) -> tuple[str, list[Question], list[Question]]:
    """Questions on the signatures of this Python's standard library; files are held out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(harvest())
    training: list[Question] = []
    heldout: list[Question] = []
    for place in permutation(len(paths), seed, 0, tensor_id("files")).tolist():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in code that is not ours
            tree = ast.parse((root / paths[place]).read_bytes())
        found = [q for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                 for q in _of_function(node)]
        (training if place % HELDOUT else heldout).extend(found)
    seen = {q.context for q in heldout}
    return "signatures", [q for q in training if q.context not in seen], heldout


def from_squad(path: Path) -> tuple[str, list[Question], list[Question]]:
    """A file of SQuAD 1.1 (Rajpurkar et al., EMNLP 2016); every fourth article is held out."""
    training: list[Question] = []
    heldout: list[Question] = []
    for number, article in enumerate(json.loads(path.read_text(encoding="utf-8"))["data"]):
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                for answer in qa["answers"][:1]:
                    (training if number % HELDOUT else heldout).append(Question(
                        qa["question"], paragraph["context"], answer["text"],
                        answer["answer_start"]))
    return path.stem, training, heldout


def from_hub(name: str) -> tuple[str, list[Question], list[Question]]:
    """A data set with SQuAD's columns."""
    import datasets

    splits = datasets.load_dataset(name)
    parts = [[Question(row["question"], row["context"], row["answers"]["text"][0],
                       row["answers"]["answer_start"][0])
              for row in splits[split] if row["answers"]["text"]]
             for split in ("train", "validation")]
    return name, parts[0], parts[1]


def example(tokenizer: ByteLevelBPETokenizer, q: Question) -> Example | None:
    """``<s> question </s> context </s>``; ``None`` if the answer is cut off."""
    question, context = tokenizer.encode(q.question), tokenizer.encode(q.context)
    head = [START, *question.ids[: LONGEST // 2], END]
    body = context.ids[: LONGEST - len(head) - 1]
    offsets = context.offsets[: len(body)]
    end = q.start + len(q.answer)
    inside = [i for i, (a, b) in enumerate(offsets) if b > q.start and a < end]
    if not inside or offsets[inside[-1]][1] < end:
        return None
    tokens = [*head, *body, END]
    return Example(tokens, [0] * len(head) + [1] * (len(body) + 1), len(head) + inside[0],
                   len(head) + inside[-1],
                   [(0, 0)] * len(head) + list(offsets) + [(0, 0)])


def batch(examples: Sequence[Example]) -> Batch:
    """Tokens, mask, parts, and the two positions that are looked for."""
    tokens = padded([e.tokens for e in examples])
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long(),
            "token_type_ids": padded([e.parts for e in examples]),
            "first": torch.tensor([e.first for e in examples]),
            "last": torch.tensor([e.last for e in examples])}


def logits_of(model: nn.Module, part: Batch) -> tuple[Tensor, Tensor]:
    """Scores [B, T] of each token as the first and as the last one of the answer."""
    out = model(**{k: v for k, v in part.items() if k not in ("first", "last")})
    outside = (part["token_type_ids"] == 0) | (part["input_ids"] == END)
    return tuple(t.float().masked_fill(outside, -1e4)  # type: ignore[return-value]
                 for t in (out.start_logits, out.end_logits))


def loss_of(model: nn.Module, part: Batch) -> Tensor:
    """Mean cross-entropy of the first and the last token (Devlin et al., NAACL 2019, 4.2)."""
    first, last = logits_of(model, part)
    return (cross_entropy(first, part["first"]) + cross_entropy(last, part["last"])) / 2


def _words(text: str) -> list[str]:
    """SQuAD's normal form: lower case, no punctuation, no articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words; symbols alone compare as they are."""
    found, wanted = _words(text), _words(answer)
    if not found or not wanted:
        return float(text.strip() == answer.strip())
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def exact(text: str, answer: str) -> float:
    """Whether the normal forms are equal; symbols alone compare as they are."""
    found, wanted = _words(text), _words(answer)
    return float(found == wanted if found or wanted else text.strip() == answer.strip())


def best_span(first: Tensor, last: Tensor, longest: int = 20) -> tuple[int, int]:
    """The most probable first and last token [T] with first <= last < first + longest."""
    scores = first[:, None] + last[None]
    allowed = torch.ones_like(scores, dtype=torch.bool).triu() & \
        ~torch.ones_like(scores, dtype=torch.bool).triu(longest)
    place = int(scores.masked_fill(~allowed, -torch.inf).argmax())
    return divmod(place, len(first))


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure."""
    arguments = options(__doc__, "a file of SQuAD 1.1", 400).parse_args(words)
    if arguments.dataset:
        name, training, heldout = from_hub(arguments.dataset)
    else:
        name, training, heldout = from_squad(arguments.data) if arguments.data else \
            signatures(arguments.seed)
    torch.manual_seed(arguments.seed)
    tokenizer = learn((t for q in training for t in (q.question, q.context)), 4000)
    made = [e for e in (example(tokenizer, q) for q in training) if e is not None]
    held = [(q, e) for q in heldout if (e := example(tokenizer, q)) is not None]
    held = held[: arguments.evaluate]
    width = arguments.width
    model, optimizer = prepare(BertForQuestionAnswering(BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=width, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=4 * width, max_position_embeddings=LONGEST,
        pad_token_id=PAD)), arguments)
    facts = train(model, optimizer, lambda step: batch(
        [made[i] for i in order(len(made), arguments.batch, step, arguments.seed)]), loss_of,
        arguments)
    model.eval()
    scores, losses = [], []
    with torch.no_grad():
        for q, e in held:
            part = batch([e])
            losses.append(float(loss_of(model, part)))
            first, last = logits_of(model, part)
            a, b = best_span(first[0], last[0])
            text = q.context[e.offsets[a][0]:e.offsets[b][1]].strip()
            scores.append((exact(text, q.answer), f1(text, q.answer)))
            if len(scores) <= 3:
                print(f"  {q.question} {q.context[:80]!r}\n    expected {q.answer!r}, "
                      f"found {text!r}")
    return finish("question answering", {
        "corpus": name, "training": len(made), "heldout": len(held),
        "heldout_loss": statistics.fmean(losses),
        "exact_match": 100 * statistics.fmean(em for em, _ in scores),
        "f1": 100 * statistics.fmean(f for _, f in scores), **facts}, arguments)


if __name__ == "__main__":
    main()
