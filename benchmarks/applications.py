"""Translation and language modelling at length: int8 with stochastic rounding against fp32.

    python -m benchmarks.applications --multi30k FOLDER --tinyshakespeare FILE [--seeds 2]

Runs examples/translation.py and examples/language_modelling.py with ``nn.Linear`` and torch's AdamW
in fp32, and with int8 layers, bf16 weights, int8 states and stochastic rounding. Writes
results/applications.json after every run; results that are finished in --out are taken as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import record
from examples import language_modelling, translation

PRECISIONS = ("torch", "int8")
KEPT = ("heldout_loss", "bleu", "chrf", "perplexity", "bits_per_byte", "seconds_per_step",
        "bytes_per_parameter", "parameters", "training", "heldout")
Main = Callable[[Sequence[str]], dict[str, Any]]


def tasks(multi30k: Path, tinyshakespeare: Path) -> dict[str, tuple[Main, list[str]]]:
    """Each application with the words of its command line."""
    return {
        "translation": (translation.main, [
            "--data", str(multi30k), "--steps", "4000", "--lr", "3e-3", "--evaluate", "1014"]),
        "language modelling": (language_modelling.main, [
            "--data", str(tinyshakespeare), "--steps", "1000", "--lr", "3e-3"]),
    }


def row(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a result."""
    settings = result["settings"]
    return {"application": result["application"], "corpus": result["corpus"],
            "precision": settings["precision"], "seed": settings["seed"],
            "steps": settings["steps"], **{key: result[key] for key in KEPT if key in result}}


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each application, int8 against fp32 with the same seed: the held-out loss in percent of
    fp32's, and BLEU in points; seconds and bytes as ratios."""
    result = []
    for name in dict.fromkeys(entry["application"] for entry in rows):
        by_precision = {
            precision: {entry["seed"]: entry for entry in rows
                        if (entry["application"], entry["precision"]) == (name, precision)}
            for precision in PRECISIONS
        }
        seeds = sorted(set(by_precision["torch"]) & set(by_precision["int8"]))
        if not seeds:
            continue
        pairs = [(by_precision["torch"][seed], by_precision["int8"][seed]) for seed in seeds]

        def mean(of: Callable[[dict[str, Any], dict[str, Any]], float],
                 pairs: list[Any] = pairs) -> float:
            return statistics.fmean(of(*pair) for pair in pairs)

        result.append({
            "application": name, "seeds": len(seeds),
            "loss_above_fp32_percent": mean(
                lambda a, b: 100 * (b["heldout_loss"] / a["heldout_loss"] - 1)),
            **({"bleu_minus_fp32": mean(lambda a, b: b["bleu"] - a["bleu"])}
               if "bleu" in pairs[0][0] else {}),
            "seconds_of_fp32": mean(lambda a, b: b["seconds_per_step"] / a["seconds_per_step"]),
            "bytes_of_fp32": mean(
                lambda a, b: b["bytes_per_parameter"] / a["bytes_per_parameter"]),
        })
    return result


def main() -> None:
    """Run what is not finished and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--multi30k", type=Path, required=True)
    parser.add_argument("--tinyshakespeare", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/applications"))
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        for name, (run, words) in tasks(arguments.multi30k, arguments.tinyshakespeare).items():
            for precision in PRECISIONS:
                path = arguments.out / f"{name.replace(' ', '-')}-{precision}-{seed}.json"
                if not path.exists():
                    run([*words, "--precision", precision, "--seed", str(seed),
                         "--out", str(path)])
                rows.append(row(json.loads(path.read_text(encoding="utf-8"))))
                record("applications", rows, comparison=compare(rows))


if __name__ == "__main__":
    main()
