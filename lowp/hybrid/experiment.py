"""From a configuration to a trained model: data, tokens, network, objectives, run folder."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowp.hybrid import checkpoint, config, curves, ranks
from lowp.hybrid.average import WeightAverage
from lowp.hybrid.batches import Stream
from lowp.hybrid.building import (
    Surroundings,
    autocast_model,
    build_mixing,
    build_objective,
    compile_model,
    sentinels_needed,
)
from lowp.hybrid.corpus import Corpus, load_dataset_by_name, load_docstrings, load_files
from lowp.hybrid.evaluation import HeldOut
from lowp.hybrid.fallback import SqnrFallback
from lowp.hybrid.models import LSTMClassifier, TransformerEncoder
from lowp.hybrid.random import permutation
from lowp.hybrid.run import Log, RunFolder, bytes_per_parameter
from lowp.hybrid.sharding import shard
from lowp.hybrid.tokenizer import Tokenizer, train_tokenizer
from lowp.hybrid.trainer import Outcome, Record, Trainer
from lowp.key import clock, tensor_id
from lowp.linear import Linear
from lowp.optim import SGD, AdamW
from lowp.report import Report, report

# dataset ids: each order has random bits of its own
LABELLED, UNLABELLED, VALIDATION = 0, 1, 2


class ResumeError(RuntimeError):
    """A run cannot go on as it was: its configuration or its data changed."""


@functools.lru_cache(maxsize=2)
def load_texts(data: config.Data) -> tuple[Corpus, Tokenizer]:
    """The texts, and a tokenizer trained on those of the training split only."""
    if data.dataset is not None:
        corpus = load_dataset_by_name(
            data.dataset, text_column=data.text_column, label_column=data.label_column,
            labels=data.labels, seed=data.seed)
    elif data.path is not None:
        corpus = load_files(
            data.path, data.unlabelled, data.heldout, text_column=data.text_column,
            label_column=data.label_column, labels=data.labels, seed=data.seed)
    else:
        corpus = load_docstrings(
            labels_per_class=data.labels_per_class, classes=data.classes, seed=data.seed)
    texts = [text for text, _ in corpus.labelled] + corpus.unlabelled
    return corpus, train_tokenizer(texts, data.vocab_size, data.tokenizer)


def fingerprint(corpus: Corpus) -> str:
    """SHA-256 over every text and label in order: what a checkpoint was trained on."""
    parts = [corpus.labelled, corpus.unlabelled, corpus.heldout, corpus.classes]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def build_model(settings: config.Config, frequencies: Tensor, classes: int) -> nn.Module:
    """The network with weights of the seed; every lowp layer is keyed by its qualified name.

    Args:
        frequencies: how often each token of the vocabulary occurs; a language model starts from
            them, so that no step is spent on learning which tokens are frequent.
    """
    model, precision = settings.model, settings.precision
    torch.manual_seed(settings.seed)
    numbers: dict[str, Any] = {
        "precision": "fp32" if precision.is_torch else precision.linear,
        "baseline": precision.is_torch,
        "dropout": model.dropout, "seed": settings.seed,
    }
    network: nn.Module
    if model.kind == "lstm":
        network = LSTMClassifier(
            len(frequencies), classes, embedding=model.embedding, hidden=model.width,
            layers=model.layers, bidirectional=model.bidirectional, **numbers)
    else:
        network = TransformerEncoder(
            len(frequencies), classes, width=model.width, depth=model.layers, heads=model.heads,
            max_length=settings.data.max_length, **numbers)
    likely = (frequencies + 1) / (frequencies + 1).sum()
    network.lm_bias.data.copy_(likely.log())
    if precision.weights == "bf16":
        network = network.to(torch.bfloat16)
    for name, module in network.named_modules():
        if isinstance(module, Linear):
            module.noise_id = tensor_id(name)
    return network


def build_optimizer(settings: config.Optimizer, model: nn.Module, seed: int) -> Optimizer:
    """The optimizer over the model's parameters; lowp's know their names."""
    adam: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps,
                            "weight_decay": settings.weight_decay}
    ours: dict[str, Any] = {"rounding": settings.rounding, "seed": seed}
    if settings.kind == "torch_adamw":
        return torch.optim.AdamW(model.parameters(), **adam)
    if settings.kind == "adamw":
        return AdamW(model.named_parameters(), **adam, state_dtype=settings.state_dtype, **ours)
    return SGD(model.named_parameters(), lr=settings.lr, momentum=settings.momentum,
               weight_decay=settings.weight_decay, **ours)


def split_labelled(labels: list[int], part: float, seed: int) -> tuple[list[int], list[int]]:
    """Which texts are trained on and which choose the best weights: ``part`` of each class.

    Raises:
        ValueError: one of the two would be empty.
    """
    order = permutation(len(labels), seed, 0, VALIDATION).tolist()
    kept: list[int] = []
    for label in sorted(set(labels)):
        members = [i for i in order if labels[i] == label]
        kept += members[: round(part * len(members))]
    trained = sorted(set(range(len(labels))) - set(kept))
    if part > 0 and not (kept and trained):
        raise ValueError(f"data.validation must leave texts on both sides of {len(labels)}, "
                         f"got {part}")
    return trained, sorted(kept)


@dataclass
class Experiment:
    """A run that is ready to train.

    Attributes:
        tokenizer: what turns texts into the model's tokens.
        facts: of the data, for the summary.
        fingerprint: of the data, for the checkpoint.
    """

    config: config.Config
    trainer: Trainer
    heldout: HeldOut
    tokenizer: Tokenizer
    facts: dict[str, Any]
    fingerprint: str

    def stamped(self, state: dict[str, Any]) -> dict[str, Any]:
        """The trainer's state with what it belongs to."""
        return {"config": self.config.digest(), "data": self.fingerprint, "trainer": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that was :meth:`stamped`.

        Raises:
            ResumeError: it is of another configuration or other data.
        """
        if state.get("config") != self.config.digest():
            raise ResumeError("the checkpoint is of another configuration than config.yaml")
        if state.get("data") != self.fingerprint:
            raise ResumeError("the texts are no longer those that the run was trained on")
        self.trainer.load_state_dict(state["trainer"])


def build(settings: config.Config) -> Experiment:
    """Load the data and make everything that the configuration names.

    Raises:
        ValueError, OSError: the data cannot be read or do not fit the configuration.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    clock.set(1)
    data = settings.data
    corpus, tokenizer = load_texts(data)
    labelled = tokenizer.encode_batch([text for text, _ in corpus.labelled], data.max_length)
    unlabelled = tokenizer.encode_batch(corpus.unlabelled, data.max_length)
    heldout = tokenizer.encode_batch([text for text, _ in corpus.heldout], data.max_length)
    labels = [label for _, label in corpus.labelled]
    trained, kept = split_labelled(labels, data.validation, data.seed)
    classes = len(corpus.classes)
    sentinels = range(tokenizer.vocab_size, tokenizer.vocab_size + sentinels_needed(settings))
    # The labelled texts are read by the unsupervised objectives too, without their labels.
    without_labels = [(tokens, None) for tokens in [*unlabelled, *(labelled[i] for i in trained)]]
    tokens = torch.tensor([token for text, _ in without_labels for token in text])
    frequencies = tokens.bincount(minlength=tokenizer.vocab_size + len(sentinels))
    model = build_model(settings, frequencies, classes)
    if settings.precision.linear == "autocast":
        autocast_model(model)
    compile_model(model, settings.compile)
    if settings.shard:
        shard(model)
    evaluate = HeldOut(heldout, [label for _, label in corpus.heldout], classes,
                       settings.eval_batch_size)
    validate = HeldOut([labelled[i] for i in kept], [labels[i] for i in kept], classes,
                       settings.eval_batch_size) if kept else None
    around = Surroundings(
        steps=settings.steps, is_causal=bool(model.is_causal), classes=classes,
        samples=len(without_labels), frequencies=frequencies,
        continues=tokenizer.continues(), sentinels=sentinels, seed=settings.seed)
    terms = [build_objective(o, around) for o in settings.objectives]
    rank, world_size = ranks.rank(), ranks.world_size()
    fallback = settings.precision.fallback
    trainer = Trainer(
        model, build_optimizer(settings.optimizer, model, settings.seed), terms,
        Stream([(labelled[i], labels[i]) for i in trained], settings.batch_size, settings.seed,
               LABELLED, rank, world_size),
        Stream(without_labels, settings.ratio * settings.batch_size, settings.seed, UNLABELLED,
               rank, world_size),
        steps=settings.steps, warmup=settings.optimizer.warmup, clip=settings.optimizer.clip,
        max_skipped=settings.max_skipped, accumulate=settings.accumulate,
        mixing=build_mixing(settings.mixing, terms),
        project_conflicts=settings.mixing.project_conflicts,
        separate=settings.mixing.separate_gradients,
        average=None if settings.average is None else WeightAverage(settings.average),
        fallback=None if fallback.sqnr is None
        else SqnrFallback(fallback.sqnr, fallback.every, fallback.steps),
        share_weight_codes=settings.precision.share_weight_codes,
        evaluate=evaluate, validate=validate, patience=settings.patience,
        eval_every=settings.eval_every, checkpoint_every=settings.checkpoint_every,
        seed=settings.seed,
    )
    facts = {
        "name": corpus.name, "classes": classes, "labelled": len(trained),
        **({"validation": len(kept)} if kept else {}),
        "unlabelled": len(corpus.unlabelled), "held-out": len(corpus.heldout),
        "vocabulary": tokenizer.vocab_size, "most frequent class": evaluate.chance(),
    }
    return Experiment(settings, trainer, evaluate, tokenizer, facts, fingerprint(corpus))


def inspect(folder: RunFolder) -> Report:
    """What low precision does to every layer of a run, from its newest checkpoint's next batch.

    Raises:
        ResumeError, checkpoint.CheckpointError: the checkpoint cannot be read. ValueError: the run
            has no checkpoint, no lowp layer, or no objective over labelled texts.
    """
    if not checkpoint.checkpoints(folder.checkpoints):
        raise ValueError(f"{folder.path} holds no checkpoint yet")
    experiment = build(folder.config)
    experiment.load_state_dict(checkpoint.restore(folder.checkpoints).state)
    trainer = experiment.trainer
    term = next((t for t in trainer.objectives if t.stream == "labelled"), None)
    if term is None:
        raise ValueError(f"{folder.path}: expected an objective over labelled texts, got none")
    trainer.model.train()
    return report(trainer.model, trainer.labelled.next(), term.objective,
                  optimizer=trainer.optimizer)


def train(folder: RunFolder, watch: Callable[[Record], None] = lambda record: None,
          ready: Callable[[Experiment], None] = lambda experiment: None,
          ) -> tuple[Outcome, dict[str, Any]]:
    """Train the run of a folder, from its newest whole checkpoint if there is one.

    On several ranks every one calls this; rank 0 alone writes into the folder.

    Args:
        watch: called with every record after it is logged.
        ready: called once before the first step.

    Returns:
        Why training ended, and the summary; a run that was finished before is only summed up.

    Raises:
        ResumeError, checkpoint.CheckpointError: the run cannot go on.
    """
    experiment = build(folder.config)
    trainer = experiment.trainer
    if checkpoint.checkpoints(folder.checkpoints):
        experiment.load_state_dict(checkpoint.restore(folder.checkpoints).state)
    ranks.wait()  # until all have read it
    if ranks.rank() > 0:
        outcome = trainer.run()
        return outcome, ranks.from_first({})
    (folder.path / "tokenizer.json").write_text(experiment.tokenizer.to_json(), encoding="utf-8")
    log = Log(folder.path, trainer.step)

    def record(entry: Record) -> None:
        log.write(entry)
        watch(entry)

    def save(step: int, state: dict[str, Any]) -> None:
        log.sync()
        checkpoint.save(folder.checkpoints, step, experiment.stamped(state), folder.config.keep)

    def save_best(step: int, state: dict[str, Any]) -> None:
        checkpoint.save(folder.best, step, experiment.stamped(state), keep=1)

    trainer.record, trainer.save, trainer.save_best = record, save, save_best
    ready(experiment)
    try:
        outcome = trainer.run()
    finally:
        log.close()
    summary = _sum_up(experiment, folder, outcome)
    return outcome, ranks.from_first(summary)


def _sum_up(experiment: Experiment, folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
    """Write the summary and the pictures; with validation, of the best weights."""
    trainer = experiment.trainer
    parameters = sum(p.numel() for p in trainer.model.parameters())
    memory = bytes_per_parameter(trainer.model, trainer.optimizer)
    chosen = None
    if trainer.validate is not None and checkpoint.checkpoints(folder.best):
        trainer.model.load_state_dict(checkpoint.restore(folder.best).state["trainer"]["model"])
        chosen = experiment.heldout(trainer.model)
    summary = folder.summarize(outcome.status, trainer.best, memory, parameters, experiment.facts,
                               chosen)
    curves.draw_losses(folder.records(), folder.path / "loss.png")
    curves.draw_accuracy({folder.path.name: folder.records()}, folder.path / "accuracy.png",
                         experiment.heldout.chance())
    return summary
