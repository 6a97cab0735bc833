"""Loss curves of a small GPT by what its optimizer stores: fp32, bf16 (stochastic, nearest), int8.

    python -m benchmarks.optimizer_curves --data FILE [--steps 1500] [--seeds 3]

Writes ``results/optimizer_curves.json`` and ``.png``. The text is split in order, 90 % to train on.
Activations and products are fp32 in every run: only the stored weights, gradients and states
differ. Runs of one seed share initial weights and batches and are compared pairwise. The run "fp32,
nudged" starts with every weight one ulp off: how far differences that mean nothing grow. The spread
of fp32 over the seeds is what a choice of seed is worth.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measure import RESULTS, environment
from lowp.optim import AdamW
from lowp.reference.codec import decode, encode

CONTEXT, BATCH, WIDTH, HEADS, DEPTH = 64, 16, 96, 4, 2
LEARNING_RATE, WARMUP, BETAS, WEIGHT_DECAY = 1e-3, 50, (0.9, 0.99), 0.1
EVALUATE_EVERY = 100


class Variant(NamedTuple):
    """What one kind of run stores."""

    dtype: torch.dtype
    options: dict[str, Any]
    nudged: bool = False


VARIANTS = {
    "fp32": Variant(torch.float32, {}),
    "fp32, nudged": Variant(torch.float32, {}, nudged=True),
    "fp32, int8 states": Variant(torch.float32, {"state_dtype": "int8"}),
    "fp32, int8 states to nearest": Variant(
        torch.float32, {"state_dtype": "int8", "state_rounding": "nearest"}),
    "bf16, stochastic": Variant(torch.bfloat16, {"rounding": "stochastic"}),
    "bf16, nearest": Variant(torch.bfloat16, {"rounding": "nearest"}),
    "bf16, stochastic, int8 states": Variant(
        torch.bfloat16, {"rounding": "stochastic", "state_dtype": "int8"}),
    "bf16, stochastic, int8 states to nearest": Variant(
        torch.bfloat16,
        {"rounding": "stochastic", "state_dtype": "int8", "state_rounding": "nearest"}),
}


class Linear(nn.Linear):
    """A product in fp32, whatever type the weights are stored in."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(input, self.weight.float(), bias)


class Block(nn.Module):
    """Attention and MLP, each on the normalized sum so far and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ParameterList(torch.ones(WIDTH) for _ in range(2))
        self.qkv, self.out = Linear(WIDTH, 3 * WIDTH), Linear(WIDTH, WIDTH)
        self.up, self.down = Linear(WIDTH, 4 * WIDTH), Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, W]"""
        batch, length, _ = x.shape
        qkv = self.qkv(functional.rms_norm(x, (WIDTH,), self.norms[0].float()))
        q, k, v = qkv.view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        hidden = functional.rms_norm(x, (WIDTH,), self.norms[1].float())
        total: Tensor = x + self.down(functional.gelu(self.up(hidden)))
        return total


