"""The book's pretrained models by name: packaged ones from `assets`, others through the libraries' own loading."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_session
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

LITE0_WEIGHTS = "efficientnet-lite0-57934424.pth"


def _text_source(name: str) -> Path | str:
    """A folder for a packaged model, the hub's name for one that comes from a hub."""
    return assets.locate(name) if assets.lookup(name).files else name


def _from_pretrained(auto: type, name: str, **options: int) -> Any:
    """What `auto` loads: from the package, else from the hub's cache, else from the hub if it answers.

    Left to itself, `from_pretrained` asks the hub about each file, cached or not, and offline tries for a minute.
    """
    source = _text_source(name)
    try:
        with suppress(OSError):
            return auto.from_pretrained(source, local_files_only=True, **options)
        _ask_hub()
        return auto.from_pretrained(source, **options)
    except OSError as error:
        raise assets.missing(assets.lookup(name), "it is not in the hub's cache, and no hub answers") from error


def _ask_hub() -> None:
    """Raises ConnectionError where no hub answers: one request, not tried again."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # its class depends on the HTTP library that this huggingface_hub uses
        raise ConnectionError(f"{constants.ENDPOINT} does not answer: {error}") from error


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
    with _quietly():
        model = _from_pretrained(AutoModelForSequenceClassification, name, num_labels=num_labels)
    return model, _from_pretrained(AutoTokenizer, name)


def load_causal_lm(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained causal language model from a hub and its tokenizer; raises MissingAsset as `load_encoder` does."""
    return _from_pretrained(AutoModelForCausalLM, name), _from_pretrained(AutoTokenizer, name)


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
    model = timm.create_model("efficientnet_lite0")
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    own = model.state_dict()
    if [v.shape for v in own.values()] != [v.shape for v in packaged.values()]:
        raise assets.CorruptAsset(f"{path.name} does not hold the tensors of EfficientNet-Lite0, in its order")
    model.load_state_dict(dict(zip(own, packaged.values(), strict=True)))
    return model
