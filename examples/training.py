"""What every application shares: its options, the loop, and the result with its time and memory."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowp
from lowp.doctor import cpu_model
from lowp.hybrid.random import permutation
from lowp.hybrid.run import bytes_per_parameter
from lowp.hybrid.trainer import learning_rate
from lowp.key import clock

Batch = Mapping[str, Tensor]


def options(description: str | None, data: str, steps: int) -> argparse.ArgumentParser:
    """The options of an application.

    Args:
        data: what ``--data`` is here.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--dataset", help="a data set of the Hugging Face hub; needs a network "
                        "and the package datasets")
    parser.add_argument("--precision", default="int8",
                        help="int8, int8_full, bf16, fp16, fp32, or torch: plain nn.Linear and "
                        "torch.optim.AdamW")
    parser.add_argument("--weights", choices=("fp32", "bf16"),
                        help="type of the weights; default bf16, stochastically rounded, and fp32 "
                        "for --precision fp32 and torch")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--evaluate", type=int, default=200, help="held-out examples to decode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    return parser


def prepare(model: nn.Module, arguments: argparse.Namespace,
            ) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model in the chosen precision, and its optimizer."""
    plain = arguments.precision in ("torch", "fp32")
    weights = arguments.weights or ("fp32" if plain else "bf16")
    if arguments.precision != "torch":
        lowp.convert(model, arguments.precision)
        if not plain:  # the head's errors reach the loss directly, so it is 16-bit at least
            lowp.convert(model, "bf16", filter_fn=lambda module, fqn: fqn == "lm_head")
    if weights == "bf16":
        model.to(torch.bfloat16)
    if arguments.precision == "torch":
        return model, torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    return model, lowp.optim.AdamW(
        model.named_parameters(), lr=arguments.lr, seed=arguments.seed,
        state_dtype="fp32" if plain else "int8")


def order(count: int, batch: int, step: int, seed: int) -> list[int]:
    """The examples of a step: whole permutations one after the other, keyed by seed and epoch."""
    per_epoch = max(1, count // batch)
    epoch, place = divmod(step, per_epoch)
    return permutation(count, seed, epoch, 0)[place * batch:(place + 1) * batch].tolist()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not -100, in fp32 whatever the type of the logits.

    Args:
        logits: [..., V]. labels: int64 [...].
    """
    return nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(),
                                       ignore_index=-100)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch_of: Callable[[int], Batch],
          loss_of: Callable[[nn.Module, Batch], Tensor],
          arguments: argparse.Namespace) -> dict[str, Any]:
    """Minimize ``loss_of`` with warm-up, cosine and clipping to norm 1.

    Args:
        batch_of: a step, 0 at the first, to its batch.
        loss_of: model and batch to the loss.

    Returns:
        Seconds a step, bytes a parameter and the last training loss.
    """
    clock.set(1)
    model.train()
    seconds, losses = [], []
    for step in range(1, arguments.steps + 1):
        batch = batch_of(step - 1)
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * learning_rate(step, arguments.steps, 0.1)
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)
        if step % 50 == 0 or step == arguments.steps:
            recent = statistics.fmean(losses[-50:])
            print(f"step {step}: loss {recent:.4f}, {seconds[-1]:.3f} s", flush=True)
    return {"train_loss": statistics.fmean(losses[-50:]),
            "seconds_per_step": statistics.median(seconds),
            "bytes_per_parameter": bytes_per_parameter(model, optimizer).total,
            "parameters": sum(p.numel() for p in model.parameters())}


def finish(name: str, metrics: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the result, and write it where ``--out`` says."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()
                if k != "out"}
    result = {"application": name, **metrics, "settings": settings, "device": cpu_model(),
              "threads": torch.get_num_threads(),
              "versions": {"lowp": lowp.__version__, "torch": str(torch.__version__),
                           "python": platform.python_version()}}
    print(json.dumps({"application": name, **metrics}, indent=1))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result
