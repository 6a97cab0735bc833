"""PEFT's LoRA over an int8 T5 whose own weights are frozen; a tiny model from a config, no hub.

    python examples/lora_client.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

import lowp


def main(steps: int = 30) -> list[float]:
    """Train the adapters; the loss at every step."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2,
                      decoder_start_token_id=0)
    base = lowp.convert(T5ForConditionalGeneration(config), "int8")
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q", "v", "wi", "wo"]))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = lowp.optim.AdamW(trained, lr=1e-2)
    tokens = torch.randint(1, 64, (16, 12))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
