"""Lightning's Trainer on an int8 BERT classifier; a tiny model from a config, no hub.

    python examples/lightning_client.py
"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import lowp


class Classifier(lightning.LightningModule):
    """BERT with int8 products and 8-bit optimizer states."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_labels=2,
                            num_attention_heads=2, intermediate_size=128)
        self.model = lowp.convert(BertForSequenceClassification(config), "int8")
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss of one batch."""
        loss: torch.Tensor = self.model(input_ids=batch[0], labels=batch[1]).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """lowp's AdamW over named parameters, so that names key its random bits."""
        return lowp.optim.AdamW(self.named_parameters(), lr=1e-3, state_dtype="int8")


def main(steps: int = 30) -> list[float]:
    """Train; the loss at every step."""
    lightning.seed_everything(0, verbose=False)
    tokens = torch.randint(0, 64, (64, 16))
    labels = (tokens[:, 0] > tokens[:, 1]).long()
    tokens[:, 2] = labels
    module = Classifier()
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", logger=False,
                                enable_checkpointing=False, enable_progress_bar=False,
                                enable_model_summary=False, gradient_clip_val=1.0)
    trainer.fit(module, DataLoader(TensorDataset(tokens, labels), batch_size=16, shuffle=True))
    return module.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