class GPT(nn.Module):
    """A decoder over characters whose weights may be of any float type and activations are fp32."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.Parameter(torch.ones(WIDTH))
        self.head = Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]."""
        x = self.tokens(tokens).float() + self.positions.weight.float()[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(functional.rms_norm(x, (WIDTH,), self.norm.float()))
        return logits


def corpus(path: Path) -> tuple[Tensor, Tensor, int]:
    """Characters as int64 ids: the training part, the validation part, and how many there are."""
    text = path.read_text(encoding="utf-8")
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([alphabet[c] for c in text])
    split = int(0.9 * len(ids))
    return ids[:split], ids[split:], len(alphabet)


def windows(ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, CONTEXT] that begin at ``starts``."""
    at = starts[:, None] + torch.arange(CONTEXT)
    return ids[at], ids[at + 1]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy in nats a character."""
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def validate(model: nn.Module, ids: Tensor) -> float:
    """Over all whole windows of the validation part."""
    starts = torch.arange(0, len(ids) - CONTEXT, CONTEXT)
    parts = starts.split(128)
    losses = [loss_of(model, *windows(ids, part)).item() * len(part) for part in parts]
    return sum(losses) / len(starts)


def schedule(steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine to a tenth."""
    def factor(step: int) -> float:
        progress = min(step / steps, 1.0)
        return min((step + 1) / WARMUP, 0.55 + 0.45 * math.cos(math.pi * progress))

    return factor


def state_error(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What int8 codes would do to fp32 states: RMS of the first moment's error relative to the
    moment's, worst factor on 1 / sqrt of the second moment, cosine of the updates."""
    error = power = dot = exact = coded = 0.0
    worst = 1.0
    for state in optimizer.state.values():
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if m.numel() < 4096:
            continue
        m8, v8 = decode(*encode(m, True)), decode(*encode(v.sqrt(), False)).square()
        error += (m8 - m).double().square().sum().item()
        power += m.double().square().sum().item()
        seen = v > 0
        ratio = (v[seen] / v8[seen]).sqrt()
        worst = max(worst, ratio.max().item(), (1 / ratio).max().item())
        u, u8 = (m / (v.sqrt() + 1e-8)).double(), (m8 / (v8.sqrt() + 1e-8)).double()
        dot += (u * u8).sum().item()
        exact += u.square().sum().item()
        coded += u8.square().sum().item()
    return {"exp_avg relative RMS error": math.sqrt(error / power),
            "worst factor on 1/sqrt(exp_avg_sq)": worst,
            "update cosine": dot / math.sqrt(exact * coded)}


def batches(ids: Tensor, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches of a seed, the same for every variant."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,), generator=generator)
        yield windows(ids, starts)


def train(variant: Variant, data: tuple[Tensor, Tensor, int], seed: int,
          steps: int) -> dict[str, Any]:
    """One run: validation losses by step, bytes a parameter, the states' coding error (fp32)."""
    ids, held_out, vocabulary = data
    torch.manual_seed(seed)
    model = GPT(vocabulary)
    if variant.nudged:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, math.inf)))
    model.to(variant.dtype)
    optimizer = AdamW(model.named_parameters(), lr=LEARNING_RATE, betas=BETAS,
                      weight_decay=WEIGHT_DECAY, seed=seed, **variant.options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))
    curve: dict[str, float] = {}
    for step, batch in enumerate(batches(ids, seed, steps), 1):
        optimizer.zero_grad()
        loss_of(model, *batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % EVALUATE_EVERY == 0 or step == steps:
            curve[str(step)] = validate(model, held_out)
    params = list(model.parameters())
    numel = sum(p.numel() for p in params)
    stored = sum(t.nbytes for s in optimizer.state.values() for k, t in s.items()
                 if isinstance(t, Tensor) and k != "step")
    run: dict[str, Any] = {
        "seed": seed, "validation loss": curve[str(steps)], "curve": curve,
        "weight bytes/param": sum(p.nbytes for p in params) / numel,
        "state bytes/param": stored / numel,
    }
    if variant.dtype == torch.float32 and not variant.options and not variant.nudged:
        run["int8 codes of the final states"] = state_error(optimizer)
    return run


def spread(found: list[dict[str, Any]]) -> float:
    """Standard deviation of the final losses over the seeds, in percent of their mean."""
    losses = [run["validation loss"] for run in found]
    return 100 * stdev(losses) / mean(losses) if len(losses) > 1 else 0.0


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each variant's final loss against that of fp32 with the same seed, in percent."""
    table = {}
    for name, found in runs.items():
        percent = [100 * (run["validation loss"] / exact["validation loss"] - 1)
                   for run, exact in zip(found, runs["fp32"], strict=True)]
        table[name] = {
            "validation loss, mean": mean(run["validation loss"] for run in found),
            "over fp32 [%], by seed": percent, "over fp32 [%], mean": mean(percent),
            "within 0.5 % in every seed": all(abs(p) <= 0.5 for p in percent),
            "standard deviation over seeds [%]": spread(found),
        }
    return table


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Mean curves, and what each differs from fp32 by, with every seed as a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for index, (name, found) in enumerate(runs.items()):
        steps = list(found[0]["curve"])
        at = [int(s) for s in steps]
        color = f"C{index}"
        means = [mean(r["curve"][s] for r in found) for s in steps]
        left.plot(at, means, color=color, label=name)
        differences = [[100 * (r["curve"][s] / e["curve"][s] - 1) for s in steps]
                       for r, e in zip(found, runs["fp32"], strict=True)]
        for line in differences:
            right.plot(at, line, color=color, alpha=0.3, linewidth=0.8)
        right.plot(at, [mean(column) for column in zip(*differences, strict=True)], color=color)
    left.set(xlabel="step", ylabel="validation loss [nats/character]")
    left.legend(fontsize=8)
    right.axhspan(-0.5, 0.5, color="0.9", zorder=0)
    right.set(xlabel="step", ylabel="validation loss over fp32 [%]", ylim=(-1.5, 4))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run all variants and seeds and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a text, UTF-8")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS),
                        help="run these, and keep the others of the results file")
    arguments = parser.parse_args()
    data = corpus(arguments.data)
    path = arguments.results / "optimizer_curves.json"
    kept = json.loads(path.read_text())["runs"] if path.exists() else {}
    runs: dict[str, list[dict[str, Any]]] = {
        name: [] if name in arguments.only else kept[name] for name in VARIANTS}
    for seed in range(arguments.seeds):
        for name in arguments.only:
            run = train(VARIANTS[name], data, seed, arguments.steps)
            runs[name].append(run)
            print(f"seed {seed}  {name:32}{run['validation loss']:.4f}", flush=True)
    arguments.results.mkdir(exist_ok=True)
    result = {
        "environment": environment(),
        "setting": {"steps": arguments.steps, "batch": BATCH, "context": CONTEXT, "width": WIDTH,
                    "depth": DEPTH, "heads": HEADS, "lr": LEARNING_RATE, "betas": BETAS,
                    "weight_decay": WEIGHT_DECAY, "warmup": WARMUP, "clip": 1.0},
        "summary": compared(runs), "runs": runs,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(runs, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
