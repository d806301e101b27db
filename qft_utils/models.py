"""The book's pretrained models by name: packaged ones from `assets`, others through the libraries' own loading."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import timm
import torch
from huggingface_hub import constants, get_session, snapshot_download
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from qft_utils import assets
from qft_utils.asset_table import HUB_FILES

LITE0_WEIGHTS = "efficientnet-lite0-57934424.pth"


def _source(name: str) -> Path | str:
    """The folder of a packaged or cached model, else its name for a hub that answers; an OSError if none does.

    Left to itself, `from_pretrained` asks the hub about files that are cached, tries for a minute where there is no
    network, and makes an empty tokenizer of a folder that lacks the tokenizer's file.
    """
    if assets.lookup(name).files:
        return assets.locate(name)
    with suppress(OSError):  # not in the cache
        folder = Path(snapshot_download(name, local_files_only=True))
        if all((folder / file).exists() for file in HUB_FILES):
            return folder
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # its class depends on the HTTP library that this huggingface_hub uses
        raise ConnectionError(f"{constants.ENDPOINT} does not answer") from error
    return name


@contextmanager
def _or_missing(name: str) -> Iterator[None]:
    try:
        yield
    except assets.MissingAsset:  # a packaged one: it says itself what is missing
        raise
    except OSError as error:
        raise assets.missing(assets.lookup(name), f"it is not in the hub's cache, and {error}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' load report, which names folders of this machine and the new head's two tensors."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_encoder(
    name: str = "all-MiniLM-L6-v2", num_labels: int = 2
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained encoder under a new classification head of `num_labels` outputs, and its tokenizer.

    The head's weights are drawn from torch's generator: seed it first. Raises MissingAsset, with the command that
    brings the model, where it is neither packaged nor in the hub's cache nor to be downloaded.
    """
    with _or_missing(name), _quietly():
        source = _source(name)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=num_labels)
        return model, AutoTokenizer.from_pretrained(source)


def load_causal_lm(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained causal language model from a hub and its tokenizer; raises MissingAsset as `load_encoder` does."""
    with _or_missing(name):
        source = _source(name)
        return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)


def load_cnn(name: str = "efficientnet_lite0") -> nn.Module:
    """An ImageNet-pretrained CNN with its 1000 outputs: EfficientNet-Lite0 from its package, others by torchvision.

    Raises ValueError for a name not in the table, MissingAsset where the weights are not here and cannot be brought.
    """
    if name == "efficientnet_lite0":
        return _lite0(assets.locate(name) / LITE0_WEIGHTS)
    asset = assets.lookup(name)
    import torchvision  # late: the other loaders do not need it

    try:
        return torchvision.models.get_model(name, weights="DEFAULT")
    except OSError as error:  # urllib's errors are OSErrors
        raise assets.missing(asset, f"its weights could not be downloaded ({error})") from error


def _lite0(path: Path) -> nn.Module:
    """timm's EfficientNet-Lite0 with the packaged weights, whose tensors come in timm's order under other names."""
    # The weights were trained with 0.001 added to each variance, as TensorFlow does; timm's default is less.
    model = timm.create_model("efficientnet_lite0", bn_eps=1e-3)
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    own = model.state_dict()
    if [v.shape for v in own.values()] != [v.shape for v in packaged.values()]:
        raise assets.CorruptAsset(f"{path.name} does not hold the tensors of EfficientNet-Lite0, in its order")
    model.load_state_dict(dict(zip(own, packaged.values(), strict=True)))
    return model
