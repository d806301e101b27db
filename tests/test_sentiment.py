"""The functions that chapter 1 builds are the ones that the package keeps: same batches, losses and predictions."""

import ast

import pandas as pd
import pytest
import torch
import transformers  # its classes are named below, where qft_utils has been imported: see qft_utils.compat
from torch import nn

from qft_utils import assets, data, models, sentiment
from tools.layout import ROOT

SOURCE = (ROOT / "notebooks" / "01_introduction.py").read_text()
KEPT = ("ReviewDataset", "loader", "predict", "fine_tune")
SETTINGS = sentiment.Settings(sentences=70, batch_size=8, learning_rate=1e-2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def chapter(defined_in) -> dict:
    return defined_in("01_introduction", KEPT)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(assets.locate("all-MiniLM-L6-v2"))


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Sentences of 1 to 90 words, so that some are cut."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 90, (100,), generator=generator).tolist()
    labels = torch.randint(0, 2, (100,), generator=generator).tolist()
    words = ["a", "good", "bad", "film"]
    texts = [" ".join(words[(n + i) % 4] for i in range(n)) for n in lengths]
    return pd.DataFrame({"text": texts, "label": labels})


def tiny_bert() -> nn.Module:
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    # The words here have low numbers; the weights are large, so that gradients are, and get clipped.
    config = transformers.BertConfig(vocab_size=4_000, initializer_range=0.5, **sizes)
    return transformers.BertForSequenceClassification(config)


def batches_of(module, frame, tokenizer, seed=3):
    dataset = module["ReviewDataset"](frame, tokenizer)
    return module["loader"](dataset, tokenizer, 8, seed)


def assert_same_batches(ours, others):
    for one, other in zip(ours, others, strict=True):
        assert one.keys() == other.keys() == {"input_ids", "attention_mask", "labels"}
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_same_data_set(chapter, frame, tokenizer):
    mine, theirs = (make(frame, tokenizer) for make in (sentiment.ReviewDataset, chapter["ReviewDataset"]))
    assert len(mine) == len(theirs) == len(frame)
    assert [mine[i] for i in range(len(mine))] == [theirs[i] for i in range(len(theirs))]
    assert max(len(example["input_ids"]) for example in mine) == 64  # the default, in both


def test_same_batches_in_the_same_order(chapter, frame, tokenizer):
    assert_same_batches(batches_of(vars(sentiment), frame, tokenizer), batches_of(chapter, frame, tokenizer))


def test_batches_hold_each_sentence_once_and_little_padding(frame, tokenizer):
    batches = list(batches_of(vars(sentiment), frame, tokenizer))
    lengths = [n for batch in batches for n in batch["attention_mask"].sum(1).tolist()]
    dataset = sentiment.ReviewDataset(frame, tokenizer)
    assert sorted(lengths) == sorted(len(tokens) for tokens in dataset.tokens)
    assert sum(batch["labels"].sum() for batch in batches) == frame.label.sum()
    other = batches_of(vars(sentiment), frame, tokenizer, seed=4)
    assert [b["labels"].tolist() for b in batches] != [b["labels"].tolist() for b in other]
    at_random = torch.utils.data.DataLoader(dataset, 8, shuffle=True, collate_fn=other.collate_fn)
    assert padding(batches) < padding(at_random)


def padding(batches) -> float:
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)


def test_same_losses_and_weights_to_the_bit(chapter, frame, tokenizer):
    made = []
    for module in (vars(sentiment), chapter):
        model = tiny_bert()  # which also seeds the dropout
        losses = module["fine_tune"](model, batches_of(module, frame, tokenizer), SETTINGS)
        made.append((losses, model))
        assert not model.training
        assert len(losses) == 2 * 13
    (mine, model), (theirs, other) = made
    assert mine == theirs
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "warmup", "epochs"])
def test_the_losses_depend_on_every_setting(frame, tokenizer, name):
    """So equal losses are no accident: a different schedule shows in them, and in the weights."""
    changed = sentiment.Settings(**{**vars(SETTINGS), name: {"epochs": 1}.get(name, 0.5)})
    weights = []
    for settings in (SETTINGS, changed):
        model = tiny_bert()
        sentiment.fine_tune(model, batches_of(vars(sentiment), frame, tokenizer), settings)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert not torch.equal(*weights)


