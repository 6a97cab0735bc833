"""One schema for YAML and flags; a wrong key or value is an error that names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from lowp.hybrid import config
from lowp.hybrid.config import Config, ConfigError, resolve


def test_defaults_are_a_hybrid_low_precision_run() -> None:
    settings = resolve({})
    assert [o.kind for o in settings.objectives] == ["supervised", "language_model", "consistency"]
    assert (settings.precision.linear, settings.precision.weights) == ("int8", "bf16")
    assert settings.optimizer.kind == "adamw"
    assert settings.optimizer.rounding == "stochastic"


def test_yaml_round_trip_keeps_everything() -> None:
    settings = resolve({
        "data": {"path": "a.tsv", "labels": 100}, "optimizer": {"lr": 0.1 + 0.2, "eps": 1e-30},
        "objectives": [{"kind": "supervised", "weight": 0.5},
                       {"kind": "pseudo_label", "weight": {"kind": "linear", "end": 3}}],
        "seed": 2**63 - 1,
    })
    again = resolve(yaml.safe_load(settings.to_yaml()))
    assert again == settings
    assert again.digest() == settings.digest()


def test_the_hybrid_example_of_every_kind_resolves() -> None:
    kinds = [{"kind": kind} for kind in (
        "supervised", "class_lm", "evidence_bound", "language_model", "span_corruption",
        "denoising", "contrastive", "pseudo_label", "consistency", "uda", "mean_teacher",
        "virtual_adversarial", "entropy")]
    settings = resolve({"objectives": kinds, "model": {"kind": "lstm"}})
    weights = {o.kind: o.weight for o in settings.objectives}
    assert weights["entropy"] == 0.06 and weights["mean_teacher"].end == 10.0
    assert resolve(yaml.safe_load(settings.to_yaml())) == settings


def test_digest_tells_every_setting_apart() -> None:
    base = resolve({}).digest()
    assert resolve({"optimizer": {"lr": Config().optimizer.lr}}).digest() == base
    for change in ({"seed": 1}, {"optimizer": {"lr": 0.0123456789}}, {"steps": 7},
                   {"objectives": [{"kind": "supervised"}]}, {"data": {"max_length": 9}}):
        assert resolve(change).digest() != base


@pytest.mark.parametrize(("linear", "weights"), [
    ("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "bf16"), ("int8", "bf16"), ("int8_full", "bf16"),
    ("torch", "fp32"), ("autocast", "fp32"),
])
def test_weights_follow_the_recipe_unless_given(linear: str, weights: str) -> None:
    assert resolve({"precision": {"linear": linear}}).precision.weights == weights
    explicit = resolve({"precision": {"linear": linear, "weights": "fp32"}})
    assert explicit.precision.weights == "fp32"


@pytest.mark.parametrize(("values", "message"), [
    ({"optimiser": {}}, r"^optimiser: unknown key; did you mean 'optimizer'\?$"),
    ({"optimizer": {"lrr": 1}}, r"^optimizer\.lrr: unknown key; did you mean 'lr'\?$"),
    ({"optimizer": {"zzz": 1}}, r"^optimizer\.zzz: unknown key; known keys: betas, clip, eps,"),
    ({"objectives": [{"kind": "supervised"}, {"kind": "consistency", "treshold": 0.9}]},
     r"^objectives\[1\]\.treshold: unknown key; did you mean 'threshold'\?$"),
    ({"objectives": [{"kind": "consistency", "weight": {"sart": 1}}]},
     r"^objectives\[0\]\.weight\.sart: unknown key; did you mean 'start'\?$"),
    ({"objectives": [{"kind": "denoise"}]}, r"^objectives\[0\]: .*'denoise'.*'consistency'"),
    ({"objectives": [{}]}, r"^objectives\[0\]: .*kind"),
    ({"objectives": []}, "at least one"),
    ({"objectives": [{"kind": "supervised"}] * 2}, "differ in kind"),
    ({"objectives": [{"kind": "supervised", "weight": -1}]},
     r"^objectives\[0\]\.weight: .*greater than or equal to 0, got -1$"),
    ({"steps": 0}, "^steps: .*greater than 0, got 0$"),
    ({"steps": 1.5}, "^steps: .*got 1.5$"),
    ({"steps": None}, "^steps: .*got None$"),
    ({"optimizer": {"lr": float("nan")}}, r"^optimizer\.lr: .*finite.*nan"),
    ({"optimizer": {"clip": 0}}, r"^optimizer\.clip: .*got 0$"),
    ({"optimizer": {"betas": [0.9]}}, r"^optimizer\.betas"),
    ({"precision": {"linear": "fp8"}}, r"^precision\.linear: .*'int8'.*got 'fp8'$"),
    ({"precision": "int8"}, "^precision: .*got 'int8'$"),
    ({"model": {"kind": "transformer", "width": 10, "heads": 4}}, "^model: heads must divide"),
    ({"model": {"dropout": 1.0}}, r"^model\.dropout: .*less than 1, got 1.0$"),
    ({"model": {"kind": "lstm", "bidirectional": True}}, "seen the next token"),
    ({"data": {"path": "a", "dataset": "b"}}, "^data: expected path or dataset, got both$"),
    ({"data": {"heldout": "b"}}, "^data: heldout needs path"),
    ({"seed": 2**63}, "^seed: "),
    ({"mixing": {"kind": "gradnrm"}}, r"^mixing\.kind: .*'gradnorm'.*got 'gradnrm'$"),
    ({"mixing": {"alfa": 1}}, r"^mixing\.alfa: unknown key; did you mean 'alpha'\?$"),
    ({"mixing": {"kind": "gradnorm"}, "objectives": [{"kind": "supervised"}]},
     "gradnorm needs two objectives, got supervised"),
    ({"mixing": {"kind": "uncertainty"}, "objectives": [{"kind": "uda"}]},
     "uncertainty needs an objective that is not self-labelled, got uda"),
    ({"patience": 3}, r"patience needs data\.validation above 0"),
    ({"data": {"validation": 1.0}}, r"^data\.validation: .*less than 1"),
    ({"accumulate": 64, "batch_size": 32}, "accumulate must be at most batch_size 32, got 64"),
    ({"precision": {"linear": "torch"},
      "objectives": [{"kind": "supervised", "precision": "bf16"}]},
     r"precision\.linear must name a recipe for the precision of the objective supervised"),
    ({"precision": {"linear": "torch", "fallback": {"sqnr": 20}}},
     r"must name a recipe for precision\.fallback"),
    ({"precision": {"fallback": {"every": 0}}}, r"^precision\.fallback\.every: .*got 0$"),
    ({"objectives": [{"kind": "supervised", "precision": "int4"}]},
     r"^objectives\[0\]\.precision: .*'int8_full'.*got 'int4'$"),
    ({"objectives": [{"kind": "pseudo_label", "adaptive": "softmatch"}]},
     r"^objectives\[0\]\.adaptive: .*'freematch'.*got 'softmatch'$"),
    ({"objectives": [{"kind": "mean_teacher", "weight": {"ende": 1}}]},
     r"^objectives\[0\]\.weight\.ende: unknown key; did you mean 'end'\?$"),
    ({"objectives": [{"kind": "denoising"}], "model": {"kind": "transformer"}},
     r"model\.kind must be lstm for the objective denoising"),
    ({"objectives": [{"kind": "span_corruption"}],
      "model": {"kind": "lstm", "bidirectional": True}},
     "false for the objective span_corruption"),
    ({"compile": "fast"}, "^compile: .*'inductor'.*got 'fast'$"),
    ({"steps": 0, "sed": 1}, r"(?s)steps: .*sed: unknown key; did you mean 'seed'"),
])
def test_what_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(values)


def test_yaml_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7\noptimizer:\n  lr: 1e-3\n")  # YAML 1.1 reads 1e-3 as a string
    settings = resolve(config.read_yaml(file))
    assert (settings.steps, settings.optimizer.lr) == (7, 1e-3)
    file.write_text("")
    assert resolve(config.read_yaml(file)) == resolve({})


@pytest.mark.parametrize(("text", "message"), [
    ("steps: 1\nsteps: 2\n", "'steps' stands twice"), ("a: [", "not readable YAML"),
    ("- a\n- b\n", "expected keys and values, got list"),
    ("a: !!python/name:os.system", "not readable YAML"),
])
def test_bad_yaml_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.read_yaml(file)
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        config.read_yaml(tmp_path / "none.yaml")


def test_assignments() -> None:
    values: dict[str, Any] = {"optimizer": {"lr": 1}}
    for text in ("optimizer.lr=1e-4", "steps=9", "data.path=a=b.csv",
                 "objectives=[{kind: supervised, weight: 2}]"):
        config.assign(values, *config.parse_assignment(text))
    settings = resolve(values)
    assert (settings.optimizer.lr, settings.steps) == (1e-4, 9)
    assert settings.data.path == Path("a=b.csv")
    assert settings.objectives[0].weight == 2
    for text, message in (("steps", "expected key=value"), ("=3", "expected key=value"),
                          ("steps=[", "not readable")):
        with pytest.raises(ConfigError, match=message):
            config.parse_assignment(text)
    with pytest.raises(ConfigError, match="steps is not a section"):
        config.assign({"steps": 3}, "steps.more", 1)


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for inner in config._models_in(field.annotation):
            yield from sections(inner)


def test_every_setting_is_described() -> None:
    found = set(sections(Config))
    assert len(found) >= 10
    for section in found:
        assert section.model_config["extra"] == "forbid"
        for name, field in section.model_fields.items():
            assert field.description or name == "kind", f"{section.__name__}.{name}"
