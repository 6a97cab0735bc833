"""The one schema of a training run, for YAML files and command-line flags alike."""

from __future__ import annotations

import difflib
import hashlib
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from lowp.hybrid.objective_config import (
    SELF_LABELLED,
    WRITING,
    Consistency,
    Fallback,
    LanguageModel,
    Mixing,
    Objective,
    Ramp,
    Supervised,
)
from lowp.hybrid.section import Fraction, Part, Section, Seed


class ConfigError(ValueError):
    """A configuration is refused; the message names each key, what it must be and what came."""


class Data(Section):
    """Where the texts come from, and how they become tokens."""

    path: Path | None = Field(
        default=None, description="CSV, TSV or JSONL with a text and an optional label column; "
        "without it or a dataset: docstrings of this Python's standard library")
    unlabelled: Path | None = Field(
        default=None, description="more texts, without labels; needs path")
    heldout: Path | None = Field(
        default=None,
        description="labelled texts to measure accuracy on; without it a part of path")
    dataset: str | None = Field(
        default=None, description="name of a Hugging Face dataset; needs a network")
    text_column: str | None = Field(
        default=None, description="name of the text column; else it is found")
    label_column: str | None = Field(
        default=None, description="name of the label column; else it is found")
    labels: PositiveInt | None = Field(
        default=None, description="how many labels to keep, the rest is unlabelled; all by default")
    classes: int = Field(
        default=8, ge=2,
        description="packages of the standard library to tell apart; docstrings only")
    labels_per_class: PositiveInt = Field(
        default=20, description="labels to keep in each class; docstrings only")
    validation: Part = Field(
        default=0.0, description="part of the labelled texts that is never trained on, but chooses "
        "the best weights, which the run then ends with")
    seed: Seed = Field(default=0, description="seed of the split and of which labels are kept")
    tokenizer: Literal["wordpiece", "word"] = Field(
        default="wordpiece", description="kind of tokenizer")
    vocab_size: int = Field(
        default=2000, ge=64, le=1_000_000, description="most entries of the vocabulary")
    max_length: int = Field(default=40, ge=4, description="tokens that are kept of a text")

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if self.path is not None and self.dataset is not None:
            raise ValueError("expected path or dataset, got both")
        for name in ("unlabelled", "heldout"):
            if getattr(self, name) is not None and self.path is None:
                raise ValueError(f"{name} needs path, the labelled data, too")
        return self


class Model(Section):
    """The network."""

    kind: Literal["lstm", "transformer"] = Field(default="transformer", description="which network")
    embedding: PositiveInt = Field(
        default=64, description="width of the token embeddings; lstm only")
    width: PositiveInt = Field(default=128, description="width of the hidden states")
    layers: PositiveInt = Field(default=1, description="recurrent layers, or transformer blocks")
    heads: PositiveInt = Field(default=4, description="attention heads; transformer only")
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="probability that a value is dropped")
    bidirectional: bool = Field(
        default=False, description="read both ways; lstm without causal_lm only")

    @model_validator(mode="after")
    def _heads_divide(self) -> Model:
        if self.kind == "transformer" and self.width % self.heads:
            raise ValueError(f"heads must divide width {self.width}, got {self.heads}")
        return self


class Precision(Section):
    """The numbers that the model is made of."""

    linear: Literal["fp32", "fp16", "bf16", "int8", "int8_full", "torch", "autocast"] = Field(
        default="int8", description="recipe of every linear layer; torch: plain nn.Linear; "
        "autocast: the same under torch.autocast in bf16")
    weights: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="type of the weights; auto: bf16 for linear bf16 and int8, else fp32")
    share_weight_codes: bool = Field(
        default=True, description="quantize a weight once for all passes of a step, to the same "
        "codes; takes up to 2 bytes a weight meanwhile")
    fallback: Fallback = Field(
        default_factory=Fallback, description="bf16 for layers that int8 does not suit")

    @property
    def is_torch(self) -> bool:
        """Whether the layers are torch's own, with no code of lowp's kernels."""
        return self.linear in ("torch", "autocast")

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("weights", "auto") == "auto":
            linear = values.get("linear", "int8")
            is_16_bit = linear in ("bf16", "int8", "int8_full")
            return {**values, "weights": "bf16" if is_16_bit else "fp32"}
        return values


