"""accelerate's loop, with bf16 autocast and clipping, on an int8 Llama; no hub.

    python examples/accelerate_client.py
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lowp


def main(steps: int = 30) -> list[float]:
    """Train; the loss at every step."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=32)
    model = lowp.convert(LlamaForCausalLM(config), "int8")
    optimizer = lowp.optim.AdamW(model.named_parameters(), lr=3e-3)
    tokens = torch.randint(0, 8, (64, 24)).cumsum(1) % 64
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(list(tokens), batch_size=16, shuffle=True))
    losses: list[float] = []
    while len(losses) < steps:
        for batch in loader:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
