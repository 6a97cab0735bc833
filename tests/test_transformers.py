"""convert on transformers' models: the same network within the recipe's bound, in every use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowp
from lowp.experts import Experts
from lowp.key import clock
from tests.tensors import same_bits
from tests.tolerances import chain_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
SIZES: dict[str, Any] = {"vocab_size": 96}
LLAMA: dict[str, Any] = {
    **SIZES, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}
T5: dict[str, Any] = {
    **SIZES, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}
EXACT = lowp.Recipe("fp32", "fp32", "fp32")


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        **SIZES, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=3))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **SIZES, n_positions=64, n_embd=64, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2))


def t5(**options: Any) -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, **options))


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **options))


def mixtral(active: int = 4) -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **LLAMA, num_local_experts=4, num_experts_per_tok=active))


MODELS: dict[str, tuple[Callable[[], Any], int]] = {  # and products from the embedding to the loss
    "bert": (bert, 14), "gpt2": (gpt2, 8), "t5": (t5, 28),
    "t5 gated": (lambda: t5(feed_forward_proj="gated-gelu"), 32), "llama": (llama, 12),
    "mixtral": (mixtral, 12),
}


def tokens_for(seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(seed))


def passes(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits and gradients."""
    model.zero_grad()
    labels = tokens[:, 0] % 3 if isinstance(model, transformers.BertForSequenceClassification) \
        else tokens
    out = model(input_ids=tokens, labels=labels)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def whole_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert list(found) == list(exact)
    off = sum((found[n].double() - exact[n]).square().sum() for n in exact)
    return float((off / sum(g.double().square().sum() for g in exact.values())).sqrt())


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str) -> None:
    make, products = MODELS[name]
    model = make()
    tokens = tokens_for()
    loss, logits, grads = passes(model, tokens)
    keys, plan = list(model.state_dict()), lowp.plan(model)
    assert sum(entry.converts for entry in plan) >= 8
    for recipe in ("fp32", "bf16", "int8"):
        lowp.convert(model, recipe)
        assert list(model.state_dict()) == keys
        low_loss, low_logits, low_grads = passes(model, tokens)
        bound = chain_error(recipe, products)
        assert float((low_logits - logits).norm() / logits.norm()) < bound
        assert whole_error(low_grads, grads) < bound
        assert abs(float(low_loss - loss)) < bound
        assert recipe == "fp32" or not same_bits(low_logits, logits)
    lowp.revert(model)
    assert same_bits(passes(model, tokens)[1], logits)


def test_experts_convert_and_routers_stay() -> None:
    model = mixtral(active=2)
    loss, _, grads = passes(model, tokens_for())
    plan = {entry.fqn: entry for entry in lowp.plan(model)}
    gate, experts = plan["model.layers.0.mlp.gate"], plan["model.layers.0.mlp.experts"]
    assert not gate.converts and "MixtralTopKRouter holds 'weight' itself" in gate.reason
    assert experts.converts and experts.shape == (4, 64, 128) and "4 experts" in experts.reason
    before = type(model.model.layers[0].mlp.experts)
    lowp.convert(model, EXACT)
    module = model.model.layers[0].mlp.experts
    assert isinstance(module, Experts) and isinstance(module, before)
    low_loss, _, low_grads = passes(model, tokens_for())
    assert abs(float(low_loss - loss)) < chain_error("fp32", 12)
    assert whole_error(low_grads, grads) < chain_error("fp32", 12)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(passes(other, tokens_for())[1], passes(model, tokens_for())[1])
    lowp.revert(model)
    assert type(module) is before and "noise_ids" not in vars(module)
    module._is_expert_parallel = True
    plan = {entry.fqn: entry for entry in lowp.plan(model)}
    assert "spread over several ranks" in plan["model.layers.0.mlp.experts"].reason