class Optimizer(Section):
    """How the weights follow the gradient."""

    kind: Literal["adamw", "sgd", "torch_adamw"] = Field(
        default="adamw", description="lowp.optim's AdamW or SGD, or torch.optim.AdamW")
    lr: PositiveFloat = Field(default=3e-3, description="peak learning rate")
    betas: tuple[Fraction, Fraction] = Field(
        default=(0.9, 0.999), description="AdamW's averaging factors")
    eps: PositiveFloat = Field(default=1e-8, description="AdamW's addend of the denominator")
    momentum: Fraction = Field(default=0.9, description="SGD's momentum")
    weight_decay: NonNegativeFloat = Field(default=1e-2, description="decoupled in AdamW")
    rounding: Literal["stochastic", "nearest"] = Field(
        default="stochastic",
        description="how updated 16-bit weights and states are rounded; lowp only")
    state_dtype: Literal["fp32", "bf16", "int8"] | None = Field(
        default=None, description="type of the moments; by default that of the weights; lowp only")
    clip: PositiveFloat = Field(default=1.0, description="largest norm of the whole gradient")
    warmup: Fraction = Field(default=0.05, description="part of the steps in which the rate rises")


HYBRID: tuple[Objective, ...] = (
    Supervised(kind="supervised"),
    LanguageModel(kind="language_model"),
    Consistency(kind="consistency", weight=Ramp(end=0.3)),
)


class Config(Section):
    """A training run. Two runs of equal configuration, data and thread count have equal bits."""

    data: Data = Field(default_factory=Data, description="texts and tokens")
    model: Model = Field(default_factory=Model, description="network")
    precision: Precision = Field(
        default_factory=lambda: Precision.model_validate({}), description="numbers")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="updates")
    objectives: tuple[Objective, ...] = Field(
        default=HYBRID, description="the losses that are added, each with its weight")
    mixing: Mixing = Field(default_factory=Mixing, description="how the losses become one")
    steps: PositiveInt = Field(default=400, description="optimizer updates")
    batch_size: PositiveInt = Field(default=32, description="labelled texts a step")
    ratio: PositiveInt = Field(
        default=2, description="unlabelled texts for each labelled one in a step")
    accumulate: PositiveInt = Field(
        default=1, description="parts of a batch that go through the model one after another")
    average: Part | None = Field(
        default=None, description="decay of averaged weights, which evaluations use; null: none")
    patience: PositiveInt | None = Field(
        default=None, description="evaluations without a better validation macro-F1 before the run "
        "stops; needs data.validation")
    compile: Literal["inductor", "aot_eager", "eager"] | None = Field(
        default=None, description="torch.compile's backend for the model; null: not compiled")
    shard: bool = Field(
        default=False, description="on several ranks: each keeps a part of the weights, gradients "
        "and states (FSDP2); without average, mean_teacher and mixing by gradients")
    seed: Seed = Field(default=0, description="seed of weights, order, dropout, masks and rounding")
    # A step of the default model costs 0.2 s of CPU time on one thread; on two, beside two busy
    # processes on two cores, OpenMP's waiting threads made it 2.3 s.
    threads: PositiveInt | None = Field(
        default=1, description="CPU threads; null: torch's choice, for larger models")
    eval_every: PositiveInt = Field(default=100, description="steps between held-out evaluations")
    eval_batch_size: PositiveInt = Field(default=256, description="held-out texts at a time")
    checkpoint_every: PositiveInt = Field(default=100, description="steps between checkpoints")
    keep: PositiveInt = Field(default=2, description="checkpoints that are kept")
    max_skipped: PositiveInt = Field(
        default=10, description="consecutive steps without a finite gradient before the run stops")

    @model_validator(mode="after")
    def _objectives_fit(self) -> Config:
        kinds = [objective.kind for objective in self.objectives]
        if not kinds:
            raise ValueError("objectives must name at least one")
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"objectives must differ in kind, got {', '.join(kinds)}")
        writing = [kind for kind in kinds if kind in WRITING]
        if self.model.kind == "transformer" and writing:
            raise ValueError(f"model.kind must be lstm for the objective {writing[0]}: the "
                             "transformer is an encoder and writes no text")
        causal = [kind for kind in kinds if kind in (*WRITING, "language_model")]
        if self.model.kind == "lstm" and self.model.bidirectional and causal:
            raise ValueError(f"model.bidirectional must be false for the objective {causal[0]}: "
                             "an LSTM that reads both ways has seen the next token")
        return self

    @model_validator(mode="after")
    def _precisions_fit(self) -> Config:
        if self.precision.is_torch:
            for objective in self.objectives:
                if objective.precision is not None:
                    raise ValueError(f"precision.linear must name a recipe for the precision of "
                                     f"the objective {objective.kind}, "
                                     f"got {self.precision.linear!r}")
            if self.precision.fallback.sqnr is not None:
                raise ValueError("precision.linear must name a recipe for precision.fallback, "
                                 f"got {self.precision.linear!r}")
        return self

    @model_validator(mode="after")
    def _loop_fits(self) -> Config:
        kinds = [objective.kind for objective in self.objectives]
        if self.mixing.kind == "uncertainty" and all(kind in SELF_LABELLED for kind in kinds):
            raise ValueError("mixing.kind uncertainty needs an objective that is not "
                             f"self-labelled, got {', '.join(kinds)}")
        if self.mixing.kind == "gradnorm" and len(kinds) < 2:
            raise ValueError(f"mixing.kind gradnorm needs two objectives, got {kinds[0]}")
        if self.patience is not None and self.data.validation == 0:
            raise ValueError("patience needs data.validation above 0, as stopping by the held-out "
                             "texts would be fitted to them")
        by_gradient = self.mixing.kind == "gradnorm" or self.mixing.project_conflicts \
            or self.mixing.separate_gradients
        if self.shard and (by_gradient or self.average is not None or "mean_teacher" in kinds):
            raise ValueError("shard must be false for average, mean_teacher, gradnorm, "
                             "project_conflicts and separate_gradients, which need whole weights")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate must be at most batch_size {self.batch_size}, "
                             f"got {self.accumulate}")
        return self

    def digest(self) -> str:
        """SHA-256 of the configuration's canonical JSON: what a checkpoint belongs to."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """As YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping, not yet checked.

    Raises:
        ConfigError: it cannot be read, or holds no mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values or {}


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key such as ``optimizer.lr``, making the sections on the way."""
    *sections, last = key.split(".")
    for name in sections:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {name} is not a section, it is {inner!r}")
        values = inner
    values[last] = value


def parse_assignment(text: str) -> tuple[str, Any]:
    """``optimizer.lr=1e-3`` as a key and a value, which is read as YAML.

    Raises:
        ConfigError: not of that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"expected key=value such as optimizer.lr=1e-3, got {text!r}")
    try:
        return key.strip(), yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {value!r} is not readable YAML: {error}") from error


