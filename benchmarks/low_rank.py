"""Accuracy, parameters and bytes of low-rank models, and of low-rank gradients, against the rank.

    python -m benchmarks.low_rank [--steps 200] [--seeds 3]

A transformer encoder is trained on the docstrings of the running Python's standard library. At each
rank its linear layers are factorized before training (``factors``), or the gradients of the whole
matrices are projected (``galore``); products in fp32 or int8, with 8-bit states for int8. Writes
results/low_rank.json and .png after every run; broken off, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowp
from benchmarks.measure import RESULTS, record
from lowp.hybrid import Stream, Tokenizer, TransformerEncoder, load_docstrings, train_tokenizer
from lowp.hybrid.corpus import Corpus
from lowp.hybrid.evaluation import HeldOut
from lowp.key import clock

WIDTH, LENGTH, BATCH, RATE = 128, 40, 32, 1e-3
RANKS = (4, 8, 16, 32)
LABELS = ("method", "rank", "precision", "seed", "steps")
OPTIONS = {"fp32": {"state_dtype": "fp32"}, "int8": {"state_dtype": "int8"}}


def _in_blocks(module: nn.Module, fqn: str) -> bool:
    return fqn.startswith("blocks.")


def tensor_bytes(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of weights, gradients and states; a projected optimizer's stand-ins count too."""
    held = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            held += [t for t in state.values() if isinstance(t, torch.Tensor)]
    held += [core for o in optimizers for core in getattr(o, "_cores", {}).values()]
    return sum(t.nbytes for t in held)


def train(corpus: Corpus, tokenizer: Tokenizer, method: str, rank: int, precision: str, steps: int,
          seed: int) -> dict[str, Any]:
    """One run; its row of the table."""
    torch.manual_seed(seed)
    clock.set(1)
    model: nn.Module = TransformerEncoder(
        tokenizer.vocab_size, len(corpus.classes), width=WIDTH, max_length=LENGTH, seed=seed,
        precision=precision)
    error = 0.0
    if method == "factors":
        layers = lowp.factorize(model, rank=rank, filter_fn=_in_blocks).layers
        error = statistics.fmean(entry.error for entry in layers if entry.factorized)
    options: dict[str, Any] = {"lr": RATE, "weight_decay": 0.01}
    optimizer: torch.optim.Optimizer
    if method == "galore":
        blocks = [(n, p) for n, p in model.named_parameters() if _in_blocks(model, n)]
        others = [(n, p) for n, p in model.named_parameters() if not _in_blocks(model, n)]
        optimizer = lowp.optim.GaLore(blocks, lowp.optim.AdamW, rank=rank, update_interval=50,
                                      scale=1.0, seed=seed, options=OPTIONS[precision], **options)
        more = [lowp.optim.AdamW(others, seed=seed, **OPTIONS[precision], **options)]
    else:
        optimizer, more = lowp.optim.AdamW(model.named_parameters(), seed=seed,
                                           **OPTIONS[precision], **options), []
    every = [optimizer, *more]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, RATE, total_steps=steps, pct_start=0.1,
                                                     cycle_momentum=False) for o in every]
    texts = tokenizer.encode_batch([text for text, _ in corpus.labelled], LENGTH)
    stream = Stream(list(zip(texts, [label for _, label in corpus.labelled], strict=True)), BATCH,
                    seed, 0)
    seconds = []
    for _ in range(steps):
        batch = stream.next()
        start = time.perf_counter()
        model.train()
        logits = model(batch.tokens, batch.lengths)
        for o in every:
            o.zero_grad()
        nn.functional.cross_entropy(logits, batch.labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        now = clock.step
        for o in every:
            clock.step = now
            o.step()
        for schedule in schedules:
            schedule.step()
        seconds.append(time.perf_counter() - start)
    heldout = HeldOut(tokenizer.encode_batch([text for text, _ in corpus.heldout], LENGTH),
                      [label for _, label in corpus.heldout], len(corpus.classes))
    inner = [o.inner for o in every if isinstance(o, lowp.optim.GaLore) and o.inner is not None]
    return {
        "method": method, "rank": rank, "precision": precision, "seed": seed, "steps": steps,
        "accuracy": heldout(model)["accuracy"], "loss": heldout(model)["loss"],
        "factorization_error": error, "parameters": sum(p.numel() for p in model.parameters()),
        "block_parameters": sum(p.numel() for n, p in model.named_parameters()
                                if _in_blocks(model, n)),
        "bytes": tensor_bytes(model, [*every, *inner]),
        "seconds_per_step": statistics.median(seconds),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy (mean and spread over the seeds) and bytes against the rank."""
    from lowp.hybrid.curves import COLORS, new_figure, save_figure

    figure, axes = new_figure(2)
    arms = sorted({(r["method"], r["precision"]) for r in rows if r["method"] != "full"})
    for color, (method, precision) in zip(COLORS, arms, strict=False):
        found = [r for r in rows if (r["method"], r["precision"]) == (method, precision)]
        ranks = sorted({r["rank"] for r in found})
        by_rank = [[r for r in found if r["rank"] == rank] for rank in ranks]
        for ax, key, scale in ((axes[0], "accuracy", 100.0), (axes[1], "bytes", 1e-6)):
            values = [[scale * r[key] for r in some] for some in by_rank]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            ax.errorbar(ranks, [statistics.fmean(v) for v in values], spread, color=color,
                        marker="o", markersize=4, capsize=3, label=f"{method}, {precision}")
    for style, precision in ((":", "fp32"), ("--", "int8")):
        full = [r for r in rows if r["method"] == "full" and r["precision"] == precision]
        for ax, key, scale in ((axes[0], "accuracy", 100.0), (axes[1], "bytes", 1e-6)):
            ax.axhline(scale * statistics.fmean(r[key] for r in full), color="#2b2f36",
                       linestyle=style, linewidth=0.9, label=f"full rank, {precision}")
    for ax, title in zip(axes, ("held-out accuracy, %", "weights + gradients + states, MB"),
                         strict=True):
        ax.set_xscale("log", base=2)
        ax.set_xticks(RANKS, [str(rank) for rank in RANKS])
        ax.set_xlabel(f"rank of {WIDTH}", fontsize=9)
        ax.set_ylabel(title, fontsize=9)
    axes[0].legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def main() -> None:
    """Run the grid and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    corpus = load_docstrings(labels_per_class=150, seed=0)
    texts = [text for text, _ in corpus.labelled] + corpus.unlabelled
    tokenizer = train_tokenizer(texts, 2000)
    grid = [("full", WIDTH), *((m, r) for m in ("factors", "galore") for r in RANKS)]
    path = RESULTS / "low_rank.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {tuple(row[key] for key in LABELS) for row in rows}
    for seed in range(arguments.seeds):
        for method, rank in grid:
            for precision in OPTIONS:
                if (method, rank, precision, seed, arguments.steps) in done:
                    continue
                rows.append(train(corpus, tokenizer, method, rank, precision, arguments.steps,
                                  seed))
                print(" ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
                record("low_rank", rows)
                draw([row for row in rows if row["steps"] == arguments.steps],
                     path.with_suffix(".png"))


if __name__ == "__main__":
    main()
