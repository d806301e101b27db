"""Chapter 2's picture classifier: the data set, the settings and the fine-tuning that the chapter builds by hand.

`build()` and `train()` are what `assets.trained("fashion")` calls where the chapter itself has not run.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset
from tqdm.auto import tqdm

from qft_utils import data, models, training

CLASSES = len(data.FASHION_CLASSES)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, in [0, 1]


@dataclass(frozen=True)
class Settings:
    """What the fine-tuning is; the learning rate and the decay are the best of a grid on the validation part."""

    images: int = 24_000
    epochs: int = 1
    batch_size: int = 64
    pixels: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0


def to_input(images: Tensor, pixels: int) -> Tensor:
    """Grey pictures (N, 28, 28), uint8, as a pretrained CNN expects them: (N, 3, pixels, pixels), channels last."""
    x = images.unsqueeze(1).float() / 255  # N, 1, 28, 28
    x = F.interpolate(x, size=(pixels, pixels), mode="bilinear")
    mean, std = torch.tensor([MEAN, STD]).reshape(2, 1, 3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)  # N, 3, pixels, pixels


class Pictures(Dataset):
    """Pictures and labels, fetched by a list of indices: one call makes a whole batch, which is fast."""

    def __init__(self, images: Tensor, labels: Tensor, pixels: int, augment: Callable | None = None):
        self.images, self.labels, self.pixels, self.augment = images, labels, pixels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        images = self.images[chosen]
        if self.augment is not None:
            images = torch.stack([self.augment(image[None])[0] for image in images])
        return to_input(images, self.pixels), self.labels[chosen]


def loader(dataset: Dataset, batch_size: int, seed: int | None = None) -> DataLoader:
    """Batches: shuffled anew each epoch, by `seed`, or in order where there is none."""
    sampler = SequentialSampler(dataset)
    if seed is not None:
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    return DataLoader(dataset, batch_size=None, sampler=BatchSampler(sampler, batch_size, drop_last=False))


def new_head(model: nn.Module, classes: int = CLASSES) -> nn.Module:
    """The model, its last linear layer replaced by a fresh one, whose weights are drawn from torch's generator."""
    name, last = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    model.set_submodule(name, nn.Linear(last.in_features, classes))
    return model.to(memory_format=torch.channels_last)


def body_of(model: nn.Module) -> nn.Module:
    """A copy without the last linear layer, in evaluation mode: pictures in, features (N, width) out."""
    body = copy.deepcopy(model)
    body.set_submodule([name for name, m in body.named_modules() if isinstance(m, nn.Linear)][-1], nn.Identity())
    return body.eval()


@torch.no_grad()
def features(body: Callable[[Tensor], Tensor], batches: DataLoader) -> TensorDataset:
    """What the body makes of each picture, (N, width), with the labels (N,)."""
    made = [(body(inputs), labels) for inputs, labels in tqdm(batches, "features", leave=False)]
    return TensorDataset(*(torch.cat(parts) for parts in zip(*made, strict=True)))


def fine_tune(
    model: nn.Module,
    batches: DataLoader,
    validation: DataLoader,
    settings: Settings,
    loss: training.Loss = F.cross_entropy,
) -> training.History:
    """AdamW and one cycle of the learning rate over what is trainable; ends with the best weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps)
    run = {"optimizer": optimizer, "schedule": schedule, "epochs": settings.epochs, "clip_norm": 1.0, "loss": loss}
    return training.fit(model, batches, validation, **run)


def train_batches(settings: Settings) -> DataLoader:
    """The settings' share of the training part, shuffled by their seed."""
    images, labels = data.fashion_mnist("train")
    part = Pictures(images[: settings.images], labels[: settings.images], settings.pixels)
    return loader(part, settings.batch_size, settings.seed)


def evaluation_batches(split: data.Split, settings: Settings, count: int | None = None) -> DataLoader:
    """The first `count` pictures of a part, or all, in order."""
    images, labels = data.fashion_mnist(split)
    return loader(Pictures(images[:count], labels[:count], settings.pixels), 250)


def build() -> nn.Module:
    """EfficientNet-Lite0 under a fresh head, drawn from the settings' seed."""
    torch.manual_seed(Settings().seed)
    return new_head(models.load_cnn())


def train() -> nn.Module:
    """The whole of chapter 2's fine-tuning: model, pictures, settings."""
    settings = Settings()
    model = build()
    fine_tune(model, train_batches(settings), evaluation_batches("validation", settings, 2_000), settings)
    return model