def resolve(values: Mapping[str, Any]) -> Config:
    """Check a mapping and fill in the defaults.

    Raises:
        ConfigError: every unknown key, with the nearest known one, and every bad value.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def _models_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


def _place(location: tuple[int | str, ...], unknown: bool) -> tuple[str, list[str]]:
    """The dotted key of an error, without pydantic's union tags.

    Of an unknown key, also the known ones in its place.
    """
    models: list[type[Section]] = [Config]
    key = ""
    for part in location:
        known = sorted({name for model in models for name in model.model_fields})
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if isinstance(part, int):
            key += f"[{part}]"
        elif fields:
            key += f".{part}" if key else part
            models = [m for field in fields for m in _models_in(field.annotation)]
            known = sorted({name for model in models for name in model.model_fields})
        elif any(_tag(model) == part or model.__name__.lower() == part for model in models):
            models = [m for m in models if _tag(m) == part or m.__name__.lower() == part]
        elif unknown:
            return f"{key}.{part}" if key else part, known
    return key, []


def _tag(model: type[Section]) -> str:
    field = model.model_fields.get("kind")
    options = typing.get_args(field.annotation) if field else ()
    return str(options[0]) if len(options) == 1 else ""


def _explain(detail: Any) -> str:
    unknown = detail["type"] == "extra_forbidden"
    key, known = _place(detail["loc"], unknown)
    if unknown:
        close = difflib.get_close_matches(key.rpartition(".")[2], known, 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    message = detail["msg"].removeprefix("Value error, ")
    given = detail["input"]
    shown = "" if isinstance(given, Mapping | BaseModel) else f", got {given!r}"
    return f"{key or 'config'}: {message}{shown}"
