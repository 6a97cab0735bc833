"""transformers' Trainer on an int8 GPT-2 with lowp's AdamW; a tiny model from a config, no hub.

    python examples/trainer_client.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import lowp


def main(steps: int = 30, out: str = "runs/trainer") -> list[float]:
    """Train; the loss at every step."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    model = lowp.convert(GPT2LMHeadModel(config), "int8")
    tokens = torch.randint(0, 8, (64, 24)).cumsum(1) % 64
    data = [{"input_ids": row, "labels": row} for row in tokens]
    optimizer = lowp.optim.AdamW(model.named_parameters(), lr=3e-3, state_dtype="int8")
    arguments = TrainingArguments(out, max_steps=steps, per_device_train_batch_size=16,
                                  logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
                                  disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