class FirstWord(nn.Module):
    """Says 1 where the second token's id is odd, whatever else is in the batch."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask, labels):
        odd = (input_ids[:, 1] % 2).float()
        return type("Output", (), {"logits": torch.stack([1 - odd, odd], 1)})


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_predictions_come_in_the_order_of_the_data_set(chapter, frame, tokenizer, batch_size):
    dataset = sentiment.ReviewDataset(frame, tokenizer)
    expected = [dataset[i]["input_ids"][1] % 2 for i in range(len(dataset))]
    assert 10 < sum(expected) < 90
    for module in (vars(sentiment), chapter):
        found = module["predict"](FirstWord(), dataset, tokenizer, batch_size)
        assert (found.tolist(), found.dtype) == (expected, torch.int64)


def test_same_predictions(chapter, frame, tokenizer):
    model, dataset = tiny_bert().eval(), sentiment.ReviewDataset(frame, tokenizer)
    model.classifier.bias.data += model_bias(model, dataset, tokenizer)
    mine, theirs = (module["predict"](model, dataset, tokenizer) for module in (vars(sentiment), chapter))
    assert torch.equal(mine, theirs)
    assert 0 < mine.sum() < len(mine)


@torch.no_grad()
def model_bias(model, dataset, tokenizer) -> torch.Tensor:
    """What makes a random model say 1 about as often as 0."""
    logits = torch.cat([model(torch.tensor([tokens])).logits for tokens in dataset.tokens])
    return torch.tensor([(logits[:, 1] - logits[:, 0]).median(), 0.0])


def test_the_chapter_takes_its_settings_from_the_package():
    made = {
        ast.unparse(node.value)
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "settings"
    }
    assert made == {"sentiment.Settings()"}


def cell(having: str) -> str:
    """The one code cell of the chapter that holds these words."""
    (found,) = [cell for cell in SOURCE.split("\n# %%") if having in cell and not cell.startswith(" [markdown]")]
    return found.partition("\n")[2]


def test_train_is_the_whole_of_the_chapters_fine_tuning(chapter, frame, tokenizer, monkeypatch):
    """The cells that choose the sentences and train, run on a tiny model, against `sentiment.train()`."""
    kept = []
    monkeypatch.setattr(models, "load_encoder", lambda *_, **__: (tiny_bert_unseeded(), tokenizer))
    monkeypatch.setattr(data, "reviews", lambda part: frame)
    monkeypatch.setattr(sentiment, "Settings", lambda: SETTINGS)
    monkeypatch.setattr(assets, "keep", lambda name, model, seconds: kept.append((name, model)))
    parts = dict.fromkeys(("train", "validation", "test"), frame)
    namespace = chapter | {"tokenizer": tokenizer, "parts": parts, "device": torch.device("cpu")}
    for having in ("settings = sentiment.Settings()", "assets.keep("):
        exec(cell(having), namespace)
    (name, theirs), mine = kept[0], sentiment.train()
    assert name in assets.RECIPES
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def tiny_bert_unseeded() -> nn.Module:
    with torch.random.fork_rng():
        model = tiny_bert()
    nn.init.normal_(model.classifier.weight, std=0.02)  # the head is drawn from the caller's seed
    return model


def test_build_is_what_training_starts_from():
    one, other = sentiment.build(), sentiment.build()
    torch.manual_seed(sentiment.Settings().seed)
    loaded, _ = models.load_encoder()
    assert torch.equal(one.classifier.weight, loaded.classifier.weight)
    assert torch.equal(one.classifier.weight, other.classifier.weight)
    assert one.config.num_labels == len(data.LABELS)
