"""Chapter 3's recovery: a fine-tuned picture classifier is narrowed to few bits, then trained for some extra steps.

The chapter builds these functions by hand; the sweeps behind it use them.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from qft_utils import data, fashion, qat, training
from qft_utils.observers import Percentile
from qft_utils.qat.quantizers import LearnedWeightQuantizer

ENDS = ("conv_stem", "classifier")  # the first and the last layer of EfficientNet-Lite0


@dataclass(frozen=True)
class Settings:
    """The extra steps, the same for every contender; the learning rate is each one's best of a small grid."""

    learning_rate: float
    images: int = 6_016  # pictures that the fine-tuning has not seen, each once
    batch_size: int = 64
    weight_decay: float = 0.01
    seed: int = 0


def calibration_batches(seed: int = 0) -> list[Tensor]:
    """One batch of 256 pictures that the fine-tuning has seen, drawn by `seed`."""
    images, _ = data.fashion_mnist("train")
    chosen = torch.randperm(fashion.Settings().images, generator=torch.Generator().manual_seed(seed))[:256]
    return [fashion.to_input(images[chosen], fashion.Settings().pixels)]


def narrow(model: nn.Module, weight_bits: int, act_bits: int, calibration: list[Tensor]) -> nn.Module:
    """A prepared copy: ranges from a percentile of the calibration and then fixed, first and last layer in 8 bits."""
    narrowed = qat.prepare(model, weight_bits, act_bits, observer=partial(Percentile, 99.9))
    qat.set_bits(narrowed, 8, 8, only=ENDS)
    qat.calibrate(narrowed, calibration)
    qat.freeze(narrowed, batch_norm=False)
    return narrowed


def narrow_learned(model: nn.Module, weight_bits: int, act_bits: int, calibration: list[Tensor]) -> nn.Module:
    """A prepared copy whose steps are learned, with its first and last layer in 8 bits."""
    narrowed = qat.prepare(model, weight_bits, act_bits, learned_step=True)
    qat.set_bits(narrowed, 8, 8, only=ENDS)
    for layer in map(narrowed.get_submodule, ENDS):  # their steps start as those of 8 bits do, not of a narrow range
        layer.weight_quantizer = LearnedWeightQuantizer(8, "channel", layer.weight, layer.factor_of_grid())
    qat.calibrate(narrowed, calibration)
    return narrowed


@torch.no_grad()
def refresh_norms(model: nn.Module, batches: DataLoader) -> nn.Module:
    """Pass through the batches in training mode, in place: the batch norms' statistics follow, nothing is learned.

    It ends in evaluation mode. Nagel et al. 2022 (arXiv 2203.11086) re-estimate them so.
    """
    device = next(model.parameters()).device
    model.train()
    for inputs, _ in tqdm(batches, "norms", leave=False):
        model(inputs.to(device))
    return model.eval()


def recovery_batches(settings: Settings) -> DataLoader:
    """Pictures that the fine-tuning has not seen, shuffled by the settings' seed."""
    images, labels = data.fashion_mnist("train")
    unseen = slice(fashion.Settings().images, fashion.Settings().images + settings.images)
    part = fashion.Pictures(images[unseen], labels[unseen], fashion.Settings().pixels)
    return fashion.loader(part, settings.batch_size, settings.seed)


def recover(model: nn.Module, batches: DataLoader, settings: Settings) -> nn.Module:
    """Train in place for the extra steps, by AdamW and one cycle of the learning rate; ends in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=len(batches))
    torch.manual_seed(settings.seed)
    training.train_epoch(model, batches, optimizer, schedule=schedule, clip_norm=1.0)
    return model.eval()
