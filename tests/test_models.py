"""Pretrained models: packaged ones tensor by tensor, others through the hub's caches with the network cut off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from qft_utils import assets, models
from tools.layout import ROOT

BERT = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
DISTILBERT = {"vocab_size": 40, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
GPT2 = {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2}
TINY = {  # the classes that the hub's files were saved from
    "bert-base-uncased": ("bert", "BertForMaskedLM", BERT),
    "distilbert-base-uncased": ("distilbert", "DistilBertForMaskedLM", DISTILBERT),
    "gpt2": ("gpt2", "GPT2LMHeadModel", GPT2),
}
LOADERS = dict.fromkeys(TINY, "load_encoder") | {"gpt2": "load_causal_lm"}
WORDS = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a", "good", "film"])}
CUT_OFF = """
import json, socket, sys
import torch
asked = []
def refuse(*arguments, **_):
    asked.append(repr(arguments))
    raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
from qft_utils import assets, models
report = {}
for call, name, *output in json.loads(sys.argv[1]):
    del asked[:]
    try:
        made = getattr(models, call)(name)
    except assets.MissingAsset as error:
        report[name] = {"error": str(error), "asked": len(asked)}
        continue
    torch.save(made[0].state_dict(), output[0])
    report[name] = {"class": type(made[0]).__name__, "asked": len(asked), "ids": made[1]("a good film")["input_ids"]}
