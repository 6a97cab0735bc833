"""The configuration of each objective, and of how they are mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
)

from lowp.hybrid.section import Fraction, Part, Section


class Ramp(Section):
    """A weight that changes with the steps."""

    kind: Literal["constant", "linear", "cosine", "sigmoid"] = Field(
        default="sigmoid", description="shape")
    start: NonNegativeFloat = Field(default=0.0, description="weight at the first step")
    end: NonNegativeFloat = Field(default=1.0, description="weight at the end of the ramp")
    fraction: float = Field(
        default=0.4, gt=0, le=1, description="part of all steps that the ramp takes")


def _weight_tag(value: Any) -> str:
    return "ramp" if isinstance(value, Mapping | Ramp) else "number"


Weight = Annotated[
    Annotated[NonNegativeFloat, Tag("number")] | Annotated[Ramp, Tag("ramp")],
    Discriminator(_weight_tag),
]


class _Objective(Section):
    weight: Weight = Field(default=1.0, description="its factor in the sum of the losses")
    precision: Literal["fp32", "fp16", "bf16", "int8", "int8_full"] | None = Field(
        default=None, description="recipe of its passes; by default that of precision.linear")


class Supervised(_Objective):
    """Cross-entropy on the labelled stream."""

    kind: Literal["supervised"]
    label_smoothing: Part = Field(default=0.0, description="mass spread over all classes")
    annealing: Literal["linear", "log", "exp"] | None = Field(
        default=None, description="how fast labelled texts that are learned already count again")


class ClassLM(_Objective):
    """The tokens of a labelled text, given its class."""

    kind: Literal["class_lm"]
    weight: Weight = Field(default=0.3, description="its factor in the sum of the losses")


class EvidenceBound(_Objective):
    """The tokens of an unlabelled text under the class that is inferred; wants class_lm."""

    kind: Literal["evidence_bound"]
    weight: Weight = Field(
        default=Ramp(fraction=0.1), description="its factor in the sum of the losses")
    beta: float = Field(default=0.3, gt=0, le=1, description="how far the words' odds are believed")


class LanguageModel(_Objective):
    """Next-token modelling for an LSTM, masked-token modelling for a transformer."""

    kind: Literal["language_model"]
    mask_rate: float = Field(default=0.15, gt=0, lt=1, description="part of the tokens masked")
    whole_words: bool = Field(
        default=False, description="mask all pieces of a word or none; transformer only")


class SpanCorruption(_Objective):
    """Spans hidden behind sentinels are written; lstm only."""

    kind: Literal["span_corruption"]
    rate: float = Field(default=0.15, gt=0, lt=1, description="part of the tokens hidden")
    mean_span: float = Field(default=3.0, ge=1, description="tokens of a span, on average")


class Denoising(_Objective):
    """The text is written from a damaged form of it; lstm only."""

    kind: Literal["denoising"]
    drop: Part = Field(default=0.1, description="part of the tokens left out")
    mask: Part = Field(default=0.0, description="part of the other tokens hidden")


class Contrastive(_Objective):
    """Two views of a text nearer to each other than to other texts."""

    kind: Literal["contrastive"]
    temperature: PositiveFloat = Field(default=0.05, description="of the cosines")


class _Thresholded(_Objective):
    threshold: Fraction = Field(
        default=0.95, description="least probability of a label that is used")
    adaptive: Literal["flexmatch", "freematch"] | None = Field(
        default=None, description="a threshold for each class: below threshold by what the class "
        "has learned, or following the model's confidence")
    momentum: Part | None = Field(
        default=None, description="freematch's; by default 0.999, 0.99 below 1000 steps")
    fairness: NonNegativeFloat = Field(
        default=0.01, description="freematch's weight of the penalty for uneven labels")


class PseudoLabel(_Thresholded):
    """The model's own confident predictions as labels."""

    kind: Literal["pseudo_label"]


class _Augmented(Section):
    drop: Part = Field(default=0.2, description="part of the tokens left out")
    mask: Part = Field(default=0.2, description="part of the other tokens hidden")


class Consistency(_Thresholded, _Augmented):
    """The same answer for a text and its augmented form."""

    kind: Literal["consistency"]


class UDA(_Objective, _Augmented):
    """The same, sharpened answer for a text and its augmented form."""

    kind: Literal["uda"]
    temperature: float = Field(default=0.4, gt=0, le=1, description="of the sharpening")
    threshold: Fraction = Field(
        default=0.8, description="least probability of an answer that is used")


class MeanTeacher(_Objective):
    """The answer of a teacher with averaged weights."""

    kind: Literal["mean_teacher"]
    weight: Weight = Field(
        default=Ramp(end=10.0), description="its factor in the sum of the losses")
    decay: Part = Field(default=0.99, description="of the average")


class VirtualAdversarial(_Objective):
    """The same answer in the direction in which it changes most."""

    kind: Literal["virtual_adversarial"]
    epsilon: PositiveFloat = Field(
        default=5.0, description="norm of a text's perturbation, in deviations of the embeddings")
    xi: PositiveFloat | None = Field(
        default=None, description="norm of the probe; by default 0.1, 3 for 16-bit weights")
    iterations: PositiveInt = Field(default=1, description="of the search for the direction")


class Entropy(_Objective):
    """Sure answers for unlabelled texts."""

    kind: Literal["entropy"]
    weight: Weight = Field(default=0.06, description="its factor in the sum of the losses")


Objective = Annotated[
    Supervised | ClassLM | EvidenceBound | LanguageModel | SpanCorruption | Denoising
    | Contrastive | PseudoLabel | Consistency | UDA | MeanTeacher | VirtualAdversarial | Entropy,
    Field(discriminator="kind"),
]
WRITING = ("span_corruption", "denoising")  # what only a model that writes text can do
SELF_LABELLED = ("pseudo_label", "consistency", "uda", "mean_teacher", "virtual_adversarial",
                 "entropy", "evidence_bound")


class Mixing(Section):
    """How the losses and their gradients become one."""

    kind: Literal["fixed", "uncertainty", "gradnorm"] = Field(
        default="fixed", description="weights as given, or times a learned factor: by the "
        "uncertainty of each objective that is not self-labelled, or balancing gradient norms")
    lr: PositiveFloat = Field(default=0.025, description="step size of what is learned")
    alpha: NonNegativeFloat = Field(default=1.5, description="gradnorm's strength")
    project_conflicts: bool = Field(
        default=False, description="PCGrad: no gradient works against another objective's")
    separate_gradients: bool = Field(
        default=False, description="log each objective's gradient norm over all parts and ranks, "
        "and its cosine to the first's; takes 4 bytes a weight and objective")


class Fallback(Section):
    """Layers whose int8 operands lose too much run in bf16 for a while."""

    sqnr: float | None = Field(
        default=None, description="least signal to quantization noise, in dB; null: no fallback")
    every: PositiveInt = Field(default=10, description="steps between measurements")
    steps: PositiveInt = Field(default=100, description="how long a layer stays in bf16")