def test_experts_with_bias_turned_weights_and_interleaved_gate() -> None:
    config = transformers.GptOssConfig(
        **LLAMA, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
        layer_types=["full_attention", "sliding_attention"])
    model = transformers.GptOssForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    loss, _, grads = passes(model, tokens_for())
    lowp.convert(model, EXACT)
    low_loss, _, low_grads = passes(model, tokens_for())
    assert abs(float(low_loss - loss)) < chain_error("fp32", 12)
    assert whole_error(low_grads, grads) < chain_error("fp32", 12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = lowp.convert(MODELS[name][0](), "int8")
    plain: Any = type(model).from_pretrained  # the class is transformers' own
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = plain(tmp_path)
    assert not any(isinstance(m, lowp.Linear | Experts) for m in loaded.modules())
    for key, value in model.state_dict().items():
        assert same_bits(loaded.state_dict()[key], value)
    lowp.convert(loaded, "int8")
    model.eval()
    assert same_bits(passes(loaded, tokens_for())[1], passes(model, tokens_for())[1])


def test_tied_embeddings_stay_one_parameter(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    lowp.convert(model, "int8", filter_fn=lambda m, fqn: True)
    assert type(model.lm_head) is lowp.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    optimizer = lowp.optim.AdamW(model.named_parameters(), lr=1e-3)
    passes(model, tokens_for())
    optimizer.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(optimizer.state) == len(list(model.parameters()))
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same_bits(loaded.lm_head.weight.detach(), model.lm_head.weight.detach())


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama", "mixtral"])
def test_generate(name: str) -> None:
    model = MODELS[name][0]().eval()
    prompt = tokens_for()[:2, :8]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    want = model.generate(prompt, **options)
    lowp.convert(model, "fp32")
    assert torch.equal(model.generate(prompt, **options), want)
    lowp.convert(model, "int8")  # one scale a token: a cached step quantizes what a whole pass does
    assert torch.equal(model.generate(prompt, **options),
                       model.generate(prompt, use_cache=False, **options))
    beams = model.generate(prompt, num_beams=2, **options)
    assert beams.shape == want.shape


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama", "mixtral"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_bits(name: str, reentrant: bool) -> None:
    model = lowp.convert(MODELS[name][0](), "int8_full").train()
    want = passes(model, tokens_for())
    model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # type: ignore[operator]
    found = passes(model, tokens_for())
    assert list(found[2]) == list(want[2])
    if name == "t5":  # its own sums are in another order then, also unconverted
        assert abs(float(found[0] - want[0])) < chain_error("fp32", 28)
        assert whole_error(found[2], want[2]) < chain_error("int8_full", 1)
    else:
        assert same_bits(found[0], want[0])
        assert all(same_bits(found[2][n], want[2][n]) for n in want[2])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral"])
def test_bf16_weights_and_autocast(name: str) -> None:
    make, products = MODELS[name]
    model = make()
    _, logits, grads = passes(model, tokens_for())
    # Twice the products: what stays in torch (attention, norms, the head) is bf16 here too.
    bound = chain_error("bf16", 2 * products) + chain_error("int8", products)
    lowp.convert(model, "int8")
    with torch.autocast("cpu", torch.bfloat16):
        found = passes(model, tokens_for())
    assert whole_error(found[2], grads) < bound
    assert float((found[1].float() - logits).norm() / logits.norm()) < bound
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    found = passes(model.to(torch.bfloat16), tokens_for())
    assert all(g.dtype == torch.bfloat16 for g in found[2].values())
    assert whole_error(found[2], grads) < bound


def test_mixed_dtypes_in_one_model() -> None:
    model = llama()
    _, _, grads = passes(model, tokens_for())
    lowp.convert(model, "bf16")
    for layer in model.model.layers:  # bf16 linear weights between fp32 norms
        for module in layer.modules():
            if isinstance(module, lowp.Linear):
                module.to(torch.bfloat16)
    found = passes(model, tokens_for())[2]
    for name, grad in found.items():
        assert grad.dtype == model.get_parameter(name).dtype
    assert whole_error(found, grads) < chain_error("bf16", 24)


def lora(model: Any, targets: list[str], **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False,
                             **options)
    torch.manual_seed(5)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize(("name", "targets"), [("llama", ["q_proj", "down_proj"]),
                                               ("gpt2", ["c_attn", "c_fc"])])
def test_lora(name: str, targets: list[str], tmp_path: Path) -> None:
    import peft

    make, products = MODELS[name]
    plain = make()
    frozen = copy.deepcopy(plain)
    options = {"fan_in_fan_out": name == "gpt2"}
    _, _, grads = passes(lora(copy.deepcopy(plain), targets, **options), tokens_for())
    model = lora(lowp.convert(plain, "int8"), targets, **options)
    found = passes(model, tokens_for())
    assert all("lora_" in key for key in found[2])
    assert whole_error(found[2], grads) < chain_error("int8", products)
    optimizer = lowp.optim.AdamW(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(float(passes(model, tokens_for())[0]))
        optimizer.step()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(lowp.convert(frozen, "int8"), tmp_path)
    with torch.no_grad():
        want = model.eval()(input_ids=tokens_for()).logits
        assert same_bits(loaded.eval()(input_ids=tokens_for()).logits, want)
        merged = loaded.merge_and_unload()
        off = merged(input_ids=tokens_for()).logits - want
    assert any(isinstance(m, lowp.Linear) or type(m).__module__ == "lowp.conv1d"
               for m in merged.modules())
    assert float(off.norm() / want.norm()) < 2**0.5 * chain_error("int8", products)


def test_training_follows_fp32() -> None:
    """Twenty AdamW steps on one batch: the loss falls as the unconverted model's does."""
    torch.manual_seed(1)
    plain = mixtral(active=2)
    low = lowp.convert(copy.deepcopy(plain), "int8")
    curves = []
    for model in (plain, low):
        clock.set(1)
        optimizer = lowp.optim.AdamW(model.named_parameters(), lr=3e-3)
        losses = []
        for _ in range(20):
            losses.append(float(passes(model, tokens_for())[0]))
            optimizer.step()
        curves.append(losses)
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert abs(curves[1][-1] - curves[0][-1]) < 0.05 * curves[0][0]
