"""The models and data of the book: what they are, whose they are, where they lie, and that they are whole.

`python -m qft_utils.assets` lists them; `python -m qft_utils.assets fetch` brings what can still be brought.
"""

import gzip
import hashlib
import importlib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_model, save_model

from qft_utils.asset_table import ASSETS, PACKAGED, Asset
from qft_utils.paths import cache_dir

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist


class MissingAsset(FileNotFoundError):
    """A model or data set is not on this machine; the message says which command brings it."""


class CorruptAsset(ValueError):
    """A file is there, but it is not the file that the book was written with."""


def missing(asset: Asset, why: str) -> MissingAsset:
    """The error for an asset that is not here: its name, the reason, and the command that brings it."""
    return MissingAsset(f"{asset.name} ({asset.what}) is not on this machine: {why}. To bring it: {asset.command}")


def lookup(name: str) -> Asset:
    """The entry of the table; ValueError for a name that is not in it."""
    if name not in ASSETS:
        raise ValueError(f"no asset is called {name!r}; the table has {', '.join(ASSETS)}")
    return ASSETS[name]


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache  # a file is read for its checksum once a process
def _verify(path: Path, expected: str, asset_name: str) -> None:
    found = sha256(path)
    if found != expected:
        raise CorruptAsset(
            f"{path.name} of {asset_name} is not the file that the book was written with: its SHA-256 begins "
            f"{found[:12]}, expected {expected[:12]}. Remove it and bring it again: {ASSETS[asset_name].command}"
        )


def locate(name: str) -> Path:
    """The folder that holds the asset's files, each checked against its checksum.

    Raises ValueError for an unknown name, MissingAsset where it is not installed, CorruptAsset for a wrong file.
    """
    asset = lookup(name)
    if not asset.files:
        raise ValueError(f"{name} comes from a hub: load it with qft_utils.models, not by its folder")
    folder = _folder(asset)
    for file, expected in asset.files.items():
        if not (folder / file).is_file():
            raise missing(asset, f"{file} is not there")
        _verify(folder / file, expected, name)
    return folder


def _folder(asset: Asset) -> Path:
    if asset.package is None:
        return _fashion_mnist(asset)
    spec = importlib.util.find_spec(asset.package)  # finds the package without running its code
    if spec is None or spec.origin is None:
        raise missing(asset, f"the package {asset.package} is not installed")
    return Path(spec.origin).parent / asset.folder


def _fashion_mnist(asset: Asset) -> Path:
    """Unpacks Debian's files into the cache, in the layout that torchvision expects, where they are not there yet."""
    folder = cache_dir() / asset.folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in asset.files:
        packed = DEBIAN_FASHION_MNIST / f"{file}.gz"
        if not (folder / file).exists() and packed.exists():
            with _whole_or_not(folder / file) as partial:
                _unzip(packed, partial)
    return folder


def _unzip(packed: Path, target: Path) -> None:
    with gzip.open(packed) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


@contextmanager
def _whole_or_not(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when all is written, and is removed if that fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def fetch() -> None:
    """Brings Fashion-MNIST by torchvision's own download where Debian's package is not installed.

    Raises MissingAsset where that fails, CorruptAsset for a file that is not the right one.
    """
    try:
        locate("fashion_mnist")
    except MissingAsset:
        print("Debian's dataset-fashion-mnist is not installed: downloading Fashion-MNIST through torchvision")
        import torchvision

        try:
            torchvision.datasets.FashionMNIST(cache_dir(), download=True)
        except (OSError, RuntimeError) as error:  # no network; a mirror that sends something else
            raise missing(lookup("fashion_mnist"), f"torchvision could not download it ({error})") from error
        locate("fashion_mnist")


@dataclass(frozen=True)
class Recipe:
    """How a chapter's model is made again: a module with `build()` (the architecture) and `train()` (all of it)."""

    module: str
    code: tuple[str, ...]  # the modules whose source decides the result
    data: tuple[str, ...]  # the assets it learns from


RECIPES = {
    "sentiment": Recipe(
        "qft_utils.sentiment",
        ("qft_utils.sentiment", "qft_utils.data", "qft_utils.models"),
        ("all-MiniLM-L6-v2", "reviews"),
    ),
    "fashion": Recipe(
        "qft_utils.fashion",
        ("qft_utils.fashion", "qft_utils.data", "qft_utils.models", "qft_utils.training"),
        ("efficientnet_lite0", "fashion_mnist"),
    ),
}


class Trained(NamedTuple):
    """A trained model in eval mode, the seconds its training took, and whether that was just now."""

    model: torch.nn.Module
    seconds: float
    trained_now: bool


def recipe_key(name: str) -> str:
    """Sixteen hexadecimal digits of the code, the data and the library versions that decide a trained model."""
    recipe = _recipe(name)
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for module in recipe.code:
        spec = importlib.util.find_spec(module)
        digest.update(Path(spec.origin).read_bytes())
    for asset in recipe.data:
        digest.update(repr(lookup(asset).files).encode())
    return digest.hexdigest()[:16]


def keep(name: str, model: torch.nn.Module, seconds: float) -> None:
    """In the build (`QFT_STRICT=1`), stores a model that a chapter has just trained where `trained(name)` looks.

    Elsewhere it stores nothing: a reader may have changed the chapter's cells, and the key knows only the package.
    """
    if os.environ.get("QFT_STRICT") == "1":
        _store(name, model, seconds)


def _store(name: str, model: torch.nn.Module, seconds: float) -> Path:
    path = _trained_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _whole_or_not(path) as partial:  # one file for both, so that there is nothing between the old and the new
        save_model(model, str(partial), metadata={"seconds": repr(seconds)})
    return path


def trained(name: str) -> Trained:
    """The model that a chapter trained: from the cache, or trained again where code or data changed since.

    Raises ValueError for a name without a recipe, MissingAsset where its data is not here.
    """
    recipe, path = _recipe(name), _trained_file(name)
    module = importlib.import_module(recipe.module)
    if path.exists():
        model = module.build()
        load_model(model, str(path))
        with safe_open(path, "pt") as file:
            return Trained(model.eval(), float(file.metadata()["seconds"]), False)
    print(f"{name} is not in the cache: training it now")
    start = time.perf_counter()
    model = module.train()
    seconds = time.perf_counter() - start
    _store(name, model, seconds)
    return Trained(model.eval(), seconds, True)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"no chapter trains a model called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def _trained_file(name: str) -> Path:
    return cache_dir() / "trained" / f"{name}-{recipe_key(name)}.safetensors"


def _status() -> Iterator[str]:
    for asset in PACKAGED:
        try:
            locate(asset.name)
            state = "here, whole"
        except (MissingAsset, CorruptAsset) as error:
            state = str(error)
        yield f"{asset.name:24s}{asset.megabytes:8.1f} MB  {asset.licence}\n{'':24s}{asset.source}\n{'':24s}{state}"


def main(arguments: list[str]) -> int:
    """`fetch` brings what can be brought; without it, or after it, the table is printed. 1 if an asset is missing."""
    if arguments not in ([], ["fetch"]):
        print("usage: python -m qft_utils.assets [fetch]", file=sys.stderr)
        return 2
    try:
        if arguments:
            fetch()
    except (MissingAsset, CorruptAsset) as error:
        print(error, file=sys.stderr)
        return 1
    lines = list(_status())
    print("\n".join(lines))
    return 0 if all(line.endswith("here, whole") for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
