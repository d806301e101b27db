"""The splits: nothing on two sides, nothing lost, the same everywhere."""

import hashlib
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

from qft_utils import assets, data
from tools.layout import ROOT

PARTS = ("train", "validation", "test")
PAIRS = [("train", "validation"), ("train", "test"), ("validation", "test")]


@pytest.fixture(scope="module")
def reviews() -> dict[str, pd.DataFrame]:
    return {part: data.reviews(part) for part in PARTS}


@pytest.fixture(scope="module")
def plots() -> dict[str, pd.DataFrame]:
    return {part: data.plots(part) for part in PARTS}


@pytest.fixture(scope="module")
def corpus() -> pd.DataFrame:
    """The file as it is distributed."""
    return pd.read_csv(assets.locate("reviews") / "rotten_tomatoes_corpus_full.csv.bz2")


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_no_film_and_no_text_is_in_two_parts(reviews, plots, one, other):
    films = {part: set(reviews[part].film) | set(plots[part].film) for part in (one, other)}
    texts = {part: set(reviews[part].text) | set(plots[part].text) for part in (one, other)}
    assert not films[one] & films[other]
    assert not texts[one] & texts[other]


def test_shares(reviews):
    sizes = {part: len(frame) for part, frame in reviews.items()}
    shares = {part: 100 * size / sum(sizes.values()) for part, size in sizes.items()}
    assert shares == pytest.approx({"train": 70, "validation": 10, "test": 20}, abs=1)


def test_each_labelled_sentence_of_the_file_is_there_once(reviews, corpus):
    labelled = corpus[corpus.category != "plot"].dropna(subset="text")
    together = pd.concat(reviews.values())
    assert together.text.is_unique
    assert len(together) == labelled.text.nunique() == 12_752
    rows = set(zip(labelled.text, labelled.category, labelled.movie_name, strict=True))
    category = together.label.map({0: "rotten", 1: "fresh"})
    assert set(zip(together.text, category, together.film, strict=True)) <= rows


def test_each_plot_with_a_text_is_there_once(plots, corpus):
    wanted = corpus[corpus.category == "plot"].dropna(subset="text").text
    together = pd.concat(plots.values())
    assert together.text.is_unique
    assert set(together.text) == set(wanted)


@pytest.mark.parametrize("part", PARTS)
def test_columns(reviews, plots, part):
    assert list(reviews[part].columns) == ["text", "label", "film"]
    assert list(plots[part].columns) == ["text", "film"]
    assert set(reviews[part].label) == {0, 1}
    assert 0.4 < reviews[part].label.mean() < 0.65  # the whole: 0.58
    for frame in (reviews[part], plots[part]):
        assert frame.text.str.strip().str.len().min() > 0
        assert frame.film.str.len().min() > 0
        assert (frame.index == range(len(frame))).all()


def test_a_changed_answer_changes_no_later_one():
    frame = data.reviews("test")
    frame["label"] = 7
    frame.loc[:, "text"] = ""
    assert set(data.reviews("test").label) == {0, 1}
    assert data.reviews("test").text.str.len().min() > 0


def digest(part: str) -> str:
    rows = data.reviews(part).to_csv() + data.plots(part).to_csv()
    return hashlib.sha256(rows.encode()).hexdigest()


def test_the_split_does_not_depend_on_the_hash_seed():
    code = "from tests.test_data import PARTS, digest; print(*map(digest, PARTS))"
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [digest(part) for part in PARTS], done.stderr


@pytest.fixture(scope="module")
def pictures() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {part: data.fashion_mnist(part) for part in PARTS}


def test_sizes_of_fashion_mnist(pictures):
    for part, size in zip(PARTS, (55_000, 5_000, 10_000), strict=True):
        images, labels = pictures[part]
        assert (images.shape, images.dtype) == ((size, 28, 28), torch.uint8)
        assert (labels.shape, labels.dtype) == ((size,), torch.int64)
        assert labels.unique().tolist() == list(range(len(data.FASHION_CLASSES)))


def idx(name: str, header: int) -> bytes:
    """The body of an idx file: what comes after the magic number and the sizes."""
    return (assets.locate("fashion_mnist") / name).read_bytes()[header:]


def records(images: bytes, labels: bytes) -> list[bytes]:
    return [images[784 * i : 784 * (i + 1)] + labels[i : i + 1] for i in range(len(labels))]


def test_train_and_validation_are_the_60000_and_share_none(pictures):
    """As multisets of (picture, label): each of the file's records is in exactly one of the two."""
    parts = [pictures[part] for part in ("train", "validation")]
    dealt = [r for x, y in parts for r in records(x.numpy().tobytes(), y.to(torch.uint8).numpy().tobytes())]
    filed = records(idx("train-images-idx3-ubyte", 16), idx("train-labels-idx1-ubyte", 8))
    assert len(filed) == 60_000
    assert sorted(dealt) == sorted(filed)
    assert len(set(filed)) > 59_900  # so hardly a record could stand in for another


def test_the_test_part_is_the_files(pictures):
    images, labels = pictures["test"]
    assert images.numpy().tobytes() == idx("t10k-images-idx3-ubyte", 16)
    assert labels.to(torch.uint8).numpy().tobytes() == idx("t10k-labels-idx1-ubyte", 8)


def test_fashion_mnist_is_the_same_each_time(pictures):
    images, labels = data.fashion_mnist("validation")
    assert torch.equal(images, pictures["validation"][0])
    assert torch.equal(labels, pictures["validation"][1])


@pytest.mark.parametrize("load", [data.reviews, data.plots, data.fashion_mnist])
@pytest.mark.parametrize("split", ["dev", "Train", "", None])
def test_unknown_split(load, split):
    with pytest.raises(ValueError, match=f"split is {split!r}; it must be one of train, validation, test"):
        load(split)
