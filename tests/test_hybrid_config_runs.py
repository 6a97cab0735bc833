"""Every objective, mixing rule and option of the loop, from the configuration to a finished run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lowp.hybrid import checkpoint, compare, config
from lowp.hybrid.experiment import build, split_labelled, train
from lowp.hybrid.mixing import GradNorm, Uncertainty
from lowp.hybrid.objectives import FlexMatch, FreeMatch
from lowp.hybrid.run import RunFolder
from tests.hybrid_toys import without_time

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = {"fruit": "apple pear plum fig grape lemon", "tools": "saw axe drill file plane lathe"}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Of a run that takes a second."""
    chance, rows = random.Random(0), ["text,label"]
    for number in range(60):
        kind = ("fruit", "tools")[number % 2]
        rows.append(f"{' '.join(chance.choices(WORDS[kind].split(), k=8))},{kind}")
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n")
    return {
        "data": {"path": str(tmp_path / "data.csv"), "vocab_size": 64, "max_length": 12,
                 "labels": 24},
        "model": {"embedding": 8, "width": 8, "heads": 2}, "optimizer": {"warmup": 0.0},
        "steps": 4, "batch_size": 8, "ratio": 1, "eval_every": 2, "checkpoint_every": 2, "keep": 9,
    }


def finish(values: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = RunFolder.create(path, config.resolve(values))
    outcome, summary = train(folder)
    assert outcome.status == "finished"
    return summary, folder.records()


COMMON = ["class_lm", "evidence_bound", "contrastive", "pseudo_label", "consistency", "uda",
          "mean_teacher", "virtual_adversarial", "entropy"]


@pytest.mark.parametrize(("model", "mixing"), [
    ("lstm", {"kind": "gradnorm"}),
    ("lstm", {"kind": "uncertainty", "separate_gradients": True}),
    ("transformer", {"project_conflicts": True}),
])
def test_all_objectives_at_once(settings: dict[str, Any], tmp_path: Path, model: str,
                                mixing: dict[str, Any]) -> None:
    own = ["span_corruption", "denoising"] if model == "lstm" else []
    kinds: list[dict[str, Any]] = [{"kind": kind} for kind in [*own, *COMMON]]
    for entry in kinds:
        entry.setdefault("weight", 0.5)
        if entry["kind"] in ("pseudo_label", "consistency"):
            entry["adaptive"] = {"pseudo_label": "flexmatch", "consistency": "freematch"}[
                entry["kind"]]
            entry["threshold"] = 0.3
        if entry["kind"] == "uda":
            entry.update(threshold=0.1, precision="bf16")
    settings["objectives"] = [
        {"kind": "supervised", "annealing": "log", "precision": "bf16"},
        {"kind": "language_model", "whole_words": True, "weight": {"kind": "cosine", "end": 1}},
        *kinds,
    ]
    settings["model"]["kind"], settings["mixing"] = model, mixing
    settings.update(accumulate=2, average=0.5)
    settings["precision"] = {"linear": "int8_full", "fallback": {"sqnr": 1000.0, "every": 2}}
    summary, log = finish(settings, tmp_path / "run")
    steps = [r for r in log if "objectives" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4] and summary["skipped_steps"] == 0
    for record in steps:
        assert len(record["objectives"]) == len(settings["objectives"])
        assert all("loss" in term and "cosine" in term for term in record["objectives"].values())
    assert any("fallback" in record for record in steps)
    if mixing.get("kind", "fixed") != "fixed":
        learned = {key.split("/")[1] for key in steps[-1]["mixing"]}
        assert ("uda" in learned) == (mixing["kind"] == "gradnorm") and "supervised" in learned
    # From a checkpoint in the middle the rest of the run is the same, through all that has a state.
    folder = RunFolder.open(tmp_path / "run")
    for path in checkpoint.checkpoints(folder.checkpoints)[:1]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    train(folder)
    assert without_time(folder.records()) == without_time(log)


def test_settings_reach_their_objects(settings: dict[str, Any]) -> None:
    settings["objectives"] = [
        {"kind": "supervised"}, {"kind": "pseudo_label", "adaptive": "flexmatch"},
        {"kind": "consistency", "adaptive": "freematch", "fairness": 0.25},
        {"kind": "virtual_adversarial", "epsilon": 2.5},
    ]
    settings.update(mixing={"kind": "uncertainty", "lr": 0.5}, steps=2000)
    settings["precision"] = {"linear": "int8", "share_weight_codes": False}
    trainer = build(config.resolve(settings)).trainer
    by_name = {term.name: term.objective for term in trainer.objectives}
    flex, free = by_name["pseudo_label"].threshold, by_name["consistency"].threshold
    assert isinstance(flex, FlexMatch) and flex.latest.numel() == len(trainer.unlabelled.samples)
    assert isinstance(free, FreeMatch) and (free.momentum, free.fairness) == (0.999, 0.25)
    adversarial = by_name["virtual_adversarial"]
    tokens = [t for text, _ in trainer.unlabelled.samples for t in text]
    assert adversarial.epsilon == 2.5 and int(adversarial.frequencies.sum()) == len(tokens)
    assert isinstance(trainer.mixing, Uncertainty) and trainer.mixing.lr == 0.5
    assert list(trainer.mixing.log_variance) == ["supervised"]
    assert not trainer.share_weight_codes and trainer.fallback is None
    settings.update(mixing={"kind": "gradnorm"}, steps=500)
    trainer = build(config.resolve(settings)).trainer
    assert isinstance(trainer.mixing, GradNorm) and trainer.separate
    assert trainer.objectives[2].objective.threshold.momentum == 0.99


def test_a_validation_split_chooses_the_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["data"]["validation"] = 0.25
    settings.update(steps=12, eval_every=1, patience=4, checkpoint_every=5)
    settings["optimizer"]["lr"] = 0.3
    experiment = build(config.resolve(settings))
    kept = [tuple(t[:n].tolist()) for b in experiment.trainer.validate.batches
            for t, n in zip(b.tokens, b.lengths.tolist(), strict=True)]
    assert len(kept) == 6
    for stream in (experiment.trainer.labelled, experiment.trainer.unlabelled):
        assert not set(kept) & {tuple(tokens) for tokens, _ in stream.samples}, "trained on"
    folder = RunFolder.create(tmp_path / "run", config.resolve(settings))
    outcome, summary = train(folder)
    log = [r for r in folder.records() if "validation" in r]
    best = max(log, key=lambda r: r["validation"]["macro_f1"])
    assert summary["best"] == {"step": best["step"], **best["validation"]}
    assert summary["heldout"] == pytest.approx(best["eval"]), "the best step's, not the last's"
    assert outcome.status == ("finished" if log[-1]["step"] == 12 else "stopped early")
    assert compare.finished(folder) == json.loads((folder.path / "summary.json").read_text())
    assert "best validation macro-F1" in (folder.path / "summary.md").read_text()


def test_labels_are_split_class_by_class() -> None:
    labels = [0] * 20 + [1] * 10 + [2] * 2
    trained, kept = split_labelled(labels, 0.3, seed=1)
    assert sorted(trained + kept) == list(range(32))
    assert [sum(labels[i] == c for i in kept) for c in range(3)] == [6, 3, 1]
    assert split_labelled(labels, 0.3, seed=2)[1] != kept
    assert split_labelled(labels, 0.0, seed=1) == (list(range(32)), [])
    with pytest.raises(ValueError, match=r"data\.validation must leave texts on both sides of 2"):
        split_labelled([0, 1], 0.3, seed=1)


def test_the_arms_of_a_comparison_shed_what_does_not_fit_them() -> None:
    settings = config.resolve({
        "objectives": [{"kind": "supervised", "precision": "bf16"}, {"kind": "uda"}],
        "mixing": {"kind": "gradnorm"}, "precision": {"fallback": {"sqnr": 20.0}},
    })
    for arm in compare.arms(settings).values():
        assert config.resolve(arm.model_dump(mode="json")) == arm, "each is a valid configuration"
    assert compare.arms(settings)["hybrid-low"] == settings


def test_a_compiled_run_is_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["model"]["kind"] = "transformer"
    settings.update(steps=2, eval_every=9)
    settings["precision"] = {"linear": "int8"}
    _, plain = finish(settings, tmp_path / "plain")
    _, compiled = finish({**settings, "compile": "eager"}, tmp_path / "compiled")
    for one, two in zip(plain, compiled, strict=True):
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], rel=2**-20)


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_autocast_is_torchs_bf16_on_fp32_weights(settings: dict[str, Any], model: str) -> None:
    """The first forward pass is that of the fp32 model called inside torch.autocast, bit for bit,
    and not that of the fp32 model."""
    settings["model"].update(kind=model, dropout=0.0)
    logits = {}
    for linear in ("torch", "autocast"):
        settings["precision"] = {"linear": linear}
        experiment = build(config.resolve(settings))
        network, batch = experiment.trainer.model, experiment.trainer.labelled.next()
        assert all(p.dtype == torch.float32 for p in network.parameters())
        logits[linear] = network.classify(batch.tokens, batch.lengths)
        if linear == "torch":
            with torch.autocast("cpu", torch.bfloat16):
                want = network.classify(batch.tokens, batch.lengths)
    assert torch.equal(logits["autocast"], want) and want.dtype == torch.bfloat16
    assert not torch.equal(logits["torch"], want.float())
    experiment.trainer.run()
    assert experiment.trainer.step == 4