print("REPORT" + json.dumps(report))
"""


def hub_snapshot(home: Path, name: str) -> Path:
    """Writes a tiny model where the hub's cache keeps `name`: refs/main names the snapshot's folder."""
    repository = home / "hub" / f"models--{name}"
    folder = repository / "snapshots" / ("0123456789" * 4)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(folder.name)
    kind, architecture, sizes = TINY[name]
    getattr(transformers, architecture)(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
    words = Tokenizer(WordLevel(WORDS, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(folder)
    return folder


def cut_off(calls: list, tmp_path: Path, **environment: str) -> dict:
    """What a fresh interpreter without a network reports about these calls."""
    environment = {key: v for key, v in os.environ.items() if not key.startswith("HF_")} | environment
    environment |= {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path / "torch"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CUT_OFF, json.dumps(calls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("REPORT")[2])


@pytest.mark.parametrize("offline", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_hub_names_without_a_network(tmp_path, offline):
    """Whole snapshots are loaded without a question to the hub; what is missing is an error at once, not a wait."""
    folders = {name: hub_snapshot(tmp_path, name) for name in TINY}
    (folders["distilbert-base-uncased"] / "tokenizer.json").unlink()  # as a download that was broken off
    calls = [(LOADERS[name], name, str(tmp_path / name)) for name in TINY]
    report = cut_off([*calls, ("load_cnn", "mobilenet_v2")], tmp_path, HF_HUB_OFFLINE=offline)
    for name in ("distilbert-base-uncased", "mobilenet_v2"):
        assert report[name]["error"].startswith(f"{name} (")
        assert report[name]["error"].endswith(f"To bring it: {assets.lookup(name).command}")
        assert report[name]["asked"] <= 2  # without the many tries that huggingface_hub makes by itself
    for name, kind in (("bert-base-uncased", "BertForSequenceClassification"), ("gpt2", "GPT2LMHeadModel")):
        assert report[name] == {"class": kind, "asked": 0, "ids": [5, 6, 7]}
        assert_same_body(load_file(folders[name] / "model.safetensors"), torch.load(tmp_path / name))


def test_distilbert_from_the_hubs_cache(tmp_path, monkeypatch):
    """In this process: the cache's place is huggingface_hub's constant, which it reads from HF_HOME when imported."""
    folder = hub_snapshot(tmp_path, "distilbert-base-uncased")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model, tokenizer = models.load_encoder("distilbert-base-uncased", num_labels=3)
    assert type(model).__name__ == "DistilBertForSequenceClassification"
    assert tokenizer("a good film")["input_ids"] == [5, 6, 7]
    assert model(**tokenizer("a good film", return_tensors="pt")).logits.shape == (1, 3)
    assert_same_body(load_file(folder / "model.safetensors"), model.state_dict())


def assert_same_body(stored: dict, loaded: dict) -> None:
    """Every tensor of the file is in the model, but for the head that belongs to another task."""
    body = {name: tensor for name, tensor in stored.items() if not name.startswith(("cls.", "vocab_"))}
    assert len(body) > 10
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in body.items())


@pytest.mark.parametrize("load", [models.load_encoder, models.load_causal_lm, models.load_cnn])
def test_unknown_names(load):
    with pytest.raises(ValueError, match="no asset is called 'vgg'; the table has"):
        load("vgg")


# MiniLM


def test_minilm_has_the_weights_of_its_file():
    model, tokenizer = models.load_encoder()
    stored = load_file(assets.locate("all-MiniLM-L6-v2") / "model.safetensors")
    stored.pop("embeddings.position_ids", None)  # a constant that older files hold
    body = model.bert.state_dict()
    assert set(stored) == set(body)
    assert all(torch.equal(stored[name].to(body[name].dtype), body[name]) for name in stored)
    assert sum(p.numel() for p in model.bert.parameters()) == 22_713_216
    assert tokenizer.decode(tokenizer("A good film")["input_ids"]) == "[CLS] a good film [SEP]"


@pytest.mark.parametrize("num_labels", [2, 5])
def test_the_head_follows_the_seed(num_labels):
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(models.load_encoder(num_labels=num_labels)[0].classifier.weight)
    assert heads[0].shape == (num_labels, 384)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_loading_says_nothing_and_changes_no_verbosity(capfd):
    before = transformers.logging.get_verbosity()
    models.load_encoder()
    assert str(assets.locate("all-MiniLM-L6-v2")) not in "".join(capfd.readouterr())
    assert transformers.logging.get_verbosity() == before


# CNNs


def test_efficientnet_lite0_holds_the_tensors_of_its_file_in_order():
    model = models.load_cnn()
    stored = torch.load(assets.locate("efficientnet_lite0") / models.LITE0_WEIGHTS, weights_only=True)
    tensors = list(model.state_dict().values())
    assert len(tensors) == len(stored) == 296
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors, stored.values(), strict=True))
    with torch.inference_mode():
        logits = model.eval()(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()


def test_efficientnet_lite0_adds_to_each_variance_what_its_training_added():
    """0.001, which no tensor of the file says, and without which the logits are others."""
    norms = [m for m in models.load_cnn("efficientnet_lite0").modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 49
    assert {norm.eps for norm in norms} == {1e-3}


@pytest.mark.parametrize("change", ["a tensor less", "another shape", "another order", "another model"])
def test_a_wrong_weight_file_is_refused(tmp_path, change):
    names = models.load_cnn().state_dict()
    items = list(names.items())
    wrong = {
        "a tensor less": dict(items[:-1]),
        "another shape": names | {items[0][0]: torch.zeros(32, 3, 5, 5)},
        "another order": dict(items[::-1]),
        "another model": {"weight": torch.zeros(3)},
    }[change]
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(assets.CorruptAsset, match=r"wrong\.pth does not hold the tensors of EfficientNet-Lite0"):
        models._lite0(tmp_path / "wrong.pth")


@pytest.mark.parametrize("name", ["mobilenet_v2", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_torchvision_models_from_torch_hubs_cache(name, tmp_path, monkeypatch):
    """Random weights under the file name of torchvision's default weights: they are loaded, tensor by tensor."""
    from torchvision.models import get_model, get_model_weights  # late: qft_utils must come before torchvision

    file = tmp_path / "hub" / "checkpoints" / Path(get_model_weights(name).DEFAULT.url).name
    file.parent.mkdir(parents=True)
    written = get_model(name, weights=None).state_dict()
    torch.save(written, file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    loaded = models.load_cnn(name).state_dict()
    file.unlink()  # up to 100 MB that pytest would keep
    assert list(loaded) == list(written)
    assert all(torch.equal(loaded[key], written[key]) for key in written)
