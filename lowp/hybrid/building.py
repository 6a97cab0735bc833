"""From the configuration of objectives and their mixing to the objects that compute them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowp.hybrid import config, objectives
from lowp.hybrid import objective_config as schema
from lowp.hybrid.mixing import GradNorm, Mixing, Uncertainty
from lowp.hybrid.objectives.thresholds import FixedThreshold
from lowp.hybrid.ramp import Ramp
from lowp.hybrid.term import WeightedObjective

CALLED = ("encode", "classify", "token_logits")  # the methods that objectives call


@dataclass
class Surroundings:
    """What an objective has to know beside its own settings.

    Attributes:
        steps: of the run.
        is_causal: whether the model reads from the left only.
        classes: how many there are.
        samples: unlabelled texts.
        frequencies: how often each token occurs in the training texts, int64 [V].
        continues: which tokens continue a word, bool [V].
        sentinels: tokens that no text has.
        seed: of the run.
    """

    steps: int
    is_causal: bool
    classes: int
    samples: int
    frequencies: Tensor
    continues: Tensor
    sentinels: Sequence[int]
    seed: int


def sentinels_needed(settings: config.Config) -> int:
    """How many tokens beside the tokenizer's the model must have."""
    return sum(
        objectives.SpanCorruption.sentinels_needed(settings.data.max_length, o.rate, o.mean_span)
        for o in settings.objectives if isinstance(o, schema.SpanCorruption)
    )


def _threshold(settings: schema.PseudoLabel | schema.Consistency, around: Surroundings,
               ) -> FixedThreshold:
    if settings.adaptive == "flexmatch":
        return objectives.FlexMatch(around.classes, around.samples, settings.threshold)
    if settings.adaptive == "freematch":
        momentum = settings.momentum
        if momentum is None:
            momentum = 0.99 if around.steps < 1000 else 0.999
        return objectives.FreeMatch(around.classes, momentum, settings.fairness)
    return FixedThreshold(settings.threshold)


def _objective(settings: schema.Objective, around: Surroundings) -> Any:
    seed = around.seed
    match settings:
        case schema.Supervised():
            annealing = None if settings.annealing is None else \
                objectives.SignalAnnealing(around.steps, settings.annealing)
            return objectives.Supervised(settings.label_smoothing, annealing)
        case schema.ClassLM():
            return objectives.ClassLM()
        case schema.EvidenceBound():
            return objectives.EvidenceBound(settings.beta)
        case schema.LanguageModel():
            if around.is_causal:
                return objectives.CausalLM()
            return objectives.MaskedLM(settings.mask_rate, seed,
                                       around.continues if settings.whole_words else None)
        case schema.SpanCorruption():
            return objectives.SpanCorruption(around.sentinels, settings.rate, settings.mean_span,
                                             seed)
        case schema.Denoising():
            return objectives.Denoising(settings.drop, settings.mask, seed)
        case schema.Contrastive():
            return objectives.Contrastive(settings.temperature)
        case schema.PseudoLabel():
            return objectives.PseudoLabel(_threshold(settings, around))
        case schema.Consistency():
            return objectives.Consistency(_threshold(settings, around), settings.drop,
                                          settings.mask, seed)
        case schema.UDA():
            return objectives.UDA(settings.temperature, settings.threshold, settings.drop,
                                  settings.mask, seed)
        case schema.MeanTeacher():
            return objectives.MeanTeacher(settings.decay)
        case schema.VirtualAdversarial():
            return objectives.VirtualAdversarial(settings.epsilon, settings.xi,
                                                 settings.iterations, around.frequencies, seed)
        case schema.Entropy():
            return objectives.EntropyMinimization()


def build_objective(settings: schema.Objective, around: Surroundings) -> WeightedObjective:
    """An objective with its weight, a ramp over a part of the steps or constant, and its recipe."""
    weight: float | Callable[[int], float]
    if isinstance(settings.weight, schema.Ramp):
        ramp = settings.weight
        length = max(1, round(ramp.fraction * around.steps))
        weight = Ramp(kind=ramp.kind, start=ramp.start, end=ramp.end, steps=length)
    else:
        weight = settings.weight
    return WeightedObjective(_objective(settings, around), weight, recipe=settings.precision)


def build_mixing(settings: schema.Mixing, terms: Sequence[WeightedObjective]) -> Mixing:
    """The rule that learns factors of the weights, if there is one."""
    if settings.kind == "uncertainty":
        names = [t.name for t in terms if not getattr(t.objective, "self_labelled", False)]
        return Uncertainty(names, settings.lr)
    if settings.kind == "gradnorm":
        return GradNorm([term.name for term in terms], settings.alpha, settings.lr)
    return Mixing()


def autocast_model(model: nn.Module) -> None:
    """Let the methods that objectives call run under ``torch.autocast`` in bf16, in place."""
    device = next(model.parameters()).device.type
    for name in CALLED:
        setattr(model, name, torch.autocast(device, torch.bfloat16)(getattr(model, name)))


def compile_model(model: nn.Module, backend: str | None) -> None:
    """Let ``torch.compile`` make the methods that objectives call, in place; lengths may vary."""
    if backend is not None:
        for name in CALLED:
            setattr(model, name, torch.compile(getattr(model, name), backend=backend, dynamic=True))
