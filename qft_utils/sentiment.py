"""Chapter 1's sentiment classifier: the data set, the loop and the settings that the chapter builds by hand.

`build()` and `train()` are what `assets.trained("sentiment")` calls where the chapter itself has not run.
"""

from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

from qft_utils import data, models


@dataclass(frozen=True)
class Settings:
    """What the fine-tuning is; the best of three tries on the validation part, which were a tie."""

    sentences: int = 3_500
    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of all steps
    max_length: int = 64  # tokens
    seed: int = 0


class ReviewDataset(Dataset):
    """Review sentences as token ids, with their labels; tokenized once, padded later, batch by batch."""

    def __init__(self, frame: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int = 64):
        self.tokens = tokenizer(frame.text.tolist(), truncation=True, max_length=max_length)["input_ids"]
        self.labels = frame.label.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def loader(
    dataset: ReviewDataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int
) -> DataLoader:
    """Shuffled batches of sentences of about the same length, so that little of a batch is padding."""
    sampler = LengthGroupedSampler(
        batch_size, lengths=[len(t) for t in dataset.tokens], generator=torch.Generator().manual_seed(seed)
    )
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=DataCollatorWithPadding(tokenizer))


def fine_tune(model: nn.Module, batches: DataLoader, settings: Settings) -> list[float]:
    """AdamW with linear warm-up and decay under bf16 autocast; returns the loss of every step, in nats."""
    device = next(model.parameters()).device
    steps = settings.epochs * len(batches)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = get_linear_schedule_with_warmup(optimizer, int(settings.warmup * steps), steps)
    losses = []
    model.train()
    for epoch in range(settings.epochs):
        for batch in tqdm(batches, desc=f"epoch {epoch + 1} of {settings.epochs}"):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(**batch.to(device)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    return losses


@torch.inference_mode()
def predict(
    model: nn.Module, dataset: ReviewDataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> torch.Tensor:
    """Predicted labels (N,), in the order of the data set; sorted by length while it computes, to save padding."""
    device = next(iter(model.parameters())).device
    order = sorted(range(len(dataset)), key=lambda i: len(dataset.tokens[i]))
    batches = DataLoader(dataset, batch_size, sampler=order, collate_fn=DataCollatorWithPadding(tokenizer))
    predicted = torch.empty(len(dataset), dtype=torch.int64)
    predicted[order] = torch.cat([model(**batch.to(device)).logits.argmax(-1).cpu() for batch in batches])
    return predicted


def build() -> nn.Module:
    """MiniLM under a fresh two-way head, the head drawn from the settings' seed."""
    torch.manual_seed(Settings().seed)
    return models.load_encoder()[0]


def train() -> nn.Module:
    """The whole of chapter 1's fine-tuning: model, sentences, settings."""
    settings = Settings()
    torch.manual_seed(settings.seed)
    model, tokenizer = models.load_encoder()
    part = data.reviews("train").sample(settings.sentences, random_state=settings.seed)
    dataset = ReviewDataset(part, tokenizer, settings.max_length)
    fine_tune(model, loader(dataset, tokenizer, settings.batch_size, settings.seed), settings)
    return model
